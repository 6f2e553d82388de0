"""The vectors of one layer, read back as float32.

Knows nothing of sequences or tokens: rows are numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from nla_engine.codec import Codec
from nla_engine.store.arrays import ArrayReader
from nla_engine.store.records import LayerRows

if TYPE_CHECKING:
    import torch

Rows = int | slice | Sequence[int] | np.ndarray


class LayerReader:
    """layer[a:b], layer[[3, 1, 3]] and layer[mask] are float32 [n, d]; layer[i] is float32 [d].

    Rows that are kept exactly (sinks, NaN, Inf) come back exactly to bfloat16. Reads raise StoreError on
    damaged bytes and IndexError on rows that are not committed.
    """

    def __init__(self, codec: Codec, arrays: Mapping[str, ArrayReader]) -> None:
        """arrays: codes, scales (not for bf16), norm, exact_row, exact."""
        self.codec = codec
        self._arrays = arrays

    def __len__(self) -> int:
        return self._arrays["norm"].length

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, d_model)"""
        return len(self), self.codec.d_model

    def __getitem__(self, rows: Rows) -> np.ndarray:
        if isinstance(rows, int | np.integer):
            return self.encoded_at(np.array([rows])).decode(self.codec)[0]
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            if step == 1:
                return self.encoded(start, max(start, stop)).decode(self.codec)
            rows = np.arange(start, stop, step)
        return self.encoded_at(rows).decode(self.codec)

    def encoded(self, start: int = 0, stop: int | None = None) -> LayerRows:
        """Rows [start, stop) as stored, for decoding elsewhere (on a GPU, say)."""
        stop = len(self) if stop is None else stop
        codes = self._arrays["codes"].read(start, stop)
        scales = (
            self._arrays["scales"].read(start, stop) if "scales" in self._arrays else _no_scales(stop - start)
        )
        first, last = np.searchsorted(self.exact_row, [start, stop])
        exact = self._arrays["exact"].read(int(first), int(last))
        return LayerRows(codes, scales, self.norm(start, stop), self.exact_row[first:last] - start, exact)

    def encoded_at(self, rows: Sequence[int] | np.ndarray) -> LayerRows:
        """Rows by number (any order, repeats and negative numbers allowed) or by mask [len], as stored."""
        numbers = self._row_numbers(rows)
        codes = self._arrays["codes"].take(numbers)
        scales = (
            self._arrays["scales"].take(numbers) if "scales" in self._arrays else _no_scales(len(numbers))
        )
        where = np.searchsorted(self.exact_row, numbers)
        index = np.flatnonzero(np.append(self.exact_row, -1)[where] == numbers)
        exact = self._arrays["exact"].take(where[index])
        return LayerRows(codes, scales, self._arrays["norm"].take(numbers), index, exact)

    def norm(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Exact L2 norms, float32 [stop - start]."""
        return self._arrays["norm"].read(start, stop)

    def torch(self, rows: Rows, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The same as layer[rows], as a tensor (float32 unless dtype is given)."""
        import torch

        return torch.from_numpy(self[rows]).to(device=device, dtype=dtype)

    @cached_property
    def exact_row(self) -> np.ndarray:
        """int64 [M], ascending: rows that are kept exactly."""
        return self._arrays["exact_row"].read()

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
