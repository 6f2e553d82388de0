"""Rows of a store as one file that other tools read: Parquet, safetensors or npy.

Written in batches, so memory stays bounded, to a temporary name that is renamed last.
Knows nothing of models.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nla_engine.errors import RequestError, StoreError
from nla_engine.store.format import RowFlag
from nla_engine.store.layer import LayerReader
from nla_engine.store.reader import CaptureStore
from nla_engine.store.shards import TEMPORARY_SUFFIX, fsync_directory, writing

if TYPE_CHECKING:
    import pyarrow as pa

FORMATS = ("parquet", "safetensors", "npy")
BATCH_BYTES = 32 << 20
INTEGER_COLUMNS = ("sequence", "position", "token_id", "next_token_id")


@dataclass(frozen=True)
class _Selection:
    """Rows (int64, ascending) of one layer."""

    store: CaptureStore
    layer_number: int
    layer: LayerReader
    rows: np.ndarray

    def batches(self) -> Iterator[np.ndarray]:
        """The row numbers, as many at a time as BATCH_BYTES of vectors hold."""
        size = max(1, BATCH_BYTES // (4 * self.store.d_model))
        for start in range(0, len(self.rows), size):
            yield self.rows[start : start + size]

    def metadata(self) -> dict[str, str]:
        """What the numbers are, for the head of the file."""
        attributes = self.store.attributes
        return {
            "nla_engine": json.dumps({key: value for key, value in attributes.items() if key != "options"}),
            "layer": str(self.layer_number),
        }


def export(
    store: CaptureStore,
    to: str,
    out: str | os.PathLike[str],
    layer: int | None = None,
    where: str | None = None,
    overwrite: bool = False,
) -> int:
    """Write vectors (float32) and, but for npy, their row columns; returns the number of rows.

    to: parquet | safetensors | npy; layer: None for the first; where: None for every row
    Raises RequestError (unknown format), StoreError (nothing selected, `out` exists), WriteError.
    """
    if to not in FORMATS:
        raise RequestError(f"export format '{to}' is unknown: choose one of {', '.join(FORMATS)}")
    path = Path(out)
    if path.is_dir() or (path.exists() and not overwrite):
        raise StoreError(f"{path} exists: " + ("it is a directory" if path.is_dir() else "pass --overwrite"))
    if isinstance(store.path, Path) and path.resolve().is_relative_to(store.path.resolve()):
        raise StoreError(f"{path}: lies inside the store: choose a place outside")
    number = store.layers[0] if layer is None else layer
    rows = np.arange(store.rows) if where is None else store.where(where)
    if len(rows) == 0:
        raise StoreError(
            f"{store.path}: " + ("holds no rows" if where is None else f"no row fits {where!r}: widen it")
        )
    selection = _Selection(store, number, store.layer(number), rows)
    write = {"parquet": _write_parquet, "safetensors": _write_safetensors, "npy": _write_npy}[to]
    with _renamed_at_end(path) as temporary:
        write(selection, temporary)
    return len(rows)


@contextlib.contextmanager
def _renamed_at_end(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that becomes it when the body succeeds, else goes away."""
    temporary = path.with_name(f".{path.name}{TEMPORARY_SUFFIX}")
    with writing(path):
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_directory(path.parent)


def _write_parquet(selection: _Selection, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    width = selection.store.d_model
    flags = [(str(flag.name).lower(), pa.bool_()) for flag in RowFlag]
    fields = [("row", pa.int64()), ("sequence", pa.int64()), ("position", pa.int32())]
    fields += [("token_id", pa.int32()), ("next_token_id", pa.int32())]
    fields += [("token", pa.string()), ("next_token", pa.string()), *flags, ("norm", pa.float32())]
    fields += [("activation_vector", pa.list_(pa.float32(), width))]
    schema = pa.schema(fields, metadata=selection.metadata())
    with pq.ParquetWriter(path, schema) as writer:
        for rows in selection.batches():
            writer.write_table(_parquet_batch(selection, rows, schema))


def _parquet_batch(selection: _Selection, rows: np.ndarray, schema: pa.Schema) -> pa.Table:
    import pyarrow as pa

    store = selection.store
    encoded = selection.layer.encoded_at(rows)
    vectors = encoded.decode(store.codec)
    columns = {"row": rows, "norm": encoded.norm}
    columns |= {name: store.column(name)[rows] for name in INTEGER_COLUMNS}
    texts = {name: store.token_text(columns[f"{name}_id"]) for name in ("token", "next_token")}
    flags = store.column("flags")[rows]
    truths = {str(flag.name).lower(): flags & flag != 0 for flag in RowFlag}
    flat = pa.array(vectors.reshape(-1))
    vector_column = {"activation_vector": pa.FixedSizeListArray.from_arrays(flat, store.d_model)}
    arrays = columns | texts | truths | vector_column
    return pa.table([pa.array(arrays[field.name], field.type) for field in schema], schema=schema)


def _write_safetensors(selection: _Selection, path: Path) -> None:
    """Header length (8 bytes), JSON header, raw tensors. The library's own writer wants all in memory."""
    rows, store = selection.rows, selection.store
    tensors = {"row": rows} | {name: store.column(name)[rows] for name in INTEGER_COLUMNS}
    header: dict[str, object] = {"__metadata__": selection.metadata()}
    shape = [len(rows), store.d_model]
    end = 4 * len(rows) * store.d_model
    header["activation"] = {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}
    for name, values in sorted(tensors.items(), key=lambda item: -item[1].itemsize):
        dtype = {4: "I32", 8: "I64"}[values.itemsize]
        header[name] = {"dtype": dtype, "shape": [len(rows)], "data_offsets": [end, end + values.nbytes]}
        end += values.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for batch in selection.batches():
            file.write(selection.layer[batch].data)
        for name in list(header)[2:]:
            file.write(np.ascontiguousarray(tensors[name]).data)


def _write_npy(selection: _Selection, path: Path) -> None:
    # A plain stream, not a memory map: a full disk is then an error, where a map would end the process.
    shape = (len(selection.rows), selection.store.d_model)
    with path.open("wb") as file:
        description = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, description)
        for batch in selection.batches():
            file.write(selection.layer[batch].data)
