"""Writing and reading a store, beside zarr-python with the same chunks and shards. Megabytes of stored rows a second.

Ours makes every file durable (fsync) and checks every checksum it reads; zarr-python's writer does not sync. What is
read has just been written, so it comes from the page cache.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from nla_engine.bench.session import Prepared, Session, expect
from nla_engine.bench.timing import seconds
from nla_engine.bench.workload import encoded_sequences, write_store
from nla_engine.codec import Codec
from nla_engine.store import CaptureStore
from nla_engine.store.format import CHUNK_ROWS, default_shard_rows

_LAYER = 0


def run(session: Session) -> None:
    """Ours, then zarr-python on the same rows."""
    codec = Codec.named("int8", session.d_model)
    rows = session.sizes.store_rows
    name = f"int8 {rows} x {codec.d_model}"
    ours = [
        session.measure("store", f"write {name}", "MB/s", _write(session, codec, rows)),
        session.measure("store", f"read {name} as stored", "MB/s", _read(session, codec, rows)),
    ]
    session.measure(
        "store", f"read {name} as float32", "MB/s", _read(session, codec, rows, decoded=True), repeats=1
    )
    theirs = [
        session.measure("store", f"zarr-python write {name}", "MB/s", _zarr_write(session, codec, rows)),
        session.measure("store", f"zarr-python read {name}", "MB/s", _zarr_read(session, codec, rows)),
    ]
    for line, other in zip(ours, theirs, strict=True):
        if line is not None:
            line.compare(other)


@contextmanager
def _write(session: Session, codec: Codec, rows: int) -> Iterator[Prepared]:
    sequences, path = encoded_sequences(codec, _LAYER, rows), session.directory / "written.zarr"
    size = sum(len(s.position) for s in sequences) * codec.row_bytes

    def once() -> float:
        shutil.rmtree(path, ignore_errors=True)
        return size / seconds(lambda: write_store(path, codec, _LAYER, sequences), session.device) / 1e6

    yield Prepared(once)
    shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _read(session: Session, codec: Codec, rows: int, decoded: bool = False) -> Iterator[Prepared]:
    """In bulk, a shard at a time."""
    path, shard = session.directory / "read.zarr", default_shard_rows(codec)
    write_store(path, codec, _LAYER, encoded_sequences(codec, _LAYER, rows))

    def read() -> None:
        store, count = CaptureStore.open(path), 0
        reader = store.layer(_LAYER)
        for start in range(0, store.rows, shard):
            stop = min(start + shard, store.rows)
            count += len(reader[start:stop] if decoded else reader.encoded(start, stop).codes)
        expect("rows", count, store.rows)

    size = CaptureStore.open(path).rows * codec.row_bytes
    yield Prepared(lambda: size / seconds(read, session.device) / 1e6)
    shutil.rmtree(path, ignore_errors=True)


def _create(session: Session, codec: Codec, rows: int) -> Any:
    """zarr-python's own array of codes, uncompressed like ours."""
    import zarr

    shard = default_shard_rows(codec)
    return zarr.create_array(
        str(session.directory / "zarr-python.zarr"),
        shape=(rows, codec.code_width),
        dtype=codec.code_dtype,
        chunks=(CHUNK_ROWS, codec.code_width),
        shards=(shard, codec.code_width),
        compressors=None,
        overwrite=True,
    )


def _fill(array: Any, codes: np.ndarray) -> None:
    """Shard by shard, as a writer gets its rows."""
    rows = array.shape[0]
    for start in range(0, rows, len(codes)):
        stop = min(start + len(codes), rows)
        array[start:stop] = codes[: stop - start]


@contextmanager
def _zarr_write(session: Session, codec: Codec, rows: int) -> Iterator[Prepared]:
    shape = (default_shard_rows(codec), codec.code_width)
    codes = np.random.default_rng(0).integers(-127, 127, shape, dtype=codec.code_dtype)
    size = rows * codec.code_width * codec.code_dtype.itemsize

    def once() -> float:
        array = _create(session, codec, rows)
        return size / seconds(lambda: _fill(array, codes), session.device) / 1e6

    yield Prepared(once)


@contextmanager
def _zarr_read(session: Session, codec: Codec, rows: int) -> Iterator[Prepared]:
    shard = default_shard_rows(codec)
    array = _create(session, codec, rows)
    _fill(array, np.ones((shard, codec.code_width), codec.code_dtype))

    def read() -> None:
        for start in range(0, rows, shard):
            array[start : start + shard]

    yield Prepared(lambda: array.nbytes / seconds(read, session.device) / 1e6)
