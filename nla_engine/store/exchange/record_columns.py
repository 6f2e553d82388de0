"""The fields of prompt records as typed columns of a table, with the names that `--where` uses: `record.topic`.

An object becomes a column for each of its fields, `record.source.page`. Values of several kinds in one column, lists,
and integers beyond 64 bits become JSON text, and the column says so in its metadata.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from nla_engine.store.reader import StoreReader

if TYPE_CHECKING:
    import pyarrow as pa

PREFIX = "record."
#: Metadata of a column whose text is JSON.
JSON_TEXT = {b"nla_engine": b"json"}


class RecordColumns:
    """The columns of some sequences of a store. fields: name and type of each, in the order of appearance."""

    def __init__(self, store: StoreReader, sequences: np.ndarray) -> None:
        """sequences: int [n], their numbers, in any order and repeated or not. Reads their records once."""
        import pyarrow as pa

        self._store = store
        kinds: dict[str, set[str]] = {}
        self._given: dict[str, int] = {}
        numbers, _ = _distinct(sequences)
        for sequence in store.some_sequences(numbers):
            for name, value in _leaves(sequence.source):
                kinds.setdefault(name, set())
                if value is not None:
                    kinds[name].add(_kind(value))
                    self._given[name] = self._given.get(name, 0) + 1
        self._sequences = len(numbers)
        types = {"bool": pa.bool_(), "int64": pa.int64(), "float64": pa.float64(), "string": pa.string()}
        self.fields: list[pa.Field] = []
        for name, found in kinds.items():
            one = (
                "float64" if found == {"int53", "float64"} else "int64" if found <= {"int53", "int64"} else ""
            )
            one = next(iter(found)) if len(found) == 1 and not one else one
            if one in types and found:
                self.fields.append(pa.field(PREFIX + name, types[one]))
            else:
                self.fields.append(pa.field(PREFIX + name, pa.string(), metadata=JSON_TEXT))

    def is_whole(self, field: pa.Field) -> bool:
        """Whether every record has a value in a column."""
        return self._given.get(field.name.removeprefix(PREFIX), 0) == self._sequences

    def arrays(self, sequences: np.ndarray) -> list[pa.Array]:
        """The value of each column for each of these sequences, int [n]; null where a record has none."""
        import pyarrow as pa

        numbers, index = _distinct(sequences)
        records = [dict(_leaves(sequence.source)) for sequence in self._store.some_sequences(numbers)]
        columns = []
        for field in self.fields:
            values = [record.get(field.name.removeprefix(PREFIX)) for record in records]
            if field.metadata:
                values = [v if v is None else json.dumps(v, ensure_ascii=False) for v in values]
            columns.append(pa.array(values, field.type).take(pa.array(index)))
        return columns


def _distinct(sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different numbers, ascending, and which of them each is, int64 [n]. Rows of a sequence mostly follow each
    other, so only the first of each run is sorted."""
    first = np.flatnonzero(np.append(True, sequences[1:] != sequences[:-1])[: len(sequences)])
    numbers, index = np.unique(sequences[first], return_inverse=True)
    return numbers, np.repeat(index, np.diff(first, append=len(sequences)))


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a record, with the names that lead to them. An object with a point in a key stays whole."""
    if not isinstance(value, dict) or (name and (not value or any("." in key for key in value))):
        if name:
            yield name, value
        return
    for key, inner in value.items():
        yield from _leaves(inner, f"{name}.{key}" if name else key)


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int53" if abs(value) <= 1 << 53 else "int64" if -(1 << 63) <= value < 1 << 63 else "json"
    return {float: "float64", str: "string"}.get(type(value), "json")
