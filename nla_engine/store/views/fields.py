"""The fields of rows by name: one list for `--where`, for `CaptureStore.column` and for tables of rows.

A field is an array with a value per row, or labels: values from a list, and which of them each row has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from nla_engine.errors import FieldError, RecordFieldError
from nla_engine.sites import Site
from nla_engine.store.format import NO_TOKEN, RowFlag, flagged
from nla_engine.store.reader import StoreReader

#: Fields with the text of a token -> the column with its id.
TEXT_FIELDS = {"token": "token_id", "next_token": "next_token_id"}
TRUTH_FIELDS = tuple(str(flag.name).lower() for flag in RowFlag)
#: Before the name of a field of the prompt records.
RECORD = "record."
#: Value of a record that lacks the field.
MISSING = object()
#: Most keys that an error lists.
_LISTED = 20
#: Most records that are searched for a name that is no field.
_SEARCHED = 1000


@dataclass(frozen=True)
class Labels:
    """A value for each row, from a list: values[index[row]]. kind: "text" or "record"."""

    kind: str
    index: np.ndarray
    values: Sequence[Any]

    def spread(self) -> np.ndarray:
        """The value of each row: bool, int64 or float64 (NaN where a record has none), else objects (None)."""
        return _typed(self.values)[self.index]


def field_names(store: StoreReader) -> list[str]:
    """Every name but those of the prompt records, in the order of documentation and errors."""
    norms = [f"norm_{site}" for site in store.sites]
    return [*TEXT_FIELDS, *_numbers(store), "row", "norm", *norms, "prompt", *TRUTH_FIELDS]


def record_names(store: StoreReader) -> list[str]:
    """`record.KEY` and `record.KEY.KEY` of every scalar in the prompt records, in order of appearance."""
    found: dict[str, None] = {}
    for sequence in store.iter_sequences():
        found.update(dict.fromkeys(_scalars(sequence.source, RECORD)))
    return list(found)


def row_field(store: StoreReader, name: str, first: int = 0) -> np.ndarray | Labels:
    """A field of the rows from number `first` on. Rows before are not read.

    Raises FieldError for an unknown name, and RecordFieldError if no record has the field; with first > 0 the records
    before may have it.
    """

    def column(array: str) -> np.ndarray:
        return store.arrays("rows")[array].read(first) if first else StoreReader.column(store, array)

    if name in TEXT_FIELDS:
        return token_labels(store, column(TEXT_FIELDS[name]))
    if name in _numbers(store):
        return column(name)
    if name == "row":
        return np.arange(first, store.rows)
    if name == "prompt":
        return ~flagged(column("flags"), RowFlag.GENERATED)
    if name in TRUTH_FIELDS:
        return flagged(column("flags"), RowFlag[name.upper()])
    if name == "norm":
        return store.layer(store.layers[0] if store.layers else store.sites[0]).norm(first)
    if name in {f"norm_{site}" for site in store.sites}:
        return store.layer(Site.parse(name.removeprefix("norm_"))).norm(first)
    if name.startswith(RECORD):
        return _record_field(store, name.removeprefix(RECORD), column("sequence"), first)
    meant = f" (did you mean {RECORD}{name}?)" if _in_records(store, name) else ""
    raise FieldError(f"there is no field '{name}'{meant}")


def token_labels(store: StoreReader, ids: np.ndarray) -> Labels:
    """The texts of tokens, int32 [n]: each different text once, and which of them each token has."""
    lowest, highest = int(ids.min(initial=NO_TOKEN)), int(ids.max(initial=NO_TOKEN))
    if lowest < NO_TOKEN or highest > len(store.vocabulary):  # damaged, or the vocabulary is not known
        known, index = np.unique(ids, return_inverse=True)
        return Labels("text", index, store.token_text(known))
    # Ids are few and small: a table of them finds the different ones without sorting all.
    there = np.zeros(highest - NO_TOKEN + 1, bool)
    places = ids - NO_TOKEN
    there[places] = True
    order = np.cumsum(there, dtype=np.int32) - 1
    return Labels("text", order[places], store.token_text(np.flatnonzero(there) + NO_TOKEN))


def _in_records(store: StoreReader, name: str) -> bool:
    """Whether one of the first records has a field of this name. An error asks, so not all are read."""
    sources = (sequence.source for sequence in islice(store.iter_sequences(), _SEARCHED))
    key = name.split(".")[0]
    return any(isinstance(source, dict) and key in source for source in sources)


def _numbers(store: StoreReader) -> list[str]:
    """Arrays of the group `rows` with a number per row."""
    return [name for name, array in store.arrays("rows").items() if not array.spec.trailing]


def _record_field(store: StoreReader, name: str, sequence: np.ndarray, first: int) -> Labels:
    """sequence: of each row from `first` on."""
    values: list[Any] = []
    known: set[str] = set()
    numbers = (
        np.unique(sequence) if first else store.numbers
    )  # sequences without rows may also have the field
    for each in store.some_sequences(numbers):
        value = each.source
        for key in name.split("."):
            known.update(value if isinstance(value, dict) else ())
            value = value.get(key, MISSING) if isinstance(value, dict) else MISSING
        values.append(value)
    if values and not first and all(value is MISSING for value in values):
        shown = ", ".join(sorted(known)[:_LISTED]) or "none"
        raise RecordFieldError(f"no prompt record has '{name}' (keys seen: {shown})")
    return Labels("record", np.searchsorted(numbers, sequence), values)


def _scalars(source: Any, prefix: str) -> Iterator[str]:
    """Names of the scalars in a record. A key with a point in it has no name."""
    if not isinstance(source, dict):
        return
    for key, value in source.items():
        if "." in key:
            continue
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{key}.")
        elif isinstance(value, str | bool | int | float):
            yield prefix + key


def _typed(values: Sequence[Any]) -> np.ndarray:
    """The values as an array of the narrowest type that keeps every one of them."""
    given = [None if value is MISSING else value for value in values]
    present = [value for value in given if value is not None]
    complete = len(present) == len(given)
    if present and complete and all(isinstance(value, bool) for value in present):
        return np.array(given, bool)
    if present and all(isinstance(v, int | float) and not isinstance(v, bool) for v in present):
        whole = all(isinstance(value, int) for value in present)
        if whole and complete and all(-(1 << 63) <= value < 1 << 63 for value in present):
            return np.array(given, np.int64)
        if all(isinstance(value, float) or abs(value) <= 1 << 53 for value in present):
            return np.array([np.nan if value is None else value for value in given], np.float64)
    out = np.empty(len(given), object)
    out[:] = given
    return out
