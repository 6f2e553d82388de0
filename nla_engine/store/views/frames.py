"""Rows of a store as a table of pandas or polars. Each is imported only when it is asked for; neither is needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from nla_engine.errors import RequestError
from nla_engine.store.reader import StoreReader
from nla_engine.store.views.fields import RECORD, TEXT_FIELDS, record_names
from nla_engine.store.views.indexing import split_index

if TYPE_CHECKING:
    import pandas
    import polars

_USUAL = ("sequence", "position", "token", "next_token", "generated")


def pandas_frame(store: StoreReader, columns: Sequence[str] | None, rows: Any) -> pandas.DataFrame:
    """See `CaptureStore.to_pandas`."""
    pd = library("pandas")
    chosen = _numbers(store, rows)
    data = {name: _cells(store.column(name)[chosen]) for name in _names(store, columns)}
    return pd.DataFrame(data, index=pd.Index(chosen, name="row"))


def polars_frame(
    store: StoreReader, columns: Sequence[str] | None, rows: Any, lazy: bool
) -> polars.DataFrame | polars.LazyFrame:
    """See `CaptureStore.to_polars`."""
    pl = library("polars")
    names = ["row", *(name for name in _names(store, columns) if name != "row")]
    chosen = _numbers(store, rows)

    types = {name: _type(pl, store, name) for name in names}

    def frame(wanted: Sequence[str], part: np.ndarray) -> polars.DataFrame:
        return pl.DataFrame([_series(pl, name, store.column(name)[part], types[name]) for name in wanted])

    if not lazy:
        return frame(names, chosen)

    def read(
        wanted: list[str] | None, predicate: Any, most: int | None, batch: int | None
    ) -> Iterator[polars.DataFrame]:
        part = chosen if most is None else chosen[:most]
        size = batch or 1 << 16
        for start in range(0, max(len(part), 1), size):
            block = frame(wanted or names, part[start : start + size])
            yield block if predicate is None else block.filter(predicate)

    from polars.io.plugins import register_io_source

    return register_io_source(read, schema=pl.Schema(types))


def library(name: str) -> Any:
    """A library that is not always there. RequestError says how to get it."""
    try:
        return import_module(name)
    except ImportError as error:
        raise RequestError(f"a table of {name} needs {name}: pip install {name}") from error


def _names(store: StoreReader, columns: Sequence[str] | None) -> list[str]:
    if columns is None:
        norms = ["norm"] if len(store.sites) == 1 else [f"norm_{site}" for site in store.sites]
        return [*_USUAL, *norms, *record_names(store)]
    return [columns] if isinstance(columns, str) else list(columns)


def _numbers(store: StoreReader, rows: Any) -> np.ndarray:
    """The numbers of the chosen rows, int64 [n], from 0 on."""
    chosen, _, channels = split_index(slice(None) if rows is None else rows, store.rows)
    if channels:
        raise IndexError("rows are chosen by numbers, a slice or a mask")
    return np.arange(store.rows)[chosen] if isinstance(chosen, slice) else chosen


def _cells(values: np.ndarray) -> Any:
    """A value per row: of an array [n, K], the part [K] of each."""
    return list(values) if values.ndim > 1 else values


def _type(pl: Any, store: StoreReader, name: str) -> Any:
    """The type of a column in polars. Values of a record field that are of several types become text."""
    arrays = store.arrays("rows")
    if name in arrays:
        kind = pl.Series(np.empty(0, arrays[name].spec.dtype)).dtype
        return pl.Array(kind, arrays[name].spec.trailing[0]) if arrays[name].spec.trailing else kind
    if name in TEXT_FIELDS:
        return pl.String
    if not name.startswith(RECORD):
        return pl.Series(store.column(name)[:0]).dtype
    values = store.column(name)
    if values.dtype != object:
        return pl.Series(values[:0]).dtype
    kinds = {type(value) for value in values.tolist() if value is not None}
    return pl.Boolean if kinds == {bool} else pl.String


def _series(pl: Any, name: str, values: np.ndarray, kind: Any) -> Any:
    if values.dtype != object:
        return pl.Series(name, values, kind)
    if kind == pl.String:
        return pl.Series(name, [v if v is None else str(v) for v in values.tolist()], kind)
    return pl.Series(name, values.tolist(), kind)
