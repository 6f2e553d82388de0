"""A layer as an xarray.Dataset: vectors, decoded when read, beside the columns of their rows. Needs xarray."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from nla_engine.errors import RequestError
from nla_engine.sites import Site
from nla_engine.store.format import next_token_arrays
from nla_engine.store.views.capture_store import CaptureStore, LayerReader

if TYPE_CHECKING:
    import xarray

COLUMNS = ("token_id", "next_token_id", "position", "sequence", "flags")


def open_dataset(store: CaptureStore, layer: int | Site | None = None) -> xarray.Dataset:
    """`activation` float32 (row, channel), lazy: reading a part decodes that part; `norm` (row); the row columns.

    The columns are coordinates along `row`; the store's attributes become those of the dataset.
    layer: None for the store's only one. Raises StoreError for a layer that is not there, RequestError without xarray.
    """
    try:
        import xarray
        from xarray.core import indexing
    except ImportError as error:
        raise RequestError("a labelled view needs xarray: pip install xarray") from error

    site = store.chosen_layer(layer)
    reader = store.layer(site)

    class Lazy(xarray.backends.BackendArray):
        """The rows of the layer, as xarray indexes them."""

        def __init__(self) -> None:
            self.shape = reader.shape
            self.dtype = np.dtype(np.float32)

        def __getitem__(self, key: Any) -> np.ndarray:
            return np.asarray(
                indexing.explicit_indexing_adapter(
                    key, self.shape, indexing.IndexingSupport.OUTER, _reading(reader)
                )
            )

    activation = xarray.Variable(("row", "channel"), indexing.LazilyIndexedArray(Lazy()))
    coordinates = {"row": np.arange(store.rows)} | {name: ("row", store.column(name)) for name in COLUMNS}
    told = {
        name: (("row", "rank")[: 1 + (name != "next_logprob")], store.column(name))
        for name in next_token_arrays(store.next_token)
    }
    return xarray.Dataset(
        {"activation": activation, "norm": ("row", reader.norm()), **told},
        coords=coordinates,
        attrs={"layer": site.key, "store_id": store.attributes["store_id"], "codec": store.codec.name},
    )


def _reading(reader: LayerReader) -> Any:
    def read(key: tuple[Any, Any]) -> np.ndarray:
        rows, channels = key
        if isinstance(rows, int | np.integer):
            return np.asarray(reader[int(rows)][channels])
        return np.asarray(reader[rows][:, channels])

    return read
