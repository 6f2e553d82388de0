"""Prompt files -> token ids, with the user's own records kept untouched beside them.

JSON lines or Parquet ({"prompt": ...} or {"messages": [...]}, any other fields), or plain text (a prompt a line).
Knows tokenizers, not models: length limits are given to it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nla_engine.errors import PromptError


@dataclass(frozen=True)
class Prompt:
    """One encoded prompt. token_ids: what the model reads; source: the user's record as UTF-8 JSON."""

    token_ids: tuple[int, ...]
    source: bytes


@dataclass(frozen=True)
class PromptSet:
    """Every usable prompt of a file, in file order, and why the others were skipped."""

    prompts: list[Prompt]
    skipped: list[str]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def longest(self) -> int:
        return max(len(prompt.token_ids) for prompt in self.prompts)

    def common_prefix(self) -> int:
        """How many leading tokens all prompts share, at most all but the last token of the shortest."""
        first, *others = (prompt.token_ids for prompt in self.prompts)
        size = min(len(prompt.token_ids) for prompt in self.prompts) - 1
        for ids in others:
            while first[:size] != ids[:size]:
                size = next(i for i in range(size) if first[i] != ids[i])
        return size if others else 0


def read_prompts(
    path: Path,
    tokenizer: Any,
    *,
    chat: bool | None = None,
    max_tokens: int | None = None,
    skip_bad: bool = False,
) -> PromptSet:
    """Read and encode a prompt file.

    chat: render through the chat template (True), take the text as it is (False), or the first if there is one (None).
    max_tokens: longest prompt allowed. skip_bad: count unusable records instead of raising.
    Raises PromptError for a file that is missing, empty or unreadable, and for the first unusable record.
    """
    if chat and not tokenizer.chat_template:
        raise PromptError(
            f"{path}: --chat was asked for, but the model's tokenizer has no chat template; use --raw"
        )
    if max_tokens is not None and max_tokens < 1:
        raise PromptError(f"{path}: no prompt fits beside so many new tokens: lower --max-new-tokens")
    chat = bool(tokenizer.chat_template) if chat is None else chat
    prompts, skipped = [], []
    for place, record in _records(path):
        try:
            prompts.append(_encode(record, tokenizer, chat, max_tokens))
        except PromptError as error:
            message = f"{path}, {place}: {error}"
            if not skip_bad:
                raise PromptError(f"{message} (--skip-bad leaves such records out)") from error
            skipped.append(message)
    if not prompts:
        raise PromptError(
            f"{path}: no usable prompt in it"
            + (
                f" ({len(skipped)} skipped)"
                if skipped
                else ': write one a line, or JSON records with "prompt"'
            )
        )
    return PromptSet(prompts, skipped)


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """(where it stands, record or the PromptError that reading it gave) of every record."""
    if not path.is_file():
        what = "a directory" if path.is_dir() else "no such file"
        raise PromptError(f"{path}: {what}: give .jsonl, .parquet or text with a prompt a line")
    if path.suffix == ".parquet":
        yield from _parquet_records(path)
        return
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{path}: cannot be read as UTF-8 text ({error}): convert it") from error
    for number, line in enumerate(lines, 1):
        line = line.removesuffix("\r")
        if not line.strip():
            continue
        if path.suffix not in (".jsonl", ".json", ".ndjson"):
            yield f"line {number}", {"prompt": line}
            continue
        try:
            yield f"line {number}", json.loads(line)
        except json.JSONDecodeError as error:
            message = f"not JSON, one object a line ({error.msg} at column {error.colno})"
            yield f"line {number}", PromptError(message)


def _parquet_records(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(1024):
                for record in batch.to_pylist():
                    number += 1
                    yield f"row {number}", {key: value for key, value in record.items() if value is not None}
    except (OSError, pa.ArrowException) as error:
        raise PromptError(f"{path}: cannot be read as Parquet ({error})") from error


def _encode(record: Any, tokenizer: Any, chat: bool, max_tokens: int | None) -> Prompt:
    if isinstance(record, PromptError):
        raise record
    if not isinstance(record, dict):
        raise PromptError('not an object with "prompt" or "messages"')
    text = _text(record, tokenizer, chat)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError("the text holds half of a surrogate pair, which is no character") from error
    ids = tokenizer.encode(text, add_special_tokens=not chat)
    if not ids:
        raise PromptError("the prompt is empty")
    if max_tokens is not None and len(ids) > max_tokens:
        raise PromptError(
            f"the prompt has {len(ids)} tokens, the limit is {max_tokens}: shorten it, or lower --max-new-tokens"
        )
    try:
        source = json.dumps(record, ensure_ascii=False, allow_nan=False, default=_json_value).encode()
    except (ValueError, TypeError) as error:
        raise PromptError(f"the record cannot be kept as JSON ({error})") from error
    return Prompt(tuple(ids), source)


def _text(record: dict[str, Any], tokenizer: Any, chat: bool) -> str:
    if "messages" in record and "prompt" in record:
        raise PromptError('has "prompt" and "messages": leave one out')
    if "messages" in record:
        messages = record["messages"]
        if not chat:
            raise PromptError('"messages" needs a chat template: use --chat with a chat model')
        if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
            raise PromptError('"messages" is not a list of {"role", "content"} objects')
    elif "prompt" in record:
        if not isinstance(record["prompt"], str):
            raise PromptError('"prompt" is not a text')
        if not record["prompt"]:
            raise PromptError("the prompt is empty")
        if not chat:
            return record["prompt"]
        messages = [{"role": "user", "content": record["prompt"]}]
    else:
        raise PromptError('no field "prompt" or "messages"')
    # Rendered to text and then encoded without special tokens: the template already holds them.
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates raise whatever they like
        raise PromptError(f"the chat template refuses it ({error})") from error
    return text


def _json_value(value: Any) -> Any:
    if hasattr(value, "isoformat"):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} is not a JSON value")


def prompts_fingerprint(prompts: Sequence[Prompt]) -> str:
    """sha256 over the token ids and the record of every prompt, in order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        sizes = (len(prompt.token_ids), len(prompt.source))
        digest.update(np.asarray((*sizes, *prompt.token_ids), np.int64).tobytes() + prompt.source)
    return digest.hexdigest()[:16]
