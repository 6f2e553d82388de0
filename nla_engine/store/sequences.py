"""The sequences of a store: their tokens and text, where their rows lie, and their prompt records."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nla_engine.engine.request import Finish
from nla_engine.errors import DamageError
from nla_engine.store.arrays import ArrayReader
from nla_engine.store.shown import facts_html, plural, shortened

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
#: Characters of a text that a line shows.
_SHOWN = 80
#: Sequences whose tokens and records are read at once.
BLOCK_SEQUENCES = 256
#: Sequences whose table entries are read at once: a shard of the table. A multiple of BLOCK_SEQUENCES.
TABLE_BLOCK = 4096


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
        """One token by itself: part of a character becomes U+FFFD."""
        return self.raw(token).decode(errors="replace")

    def join(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The text of consecutive tokens; characters that span tokens come out whole."""
        return b"".join(self.raw(int(token)) for token in tokens).decode(errors="replace")


@dataclass(frozen=True, repr=False)
class StoredSequence:
    """One sequence. tokens: int32 [t]; rows: its rows in the store. Its length is that of its tokens.

    source: the user's prompt record; record: the same as stored, UTF-8 JSON
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
        """The prompt and the generated text."""
        return self.vocabulary.join(self.tokens)

    def prompt_text(self) -> str:
        return self.vocabulary.join(self.tokens[: self.prompt_size])

    def generated_text(self) -> str:
        return self.vocabulary.join(self.tokens[self.prompt_size :])

    def __len__(self) -> int:
        return len(self.tokens)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The tokens."""
        return np.array(self.tokens, dtype) if copy else np.asarray(self.tokens, dtype)

    def __repr__(self) -> str:
        text = self.generated_text()
        said = f"generated {shortened(text, _SHOWN)!r}" if text else repr(shortened(self.text(), _SHOWN))
        return (
            f"<sequence {self.number}: {plural(len(self), 'token')}, {self.prompt_size:,} of the prompt, "
            f"{self._rows_in_words()}, finish {self.finish.name.lower()}: {said}>"
        )

    def _repr_html_(self) -> str:
        facts = {
            "tokens": f"{len(self):,}, {self.prompt_size:,} of the prompt",
            "rows": self._rows_in_words(),
            "finish": self.finish.name.lower(),
            "record": shortened(json.dumps(self.source, ensure_ascii=False), 10 * _SHOWN),
            "prompt": shortened(self.prompt_text(), 10 * _SHOWN),
            "generated": shortened(self.generated_text(), 10 * _SHOWN),
        }
        return facts_html(f"sequence {self.number}", facts)

    def _rows_in_words(self) -> str:
        return (
            f"rows {self.rows.start:,} to {self.rows.stop - 1:,}"
            if self.rows.stop > self.rows.start
            else "no rows"
        )


class SequenceTable:
    """The committed sequences, by number."""

    def __init__(self, arrays: Mapping[str, ArrayReader], vocabulary: Vocabulary) -> None:
        """arrays: those of the group `sequences`."""
        self._arrays = arrays
        self._vocabulary = vocabulary
        self._held: tuple[int, dict[str, np.ndarray]] = (-1, {})

    def __len__(self) -> int:
        return self._arrays["row_start"].length

    def row_sizes(self) -> np.ndarray:
        """Rows of each sequence, int64 [sequences]."""
        return self._arrays["row_size"].read()

    def read(self, start: int, stop: int) -> Iterator[StoredSequence]:
        """Sequences [start, stop), read a block at a time. Raises DamageError."""
        while start < stop:
            last = min((start // BLOCK_SEQUENCES + 1) * BLOCK_SEQUENCES, stop)
            yield from self._read_block(start, last)
            start = last

    def _columns(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """The table entries of sequences [start, stop), which lie in one block of the table.

        The last block read stays in memory.
        """
        block, held = self._held
        if block != start // TABLE_BLOCK:
            block = start // TABLE_BLOCK
            first, last = block * TABLE_BLOCK, min((block + 1) * TABLE_BLOCK, len(self))
            held = {name: self._arrays[name].read(first, last) for name in TABLE_COLUMNS}
            self._held = block, held
        first = block * TABLE_BLOCK
        return {name: values[start - first : stop - first] for name, values in held.items()}

    def _read_block(self, start: int, stop: int) -> Iterator[StoredSequence]:
        """Sequences [start, stop) of one block."""
        columns = self._columns(start, stop)
        tokens, source = (
            self._arrays[array].read(
                int(columns[f"{name}_start"][0]),
                int(columns[f"{name}_start"][-1] + columns[f"{name}_size"][-1]),
            )
            for array, name in (("tokens", "token"), ("source", "source"))
        )
        token_start, source_start = int(columns["token_start"][0]), int(columns["source_start"][0])
        for number in range(start, stop):
            values = {name: int(columns[name][number - start]) for name in TABLE_COLUMNS}
            begin = values["token_start"] - token_start
            place = values["source_start"] - source_start
            record = source[place : place + values["source_size"]].tobytes()
            try:
                parsed = json.loads(record)
                finish = Finish(values["finish"])
            except ValueError as error:
                raise DamageError(f"sequence {number} is damaged: {error}: run `nla-engine verify`") from None
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
