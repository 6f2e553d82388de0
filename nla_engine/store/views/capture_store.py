"""A store as users see it: vectors come decoded, and an expression can select rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from nla_engine.store.layer import StoredLayer
from nla_engine.store.reader import StoreReader
from nla_engine.store.views.where import select_rows

if TYPE_CHECKING:
    from torch import Tensor
    from torch import device as Device
    from torch import dtype as DType

Rows = int | slice | Sequence[int] | np.ndarray


class LayerReader(StoredLayer):
    """layer[a:b], layer[[3, 1, 3]] and layer[mask] are float32 [n, d]; layer[i] is float32 [d].

    Rows that are kept exactly (sinks, NaN, Inf) come back bit-exact in bfloat16. Reads raise StoreError for
    damaged bytes and IndexError for rows that are not committed.
    """

    def __getitem__(self, rows: Rows) -> np.ndarray:
        if isinstance(rows, int | np.integer):
            return self.encoded_at(np.array([rows])).decode(self.codec)[0]
        return self.encoded_any(rows).decode(self.codec)

    def torch(self, rows: Rows, device: Device | str = "cpu", dtype: DType | None = None) -> Tensor:
        """layer[rows] as a tensor, decoded on `device`: float32 (None), bfloat16 or float16."""
        from nla_engine.store.views.tensors import decode_tensor

        if isinstance(rows, int | np.integer):
            return decode_tensor(self.encoded_at([int(rows)]), self.codec, device, dtype)[0]
        return decode_tensor(self.encoded_any(rows), self.codec, device, dtype)

    def tensors(
        self,
        start: int = 0,
        stop: int | None = None,
        *,
        device: Device | str = "cpu",
        dtype: DType | None = None,
        threads: int = 0,
    ) -> Iterator[tuple[int, Tensor]]:
        """Rows [start, stop) in bulk, one block at a time: see `nla_engine.store.views.tensors.block_tensors`."""
        from nla_engine.store.views.tensors import block_tensors

        return block_tensors(self, start, stop, device=device, dtype=dtype, threads=threads)


class CaptureStore(StoreReader):
    """The committed rows and sequences of a store. Open one with `CaptureStore.open`."""

    def layer(self, number: int) -> LayerReader:
        """The vectors of one layer. StoreError if it was not captured."""
        return LayerReader(self.codec, super().layer(number).arrays)

    def where(self, expression: str, first: int = 0) -> np.ndarray:
        """int64, ascending: the rows from number `first` on for which an expression holds. Raises WhereError."""
        return select_rows(self, expression, first)
