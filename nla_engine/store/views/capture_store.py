"""A store as users see it: vectors come decoded, fields have names, and an expression can select rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nla_engine.codec.rows import Codec
from nla_engine.errors import FieldError
from nla_engine.sites import Site, listed
from nla_engine.store.arrays import ArrayReader
from nla_engine.store.format import group_site, next_token_arrays
from nla_engine.store.layer import StoredLayer
from nla_engine.store.reader import StoreReader
from nla_engine.store.shown import facts_html, plural
from nla_engine.store.views.draw import in_order
from nla_engine.store.views.fields import Labels, field_names, record_names, row_field
from nla_engine.store.views.frames import pandas_frame, polars_frame
from nla_engine.store.views.indexing import split_index
from nla_engine.store.views.where import select_rows

if TYPE_CHECKING:
    import pandas
    import polars
    from torch import Tensor
    from torch import device as Device
    from torch import dtype as DType

Rows = int | slice | Sequence[int] | np.ndarray
#: Rows that iterating over a layer reads at once.
_BLOCK = 1024


class LayerReader(StoredLayer):
    """Indexed like a float32 array [rows, d] of numpy: layer[a:b], layer[[3, 1, 3]] and layer[mask] are [n, d],
    layer[i] is [d], layer[i, j] one number. Only the rows asked for are read.

    Rows that are kept exactly (sinks, NaN, Inf) come back bit-exact in bfloat16. Reads raise StoreError for
    damaged bytes and IndexError for rows that are not committed.
    """

    ndim = 2
    dtype = np.dtype(np.float32)

    def __init__(
        self, codec: Codec, arrays: Mapping[str, ArrayReader], in_order: Callable[[np.ndarray], np.ndarray]
    ) -> None:
        """in_order: row numbers, int64 [n], by the number of their sequence and their position"""
        super().__init__(codec, arrays)
        self.in_order = in_order

    def __getitem__(self, index: Any) -> np.ndarray:
        rows, place, channels = split_index(index, len(self))
        block = self.encoded_any(rows).decode(self.codec)
        if not channels and (isinstance(place, slice) or np.ndim(place) == 1):
            return block
        return block[(place, *channels)]

    def __iter__(self) -> Iterator[np.ndarray]:
        for start in range(0, len(self), _BLOCK):
            yield from self[start : start + _BLOCK]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Every row, decoded: float32 [rows, d]."""
        if copy is False:
            raise ValueError(
                "the rows of a layer are decoded when they are read: they cannot be given uncopied"
            )
        return np.asarray(self[:], dtype)

    @property
    def site(self) -> Site:
        """What its rows are of."""
        return group_site(self.arrays["norm"].spec.path.split("/")[0])

    @property
    def number(self) -> int:
        """K of layer K."""
        return self.site.layer

    def __repr__(self) -> str:
        return (
            f"<{self.site.label}: float32 [{len(self):,}, {self.codec.d_model:,}], kept as {self.codec.name}>"
        )

    def _repr_html_(self) -> str:
        facts = {
            "rows": f"{len(self):,}",
            "d_model": f"{self.codec.d_model:,}",
            "kept as": self.codec.name,
            "as float32": f"{4 * len(self) * self.codec.d_model / 2**20:,.3g} MiB",
        }
        return facts_html(self.site.label, facts)

    def torch(self, rows: Rows, device: Device | str = "cpu", dtype: DType | None = None) -> Tensor:
        """layer[rows] as a tensor, decoded on `device`: float32 (None), bfloat16 or float16. Whole rows alone."""
        from nla_engine.store.views.tensors import decode_tensor

        chosen, place, channels = split_index(rows, len(self))
        if channels:
            raise IndexError("a tensor has whole rows: choose its channels afterwards")
        block = decode_tensor(self.encoded_any(chosen), self.codec, device, dtype)
        if isinstance(place, np.ndarray):
            return block.reshape(*place.shape, self.codec.d_model)
        return block[place]

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
    """The committed rows and sequences of a store. Open one with `CaptureStore.open`. Its length: its rows."""

    def __len__(self) -> int:
        return self.rows

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The vectors of the only layer, float32 [rows, d]. StoreError if there are several."""
        return self.layer(self.chosen_layer(None)).__array__(dtype, copy)

    def __repr__(self) -> str:
        state = "" if self.complete else ", not complete"
        return (
            f"<CaptureStore {self.path}: {plural(self.rows, 'row')} of {plural(self.sequences, 'sequence')}, "
            f"{listed(self.sites)}, "
            f"d_model {self.d_model:,}, {self.codec.name}{state}>"
        )

    def _repr_html_(self) -> str:
        facts = {
            "model": self.provenance.get("model", "-"),
            "layers": ", ".join(map(str, self.sites)),
            "rows": f"{self.rows:,}",
            "sequences": f"{self.sequences:,}",
            "d_model": f"{self.d_model:,}",
            "kept as": self.codec.name,
            "complete": "yes" if self.complete else "no: still being written, or interrupted",
        }
        return facts_html(f"CaptureStore {self.path}", facts)

    def layer(self, number: int | Site, site: str | None = None) -> LayerReader:
        """The vectors of one layer: the output of block `number`, or its `site`. StoreError if it was not captured.

        site: resid_post (None), resid_mid, attn_out, mlp_out; or embeddings, which any number finds
        """
        return LayerReader(self.codec, super().layer(number, site).arrays, self.in_order)

    @property
    def fields(self) -> list[str]:
        """Every name that `where`, `column` and the tables know here, those of the prompt records last."""
        return [*field_names(self), *record_names(self)]

    def column(self, name: str) -> np.ndarray:
        """A field of every row, [rows], by any name that `where` knows; cached, read-only. Raises FieldError.

        Texts are objects. `record.KEY` is bool, int64 or float64 if every record has such a value (NaN where a number
        is missing), else objects (None where it is missing). `top_id` and `top_logprob`, which `where` does not know,
        are [rows, K].
        """
        if name in next_token_arrays(self.next_token)[1:]:
            return super().column(name)
        if name not in self._columns:
            try:
                found = row_field(self, name)
            except FieldError as error:
                known = ", ".join([*field_names(self), "record.KEY"])
                raise type(error)(f"{self.path}: {error}: choose one of {known}") from None
            values = found.spread() if isinstance(found, Labels) else found
            values.flags.writeable = False
            self._columns[name] = values
        return self._columns[name]

    def where(self, expression: str, first: int = 0) -> np.ndarray:
        """int64, ascending: the rows from number `first` on for which an expression holds. Raises WhereError."""
        return select_rows(self, expression, first)

    def in_order(self, rows: np.ndarray) -> np.ndarray:
        """Row numbers, int64 [n], by the number of their sequence and their position.

        That is how the tables of stage 2 list rows. Stores have them in the order in which their sequences ended.
        """
        return in_order(self, rows)

    def to_pandas(self, columns: Sequence[str] | None = None, rows: Any = None) -> pandas.DataFrame:
        """A row of the frame per row of the store; its index is the row's number. Only these columns are read.

        columns: names of fields; None: place, tokens, norm, and every field of the prompt records
        rows: numbers, a slice or a mask; None: all. RequestError without pandas, FieldError for an unknown name.
        """
        return pandas_frame(self, columns, rows)

    def to_polars(
        self, columns: Sequence[str] | None = None, rows: Any = None, *, lazy: bool = False
    ) -> polars.DataFrame | polars.LazyFrame:
        """The same for polars, with the number of the row as column `row`.

        lazy: a LazyFrame, which reads the columns that a query uses when it is collected
        """
        return polars_frame(self, columns, rows, lazy)
