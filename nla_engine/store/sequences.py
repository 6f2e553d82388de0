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
#: Sequences whose table entries are read at once: a shard of the table.
TABLE_BLOCK = 4096
#: Blocks of the table that are kept in memory.
_BLOCKS_HELD = 16
#: Sequences with fewer others between them, as stored, are read together.
_GAP = 8


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
    """The committed sequences, by number. They are stored in any order."""

    def __init__(self, arrays: Mapping[str, ArrayReader], vocabulary: Vocabulary) -> None:
        """arrays: those of the group `sequences`."""
        self._arrays = arrays
        self._vocabulary = vocabulary
        self._held: dict[int, dict[str, np.ndarray]] = {}
        self._order: tuple[np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return self._arrays["row_start"].length

    def row_sizes(self) -> np.ndarray:
        """Rows of each sequence as stored, int64 [sequences]."""
        return self._arrays["row_size"].read()

    @property
    def numbers(self) -> np.ndarray:
        """Of every sequence, int64 [sequences], ascending."""
        return self._sorted[0]

    @property
    def _sorted(self) -> tuple[np.ndarray, np.ndarray]:
        """The numbers, ascending, and the place of each as stored. Stores of format version 1 hold them in order."""
        if self._order is None:
            numbers = self._arrays["number"].read() if "number" in self._arrays else np.arange(len(self))
            place = np.argsort(numbers, kind="stable")
            self._order = numbers[place], place
        return self._order

    def read(self, wanted: np.ndarray) -> Iterator[StoredSequence]:
        """The sequences with these numbers, int64 [n], in their order. Raises IndexError, DamageError."""
        numbers, places = self._sorted
        found = np.searchsorted(numbers, wanted)
        there = numbers[np.minimum(found, len(numbers) - 1)] == wanted if len(numbers) else wanted < wanted
        if not there.all():
            raise IndexError(f"sequence {wanted[np.argmin(there)]} is not among the {len(self)} of the store")
        for start in range(0, len(wanted), BLOCK_SEQUENCES):
            part = slice(start, start + BLOCK_SEQUENCES)
            yield from self._read_block(wanted[part], places[found[part]])

    def _read_block(self, numbers: np.ndarray, places: np.ndarray) -> Iterator[StoredSequence]:
        """The sequences with these numbers, stored at these places: int64 [n], int64 [n], some hundreds."""
        known = dict(zip(places.tolist(), numbers.tolist(), strict=True))
        near = np.unique(places)
        apart = (np.diff(near) > _GAP) | (np.diff(near // TABLE_BLOCK) != 0)
        read: dict[int, StoredSequence] = {}
        for group in np.split(near, np.flatnonzero(apart) + 1):
            if len(group):
                read.update(self._read_near({place: known[place] for place in group.tolist()}))
        for place in places.tolist():
            yield read[place]

    def _columns(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """The table entries of the sequences stored at [start, stop), which lie in one block of the table.

        The last blocks read stay in memory.
        """
        block = start // TABLE_BLOCK
        first = block * TABLE_BLOCK
        if (held := self._held.pop(block, None)) is None:
            last = min(first + TABLE_BLOCK, len(self))
            held = {name: self._arrays[name].read(first, last) for name in TABLE_COLUMNS}
            while len(self._held) >= _BLOCKS_HELD:
                del self._held[next(iter(self._held))]
        self._held[block] = held
        return {name: values[start - first : stop - first] for name, values in held.items()}

    def _read_near(self, wanted: Mapping[int, int]) -> Iterator[tuple[int, StoredSequence]]:
        """Sequences of one block of the table that are stored near each other, each with its place.

        wanted: the number of each by place, ascending
        """
        start, stop = min(wanted), max(wanted) + 1
        columns = self._columns(start, stop)
        tokens, source = (
            self._arrays[array].read(
                int(columns[f"{name}_start"][0]),
                int(columns[f"{name}_start"][-1] + columns[f"{name}_size"][-1]),
            )
            for array, name in (("tokens", "token"), ("source", "source"))
        )
        token_start, source_start = int(columns["token_start"][0]), int(columns["source_start"][0])
        for place, number in wanted.items():
            values = {name: int(columns[name][place - start]) for name in TABLE_COLUMNS}
            begin = values["token_start"] - token_start
            first = values["source_start"] - source_start
            record = source[first : first + values["source_size"]].tobytes()
            try:
                parsed = json.loads(record)
                finish = Finish(values["finish"])
            except ValueError as error:
                raise DamageError(f"sequence {number} is damaged: {error}: run `nla-engine verify`") from None
            yield (
                place,
                StoredSequence(
                    number,
                    tokens[begin : begin + values["token_size"]],
                    values["prompt_size"],
                    finish,
                    slice(values["row_start"], values["row_start"] + values["row_size"]),
                    parsed,
                    record,
                    self._vocabulary,
                ),
            )
