"""Rows of an imported file -> sequences: their tokens, places and records, as far as the file tells them.

Rows with the same number in a column `sequence` are one sequence, of that number; without the column each row is one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from nla_engine.errors import StoreError
from nla_engine.sites import Site
from nla_engine.store.exchange.next_tokens import next_token_columns, next_tokens_told
from nla_engine.store.exchange.record_columns import PREFIX
from nla_engine.store.format import NO_TOKEN, Finish, RowFlag, row_flags
from nla_engine.store.numbers import Numbers

#: The id of a token of which the file says nothing, if it names no ids at all.
UNKNOWN_TOKEN = 0
#: Columns that a store works out itself where the file numbers its sequences.
_OWN = {"row", "norm", "sequence", "position", "token_id", "next_token_id"} | {
    str(flag.name).lower() for flag in RowFlag
}
#: Column that names the part of a block, beside its number in activation_layer.
SITE = "activation_site"
_encode = json.JSONEncoder(ensure_ascii=False).encode


@dataclass(frozen=True)
class Batch:
    """Some rows of a file: vectors float32 [n, d], and the other columns of each row."""

    vectors: np.ndarray
    records: list[dict[str, Any]]


def whole_sequences(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The same rows, cut so that no sequence is in two batches."""
    held: list[Batch] = []
    for batch in batches:
        last = batch.records[-1]["sequence"] if batch.records else None
        cut = len(batch.records)
        while cut and batch.records[cut - 1]["sequence"] == last:
            cut -= 1
        if cut:
            yield _joined([*held, Batch(batch.vectors[:cut], batch.records[:cut])])
            held = []
        elif held and held[0].records[0]["sequence"] != last:
            yield _joined(held)
            held = []
        held.append(Batch(batch.vectors[cut:], batch.records[cut:]))
    if held:
        yield _joined(held)


def _joined(batches: list[Batch]) -> Batch:
    vectors = np.concatenate([batch.vectors for batch in batches])
    return Batch(vectors, [record for batch in batches for record in batch.records])


@dataclass(frozen=True)
class _Sequence:
    """record: JSON; tokens: int32 [t]; position: of its rows; prompt_size: tokens that were given."""

    record: bytes
    tokens: np.ndarray
    position: list[int]
    prompt_size: int


class FileRows:
    """The sequences of a file, batch by batch, for `StoreWriter.append_block`."""

    def __init__(self, first: dict[str, Any], site: Site, source: Path) -> None:
        """first: the first row, whose columns say what the file tells. site: that every row must be of."""
        self.numbered = "sequence" in first
        self._ids = "token_id" in first or "next_token_id" in first
        self._own = _OWN | {text for text in ("token", "next_token") if f"{text}_id" in first}
        self.next_token: int | None = None
        if self.numbered and {"next_logprob", "next_token_id"} <= first.keys():
            self.next_token = next_tokens_told(first)
            self._own |= {
                "next_logprob",
                *(("top_id", "top_token", "top_logprob") if self.next_token else ()),
            }
        self._site, self._source = site, source
        self._row, self._numbers = 0, Numbers()

    def columns(self, batch: Batch, norm: np.ndarray, sink_norm: float) -> dict[str, np.ndarray]:
        """norm: float32 [n], of the rows. StoreError if the columns contradict each other."""
        told = {}
        if self.next_token is not None:
            told = next_token_columns(batch.records, self.next_token, self._source, self._row)
        made: list[_Sequence] = []
        numbers: list[int] = []
        for number, group in self._groups(batch.records):
            made.append(self._sequence(group))
            numbers.append(number)
            self._row += len(group)
        size = np.array([len(each.tokens) for each in made], np.int64)
        rows = np.array([len(each.position) for each in made], np.int64)
        prompt = np.array([each.prompt_size for each in made], np.int32)
        position = np.array([place for each in made for place in each.position], np.int32)
        tokens = np.concatenate([each.tokens for each in made])
        owner = np.repeat(np.arange(len(made)), rows)
        place = (np.cumsum(size) - size)[owner] + position
        last = position == size[owner] - 1
        return {
            "number": np.array(numbers, np.int64),
            "row_size": rows,
            "token_size": size,
            "source_size": np.array([len(each.record) for each in made], np.int64),
            "prompt_size": prompt,
            "finish": np.full(len(made), Finish.GIVEN, np.uint8),
            "token_id": tokens[place],
            "next_token_id": np.where(last, NO_TOKEN, np.append(tokens, NO_TOKEN)[place + 1]).astype(
                np.int32
            ),
            "position": position,
            "flags": row_flags(position, prompt[owner], size[owner], norm > sink_norm, ~np.isfinite(norm)),
            "tokens": tokens,
            "source": np.frombuffer(b"".join(each.record for each in made), np.uint8),
            **told,
        }

    def _groups(self, records: list[dict[str, Any]]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """The rows of each sequence, and its number."""
        if not self.numbered:
            for record in records:
                yield self._row, [record]
            return
        for number, group in groupby(records, key=lambda record: record["sequence"]):
            if number in self._numbers:
                raise self._fault(
                    f"column 'sequence' is {number} again in row {self._row}: sort the file by sequence and position, "
                    "or rename the column"
                )
            self._numbers.add(np.array([number]))
            yield number, list(group)

    def _sequence(self, group: list[dict[str, Any]]) -> _Sequence:
        for record in group:
            own = self._site.layer, self._site.part
            other = record.get("activation_layer", own[0]), record.get(SITE, own[1])
            if other[0] != own[0]:
                raise self._fault(f"holds rows of layers {own[0]} and {other[0]}: split it by layer first")
            if other[1] != own[1]:
                raise self._fault(f"holds rows of {own[1]} and {other[1]}: split it by site first")
        position = [self._position(record) for record in group]
        if any(a >= b for a, b in pairwise(position)):
            raise self._fault(
                f"column 'position' does not ascend in sequence {group[0]['sequence']}: sort the file by sequence and "
                "position, or rename the column 'sequence'"
            )
        tokens = self._tokens(group, position)
        generated = [
            at for at, record in zip(position, group, strict=True) if record.get("generated") is True
        ]
        return _Sequence(
            _encode(self._record(group)).encode(),
            tokens,
            position,
            min(generated, default=len(tokens)),
        )

    def _position(self, record: dict[str, Any]) -> int:
        """From the position or n_raw_tokens; 0 if the row has neither."""
        size = record.get("n_raw_tokens", record.get("position", 0) + 1)
        if record.get("position", size - 1) != size - 1:
            raise self._fault(
                f"n_raw_tokens {size} and position {record['position']} contradict each other in a row: drop one column"
            )
        return int(size - 1)

    def _tokens(self, group: list[dict[str, Any]], position: list[int]) -> np.ndarray:
        """int32 [t]: what the rows say of them, else unknown."""
        follows = group[-1].get("next_token_id", NO_TOKEN) != NO_TOKEN
        tokens = np.full(position[-1] + 1 + follows, NO_TOKEN if self._ids else UNKNOWN_TOKEN, np.int32)
        for name, shift in (("token_id", 0), ("next_token_id", 1)):
            for at, record in zip(position, group, strict=True):
                told = record.get(name, NO_TOKEN)
                if told == NO_TOKEN:
                    continue
                if tokens[at + shift] not in (NO_TOKEN, told) and self._ids:
                    raise self._fault(
                        f"token_id and next_token_id contradict each other at position {at + shift} of sequence "
                        f"{group[0].get('sequence', self._row)}: drop one column"
                    )
                tokens[at + shift] = told
        return tokens

    def _record(self, group: list[dict[str, Any]]) -> dict[str, Any]:
        """The columns that are of the sequence: those that are not of rows, `record.KEY` as KEY."""
        kept = [
            {k: v for k, v in record.items() if not (self.numbered and k in self._own)} for record in group
        ]
        for other in kept[1:]:
            if other != kept[0]:
                name = next(name for name in kept[0] if other.get(name) != kept[0][name])
                raise self._fault(
                    f"column '{name}' differs between rows of sequence {group[0]['sequence']}, and a store keeps one "
                    "record per sequence: drop it, or rename 'sequence' to make each row a sequence of its own"
                )
        out: dict[str, Any] = {}
        for name, value in kept[0].items():
            if not name.startswith(PREFIX):
                out[name] = value
            elif value is not None:
                *above, key = name.removeprefix(PREFIX).split(".")
                inner = out
                for step in above:
                    inner = inner.setdefault(step, {})
                    if not isinstance(inner, dict):
                        raise self._fault(f"column '{name}' is inside another one: rename it")
                inner[key] = value
        return out

    def _fault(self, message: str) -> StoreError:
        return StoreError(f"{self._source}: {message}")
