"""Prompt files -> token ids, with the user's own records kept untouched beside them.

Texts are encoded in batches. A model's limits are passed in: no model has to be loaded.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from nla_engine.errors import PromptError, first_line
from nla_engine.models.chat import ChatText, RawText, Reading, Rendered, clock_at, lacks, reads_clock
from nla_engine.models.documents import WINDOW, Longest, Splitter, tokens_around, window_sources
from nla_engine.models.prompt_files import record_source
from nla_engine.models.prompt_set import PromptSet
from nla_engine.models.prompt_sources import PromptSources

#: Most texts, and most characters, encoded in one call: enough for every core, small beside the result.
BATCH = (1000, 1 << 20)
#: Field of a record that says which reply of which prompt its sequence is.
REPLY = "nla_reply"
#: Names of fields that are remembered for an error, about.
MOST_FIELDS = 100


@dataclass(frozen=True)
class Limits:
    """What a model can read; None: no limit. tokens: most per prompt; vocabulary: ids below it have an embedding."""

    tokens: int | None = None
    vocabulary: int | None = None


def read_prompts(
    given: Path | PromptSources,
    tokenizer: Any,
    *,
    chat: bool | None = None,
    replies: int = 1,
    limits: Limits = Limits(),
    reading: Reading = Reading(),
    longest: Longest = Longest(),
    skip_bad: bool = False,
    clock: datetime | None = None,
) -> PromptSet:
    """Read and encode prompt files.

    chat: True: render through the chat template. False: read the text raw. None: render if there is a template.
    replies: to be generated for each prompt: it is repeated so often, each time as a document of its own, with REPLY in
    its record. 0: prompts are only read (`ChatText`). reading: what holds of every record. longest: of raw text:
    documents that have too many tokens. skip_bad: count unusable records instead of raising.
    clock: the time that a chat template is given; None for now.
    Raises PromptError for a file that is missing, empty or unreadable, and for the first unusable record.
    """
    sources = PromptSources.find([given]) if isinstance(given, Path) else given
    path = sources.name
    if chat and not tokenizer.chat_template:
        raise PromptError(
            f"{path}: --chat was asked for, but the model's tokenizer has no chat template; use --raw"
        )
    if limits.tokens is not None and limits.tokens < 1:
        raise PromptError(f"{path}: no room for a prompt beside so many new tokens: lower --max-new-tokens")
    chat = bool(tokenizer.chat_template) if chat is None else chat
    if not chat and (reading.system is not None or reading.variables or reading.prefill is not None):
        raise PromptError(
            f"{path}: --system, --prefill and --template-option need a chat template, and the model's tokenizer has "
            "none: leave them out"
        )
    if longest.tokens is not None and limits.tokens is not None and longest.tokens > limits.tokens:
        raise PromptError(
            f"{path}: --max-tokens is {longest.tokens}, and the model reads at most {limits.tokens}: lower it"
        )
    most = limits.tokens if longest.tokens is None else longest.tokens
    read = _Pass(path, tokenizer, replace(limits, tokens=most), reading.column, skip_bad, replies)
    if chat:
        read.text = ChatText(tokenizer, replies=replies > 0, reading=reading)
    else:
        read.read_raw(longest.long)
    if chat and reads_clock(tokenizer):
        read.found.clock = clock or datetime.now()
    told = read.found.clock
    with clock_at(tokenizer, told) if told else nullcontext():
        for place, record in sources.records():
            read.take(place, record)
        found = read.end()
    found.notes = [*sources.notes, *found.notes]
    return found


def reply_sources(source: bytes, prompt: int, replies: int) -> Iterator[bytes]:
    """The record of each reply of a prompt: its own, and in REPLY which one it is."""
    record = json.loads(source)
    for number in range(replies):
        yield json.dumps({**record, REPLY: {"prompt": prompt, "reply": number}}, ensure_ascii=False).encode()


class _Pass:
    """One pass over a prompt file. Records are collected until there are enough to encode together."""

    def __init__(
        self,
        path: str,
        tokenizer: Any,
        limits: Limits,
        column: str | None,
        skip_bad: bool,
        replies: int,
    ) -> None:
        self._path, self._tokenizer, self._limits, self._skip_bad = path, tokenizer, limits, skip_bad
        self._column = column
        self._replies = replies
        self.text: ChatText | RawText = RawText()
        self._fields: set[str] = set()
        self._raw = False
        self._head = np.zeros(0, np.int32)
        self._splitter: Splitter | None = None
        self._waiting: list[tuple[str, Rendered, bytes]] = []
        self._characters = 0
        self._notes: Counter[str] = Counter()
        self.found = PromptSet()

    def read_raw(self, long: str) -> None:
        """Records are texts as they are. long: what becomes of those with too many tokens."""
        self.text, self._raw = RawText(self._column), True
        around = tokens_around(self._tokenizer)
        if around is not None:
            self._head = around[0]
        if long != "refuse" and self._limits.tokens is not None:
            if around is None:
                raise PromptError(
                    f"--long {long}: which special tokens this tokenizer puts around a text cannot be told, so its "
                    "documents cannot be divided: leave --long out"
                )
            self._splitter = Splitter(self._limits.tokens, long, *around)

    def take(self, place: str, record: Any) -> None:
        """Take the next record, or the PromptError that reading it gave."""
        try:
            if isinstance(record, PromptError):
                raise record
            if not isinstance(record, dict):
                raise PromptError('not an object with "prompt" or "messages"')
            if len(self._fields) < MOST_FIELDS:
                self._fields.update(record)
            source = record_source(record)
            rendered = self.text.render(record)
            for name, told, used in (
                (WINDOW, "where a window comes from", self._splits),
                (REPLY, "which reply this is", self._replies > 1),
            ):
                if used and name in record:
                    raise PromptError(f'has a field "{name}", which is to say {told}: rename it')
        except PromptError as error:
            self._encode()  # errors come in the order of the file
            self._leave_out(place, error)
            return
        self._waiting.append((place, rendered, source))
        self._characters += len(rendered.text)
        if len(self._waiting) >= BATCH[0] or self._characters >= BATCH[1]:
            self._encode()

    def end(self) -> PromptSet:
        """All prompts that were found. PromptError if there is none."""
        self._encode()
        found, column = self.found, self._column
        if not len(found):
            if column is not None and self._fields and column not in self._fields:
                raise PromptError(f"{self._path}: {lacks(column, sorted(self._fields))}")
            raise PromptError(
                f"{self._path}: no usable prompt in it"
                + (
                    f" ({len(found.skipped)} skipped)"
                    if found.skipped
                    else ': write one per line, or JSON records with "prompt"'
                )
            )
        found.notes = [
            f"{count:,} of {found.documents // max(self._replies, 1):,} prompts {what}"
            for what, count in self._notes.items()
        ]
        return found

    def _encode(self) -> None:
        waiting, self._waiting, self._characters = self._waiting, [], 0
        if not waiting:
            return
        try:
            encoded = self._ids([rendered.text for _, rendered, _ in waiting])
        except Exception:  # a tokenizer may raise anything: encode one by one to find the text at fault
            encoded = [None] * len(waiting)
        for (place, rendered, source), given in zip(waiting, encoded, strict=True):
            try:
                ids = np.asarray(self._one(rendered.text) if given is None else given, np.int32)
                own = self._without_second_head(ids)
                self._check(own)
            except PromptError as error:
                self._leave_out(place, error)
                continue
            self._add(own, source, rendered.field)
            self._notes.update(rendered.notes)
            if own is not ids:
                name = self._named(int(self._head[-1]))
                self._notes[f"begin with {name} themselves: it is not put before them again"] += 1

    @property
    def _splits(self) -> bool:
        return self._splitter is not None and self._splitter.long == "windows"

    def _add(self, ids: np.ndarray, source: bytes, field: str) -> None:
        """A document, as one prompt, as its windows, or once for each reply."""
        if self._replies > 1:
            for about in reply_sources(source, self.found.documents // self._replies, self._replies):
                self.found.add(ids, about)
            return
        if self._splitter is None:
            self.found.add(ids, source)
            return
        pieces, most = self._splitter.pieces(ids), self._splitter.most
        if len(ids) > most:
            what = "split into windows" if self._splits else "cut"
            self._notes[f"have more than {most:,} tokens: they are {what}"] += 1
        sources: Iterable[bytes] = [source]
        if self._splits:
            sources = window_sources(source, field, self.found.documents, pieces)
        for number, (piece, about) in enumerate(zip(pieces, sources, strict=True)):
            self.found.add(piece.ids, about, same_document=number > 0)

    def _one(self, text: str) -> Any:
        try:
            return self._ids([text])[0]
        except Exception as error:
            raise PromptError(f"the tokenizer refuses it ({first_line(error)})") from error

    def _ids(self, texts: list[str]) -> list[Any]:
        """The ids of each text."""
        return list(
            self._tokenizer(
                texts,
                add_special_tokens=self._raw,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )["input_ids"]
        )

    def _without_second_head(self, ids: np.ndarray) -> np.ndarray:
        """The same ids, unless the text already begins with the token that the tokenizer puts before it."""
        size = len(self._head)
        twice = 0 < size < len(ids) and ids[size - 1] == ids[size] == self._head[-1]
        return np.delete(ids, size) if twice else ids

    def _check(self, ids: np.ndarray) -> None:
        """Raises PromptError unless the model can read these ids."""
        if not len(ids):
            raise PromptError("the prompt is empty")
        most, vocabulary = self._limits.tokens, self._limits.vocabulary
        if most is not None and len(ids) > most and self._splitter is None:
            mend = "lower --max-new-tokens" if self._replies else "with --corpus give --long cut or windows"
            raise PromptError(f"the prompt has {len(ids)} tokens, the limit is {most}: shorten it, or {mend}")
        if vocabulary is not None and (highest := int(ids.max())) >= vocabulary:
            raise PromptError(
                f"token {highest} ({self._named(highest)}) has no row in the model's embedding, which has "
                f"{vocabulary:,}: leave it out, or resize the embedding"
            )

    def _named(self, token: int) -> str:
        return ascii(self._tokenizer.convert_ids_to_tokens(token))

    def _leave_out(self, place: str, error: PromptError) -> None:
        message = f"{place}: {error}"
        if not self._skip_bad:
            raise PromptError(f"{message} (--skip-bad leaves such records out)") from error
        self.found.skipped.append(message)
