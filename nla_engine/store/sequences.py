"""The sequences of a store: their tokens, what these say, where their rows lie, which record they came from.

Knows nothing of vectors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from nla_engine.engine.request import Finish
from nla_engine.errors import DamageError
from nla_engine.store.arrays import ArrayReader

TABLE_COLUMNS = (
    "row_start",
    "row_size",
    "prompt_size",
    "finish",
    "token_start",
    "token_size",
    "source_start",
    "source_size",
)
BLOCK_SEQUENCES = 256


class Vocabulary:
    """The bytes of every token's text."""

    def __init__(self, text: np.ndarray, start: np.ndarray) -> None:
        """text: uint8 [bytes]; start: int64 [V + 1], token i is text[start[i]:start[i + 1]]."""
        self._text = text.tobytes()
        self._start = start.tolist()

    def __len__(self) -> int:
        return len(self._start) - 1

    def fingerprint(self) -> str:
        """sha256 over every token's text."""
        boundaries = np.asarray(self._start, "<i8").tobytes()
        return hashlib.sha256(boundaries + self._text).hexdigest()[:16]

    def raw(self, token: int) -> bytes:
        """Empty for -1 (no token) and for ids that the vocabulary does not name."""
        return self._text[self._start[token] : self._start[token + 1]] if 0 <= token < len(self) else b""

    def text(self, token: int) -> str:
        """One token on its own: a part of a character shows as U+FFFD."""
        return self.raw(token).decode(errors="replace")

    def join(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The text of tokens in a row; characters that span tokens come out whole."""
        return b"".join(self.raw(int(token)) for token in tokens).decode(errors="replace")


@dataclass(frozen=True)
class StoredSequence:
    """One sequence. tokens: int32 [t]; rows: its rows in the store.

    source: the user's prompt record; record: the same as it is stored, UTF-8 JSON
    """

    number: int
    tokens: np.ndarray
    prompt_size: int
    finish: Finish
    rows: slice
    source: Any
    record: bytes
    vocabulary: Vocabulary

    def text(self) -> str:
        """Prompt and what was generated."""
        return self.vocabulary.join(self.tokens)

    def prompt_text(self) -> str:
        return self.vocabulary.join(self.tokens[: self.prompt_size])

    def generated_text(self) -> str:
        return self.vocabulary.join(self.tokens[self.prompt_size :])


class SequenceTable:
    """The committed sequences, by number."""

    def __init__(self, arrays: Mapping[str, ArrayReader], vocabulary: Vocabulary) -> None:
        """arrays: those of the group `sequences`."""
        self._arrays = arrays
        self._vocabulary = vocabulary

    def __len__(self) -> int:
        return self._arrays["row_start"].length

    @cached_property
    def columns(self) -> dict[str, np.ndarray]:
        """Every array that has one value for each sequence."""
        return {name: self._arrays[name].read() for name in TABLE_COLUMNS}

    def read(self, start: int, stop: int) -> Iterator[StoredSequence]:
        """Sequences [start, stop), read a block at a time. Raises DamageError."""
        columns = self.columns
        for first in range(start, stop, BLOCK_SEQUENCES):
            last = min(first + BLOCK_SEQUENCES, stop) - 1
            tokens, token_start = self._ragged("tokens", "token", first, last)
            source, source_start = self._ragged("source", "source", first, last)
            for number in range(first, last + 1):
                values = {name: int(columns[name][number]) for name in TABLE_COLUMNS}
                begin = values["token_start"] - token_start
                place = values["source_start"] - source_start
                record = source[place : place + values["source_size"]].tobytes()
                try:
                    parsed = json.loads(record)
                    finish = Finish(values["finish"])
                except ValueError as error:
                    raise DamageError(
                        f"sequence {number} is damaged: {error}: run `nla-engine verify`"
                    ) from None
                yield StoredSequence(
                    number,
                    tokens[begin : begin + values["token_size"]],
                    values["prompt_size"],
                    finish,
                    slice(values["row_start"], values["row_start"] + values["row_size"]),
                    parsed,
                    record,
                    self._vocabulary,
                )

    def _ragged(self, array: str, prefix: str, first: int, last: int) -> tuple[np.ndarray, int]:
        """The flat values of sequences first..last, and where in the array they start."""
        starts, sizes = self.columns[f"{prefix}_start"], self.columns[f"{prefix}_size"]
        start, stop = int(starts[first]), int(starts[last] + sizes[last])
        return self._arrays[array].read(start, stop), start
