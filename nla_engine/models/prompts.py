"""Prompt files -> token ids, with the user's own records kept untouched beside them.

Texts are encoded in batches. Ids and records lie in flat buffers: in memory or, past a limit, in a temporary file.
A model's limits are passed in: no model has to be loaded.
"""

from __future__ import annotations

import hashlib
import tempfile
import weakref
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, overload

import numpy as np

from nla_engine.errors import PromptError, WriteError, first_line
from nla_engine.models.chat import ChatText, RawText, Rendered, clock_at, reads_clock
from nla_engine.models.prompt_files import read_records, record_source

#: Most texts, and most characters, encoded in one call: enough for every core, small beside the result.
BATCH = (1000, 1 << 20)
#: Bytes of ids, and of records, that stay in memory.
SPOOL_BYTES = 64 << 20


@dataclass(frozen=True)
class Limits:
    """What a model can read; None: no limit. tokens: most per prompt; vocabulary: ids below it have an embedding."""

    tokens: int | None = None
    vocabulary: int | None = None


@dataclass(frozen=True)
class Prompt:
    """One encoded prompt. token_ids: int32 [t], what the model reads; source: the user's record as UTF-8 JSON."""

    token_ids: np.ndarray
    source: bytes


class PromptSet(Sequence[Prompt]):
    """Every usable prompt of a file, in file order, and why the others were skipped.

    skipped: one line per record that was left out; notes: lines with what else the user should know
    clock: the time that the chat template was given, None if it did not ask for one (local, without a zone)
    One thread at a time may read it.
    """

    def __init__(self) -> None:
        self.skipped: list[str] = []
        self.notes: list[str] = []
        self.clock: datetime | None = None
        self._ids, self._sources = _Spool(), _Spool()
        self._digest = hashlib.sha256()
        self._first = np.zeros(0, np.int32)
        self._shortest = self._common = 0

    def messages(self) -> list[str]:
        """What a user should know before the run."""
        return [*(f"skipped: {why}" for why in self.skipped), *self.notes]

    def add(self, ids: np.ndarray, source: bytes) -> None:
        """The next prompt. ids: int32 [t], at least one."""
        if len(self):
            self._shortest = min(self._shortest, len(ids))
            size = min(self._common, len(ids))
            differs = np.flatnonzero(self._first[:size] != ids[:size])
            self._common = int(differs[0]) if len(differs) else size
        else:
            self._first, self._shortest, self._common = ids, len(ids), len(ids)
        self._digest.update(np.asarray((len(ids), len(source)), np.int64).tobytes())
        self._digest.update(ids.astype(np.int64).tobytes() + source)
        self._ids.append(ids.astype(np.int32, copy=False).tobytes())
        self._sources.append(source)

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return Prompt(self.token_ids(index), self._sources.read(index))

    def token_ids(self, index: int) -> np.ndarray:
        """int32 [t]: the ids of one prompt."""
        return np.frombuffer(self._ids.read(index), np.int32)

    @property
    def sizes(self) -> np.ndarray:
        """int64 [n]: how many tokens each prompt has."""
        return self._ids.sizes() // 4

    def fingerprint(self) -> str:
        """sha256 over the token ids and the record of every prompt, in order."""
        return self._digest.hexdigest()[:16]

    def common_prefix(self) -> int:
        """How many leading tokens all prompts share, at most all but the last token of the shortest."""
        return min(self._common, self._shortest - 1) if len(self) > 1 else 0


class _Spool:
    """Pieces of bytes, each written once and read by its number."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES)  # noqa: SIM115  # closed with the spool
        weakref.finalize(self, self._file.close)
        self._start = array("q", [0])

    def __len__(self) -> int:
        return len(self._start) - 1

    def append(self, piece: bytes) -> None:
        try:
            self._file.seek(self._start[-1])
            self._file.write(piece)
        except OSError as error:
            raise WriteError(
                f"{tempfile.gettempdir()}: the prompts cannot be kept there ({error.strerror}): set TMPDIR to a "
                "directory with more room"
            ) from error
        self._start.append(self._start[-1] + len(piece))

    def read(self, index: int) -> bytes:
        number = range(len(self))[index]
        self._file.seek(self._start[number])
        return self._file.read(self._start[number + 1] - self._start[number])

    def sizes(self) -> np.ndarray:
        """int64 [n], in bytes."""
        return np.diff(np.array(self._start, np.int64))


def read_prompts(
    path: Path,
    tokenizer: Any,
    *,
    chat: bool | None = None,
    replies: bool = True,
    limits: Limits = Limits(),
    skip_bad: bool = False,
    clock: datetime | None = None,
    go_on: Callable[[], bool] = lambda: True,
) -> PromptSet:
    """Read and encode a prompt file.

    chat: True: render through the chat template. False: read the text raw. None: render if there is a template.
    replies: whether a reply is to be generated (`ChatText`). skip_bad: count unusable records instead of raising.
    clock: the time that a chat template is given; None for now. go_on: asked after each record; False stops early.
    Raises PromptError for a file that is missing, empty or unreadable, and for the first unusable record.
    """
    if chat and not tokenizer.chat_template:
        raise PromptError(
            f"{path}: --chat was asked for, but the model's tokenizer has no chat template; use --raw"
        )
    if limits.tokens is not None and limits.tokens < 1:
        raise PromptError(f"{path}: no room for a prompt beside so many new tokens: lower --max-new-tokens")
    chat = bool(tokenizer.chat_template) if chat is None else chat
    reading = _Reading(
        path, tokenizer, ChatText(tokenizer, replies=replies) if chat else None, limits, skip_bad
    )
    if chat and reads_clock(tokenizer):
        reading.found.clock = clock or datetime.now()
    told = reading.found.clock
    with clock_at(tokenizer, told) if told else nullcontext():
        for place, record in read_records(path):
            reading.take(place, record)
            if not go_on():
                break
        return reading.end()


class _Reading:
    """One pass over a prompt file. Records are collected until there are enough to encode together."""

    def __init__(
        self, path: Path, tokenizer: Any, chat: ChatText | None, limits: Limits, skip_bad: bool
    ) -> None:
        self._path, self._tokenizer, self._limits, self._skip_bad = path, tokenizer, limits, skip_bad
        self._text = chat or RawText()
        self._raw = chat is None
        self._head = _head(tokenizer) if self._raw else np.zeros(0, np.int32)
        self._waiting: list[tuple[str, Rendered, bytes]] = []
        self._characters = 0
        self._notes: Counter[str] = Counter()
        self.found = PromptSet()

    def take(self, place: str, record: Any) -> None:
        """Take the next record, or the PromptError that reading it gave."""
        try:
            if isinstance(record, PromptError):
                raise record
            if not isinstance(record, dict):
                raise PromptError('not an object with "prompt" or "messages"')
            source = record_source(record)
            rendered = self._text.render(record)
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
        found = self.found
        if not len(found):
            raise PromptError(
                f"{self._path}: no usable prompt in it"
                + (
                    f" ({len(found.skipped)} skipped)"
                    if found.skipped
                    else ': write one per line, or JSON records with "prompt"'
                )
            )
        found.notes = [f"{count:,} of {len(found):,} prompts {what}" for what, count in self._notes.items()]
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
            self.found.add(own, source)
            self._notes.update(rendered.notes)
            if own is not ids:
                name = self._named(int(self._head[-1]))
                self._notes[f"begin with {name} themselves: it is not put before them again"] += 1

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
        if most is not None and len(ids) > most:
            raise PromptError(
                f"the prompt has {len(ids)} tokens, the limit is {most}: shorten it, or lower --max-new-tokens"
            )
        if vocabulary is not None and (highest := int(ids.max())) >= vocabulary:
            raise PromptError(
                f"token {highest} ({self._named(highest)}) has no row in the model's embedding, which has "
                f"{vocabulary:,}: leave it out, or resize the embedding"
            )

    def _named(self, token: int) -> str:
        return ascii(self._tokenizer.convert_ids_to_tokens(token))

    def _leave_out(self, place: str, error: PromptError) -> None:
        message = f"{self._path}, {place}: {error}"
        if not self._skip_bad:
            raise PromptError(f"{message} (--skip-bad leaves such records out)") from error
        self.found.skipped.append(message)


def _head(tokenizer: Any) -> np.ndarray:
    """int32: the ids that the tokenizer puts before every text: its BOS, if it has one."""
    try:
        bare, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    except Exception:  # it cannot encode "a": the prompts will show what it does
        return np.zeros(0, np.int32)
    for size in range(len(whole) - len(bare) + 1):
        if whole[size : size + len(bare)] == bare:
            return np.asarray(whole[:size], np.int32)
    return np.zeros(0, np.int32)
