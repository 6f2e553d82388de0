"""The vectors of one layer as stored: codes, scales, norms, and the rows that are kept exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from nla_engine.codec.rows import Codec
from nla_engine.store.arrays import ArrayReader
from nla_engine.store.records import LayerRows


class StoredLayer:
    """Encoded rows of one layer. Raises StoreError for damaged bytes, IndexError for rows that are not committed."""

    def __init__(self, codec: Codec, arrays: Mapping[str, ArrayReader]) -> None:
        """arrays: codes, scales (not for bf16), norm, exact_row, exact."""
        self.codec = codec
        self.arrays = arrays

    def __len__(self) -> int:
        return self.arrays["norm"].length

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, d_model)"""
        return len(self), self.codec.d_model

    def encoded_any(self, rows: slice | Sequence[int] | np.ndarray) -> LayerRows:
        """Rows by slice, numbers or mask, as stored."""
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            if step == 1:
                return self.encoded(start, max(start, stop))
            rows = np.arange(start, stop, step)
        return self.encoded_at(rows)

    def encoded(self, start: int = 0, stop: int | None = None) -> LayerRows:
        """Rows [start, stop) as stored, for decoding elsewhere (on a GPU, say)."""
        stop = len(self) if stop is None else stop
        codes = self.arrays["codes"].read(start, stop)
        scales = (
            self.arrays["scales"].read(start, stop) if "scales" in self.arrays else _no_scales(stop - start)
        )
        return LayerRows(codes, scales, self.norm(start, stop), *self.exact_between(start, stop))

    def encoded_at(self, rows: Sequence[int] | np.ndarray) -> LayerRows:
        """Rows by number (any order, repeats and negative numbers allowed) or by mask [len], as stored."""
        numbers = self._row_numbers(rows)
        codes = self.arrays["codes"].take(numbers)
        scales = self.arrays["scales"].take(numbers) if "scales" in self.arrays else _no_scales(len(numbers))
        where = np.searchsorted(self.exact_row, numbers)
        index = np.flatnonzero(np.append(self.exact_row, -1)[where] == numbers)
        exact = self.arrays["exact"].take(where[index])
        return LayerRows(codes, scales, self.arrays["norm"].take(numbers), index, exact)

    def norm(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Exact L2 norms, float32 [stop - start]."""
        return self.arrays["norm"].read(start, stop)

    @property
    def shard_rows(self) -> int:
        """Rows per shard of codes."""
        return self.arrays["codes"].spec.shard_rows

    def exact_between(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The exact rows of [start, stop): places int64 [m], counted from start, and bfloat16 bits uint16 [m, d]."""
        first, last = np.searchsorted(self.exact_row, [start, stop])
        return self.exact_row[first:last] - start, self.arrays["exact"].read(int(first), int(last))

    def norm_at(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Exact L2 norms of rows by number or mask, float32 [n]."""
        return self.arrays["norm"].take(self._row_numbers(rows))

    @cached_property
    def exact_row(self) -> np.ndarray:
        """int64 [M], ascending: rows that are kept exactly."""
        return self.arrays["exact_row"].read()

    def _row_numbers(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        array, n = np.asarray(rows), len(self)
        if array.ndim != 1:
            raise IndexError(f"rows must be a list of numbers or a mask, not an array of shape {array.shape}")
        if array.dtype == bool:
            if len(array) != n:
                raise IndexError(f"a mask of {len(array)} rows does not fit a layer of {n}")
            return np.flatnonzero(array)
        if array.size and array.dtype.kind not in "iu":
            raise IndexError(f"rows must be integers or booleans, not {array.dtype}")
        numbers = array.astype(np.int64)
        if array.size and not -n <= numbers.min() <= numbers.max() < n:
            raise IndexError(f"rows {numbers.min()} to {numbers.max()} reach outside a layer of {n} rows")
        return np.where(numbers < 0, numbers + n, numbers)


def _no_scales(rows: int) -> np.ndarray:
    return np.empty((rows, 0), np.float16)
