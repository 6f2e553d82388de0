"""Writing and reading a store, compared with zarr-python. Megabytes of stored rows per second.

zarr-python uses the same chunks and shards. Our writer makes every file durable (fsync), and our reader checks every
checksum; zarr-python's writer does not sync. What is read has just been written, so it comes from the page cache.

Bulk reading decodes. Its unit is gigabytes of the rows as bfloat16. It is compared with zarr-python reading an array of
such rows with its default chunks and compressor, and with the bare reader of docs/store_format.md.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from nla_engine.bench.session import Prepared, Session, expect
from nla_engine.bench.timing import median, seconds
from nla_engine.bench.workload import encoded_sequences, write_store
from nla_engine.codec.rows import Codec, bf16_bits, hadamard_matrix
from nla_engine.store import CaptureStore
from nla_engine.store.format import CHUNK_ROWS, default_shard_rows

_LAYER = 0
_CPU = torch.device("cpu")
#: Stored gigabytes per second: more than one GPU gives, which is 80,000 rows per second of 3,584 channels in int8.
_GPU_RATE = 0.3
#: Rows that are read one at a time.
_SINGLE_ROWS = 64


def run(session: Session) -> None:
    """Ours, then zarr-python on the same rows."""
    codec = Codec.named("int8", session.d_model)
    rows = session.sizes.store_rows
    name = f"int8 {rows} x {codec.d_model}"
    ours = [
        session.measure("store", f"write {name}", "MB/s", _write(session, codec, rows, _rate)),
        session.measure("store", f"read {name} as stored", "MB/s", _read(session, codec, rows)),
    ]
    theirs = [
        session.measure("store", f"zarr-python write {name}", "MB/s", _zarr_write(session, codec, rows)),
        session.measure("store", f"zarr-python read {name}", "MB/s", _zarr_read(session, codec, rows)),
    ]
    for line, other in zip(ours, theirs, strict=True):
        if line is not None:
            line.compare(other)
    session.measure(
        "store",
        f"CPU time of write {name}",
        "s/GB",
        _write(session, codec, rows, _cpu_time),
        detail=lambda p50: (
            f"{p50 * _GPU_RATE:.2f} cores at the {_GPU_RATE} GB/s that a GPU gives of one layer"
        ),
    )
    _decoded(session, codec, rows)


def _decoded(session: Session, codec: Codec, rows: int) -> None:
    """Vectors: all of them in bulk, and single ones; then the same from zarr-python's own array of bfloat16 bits."""
    name, plain = f"int8 {rows} x {codec.d_model}", f"bf16 {rows} x {codec.d_model}"
    ours = [
        session.measure("store", f"bulk {name} to {what}", "GB/s", _bulk(session, codec, rows, dtype))
        for what, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
    ]
    row = session.measure("store", f"random row {name}", "ms", _random_rows(session, codec, rows))
    bare = session.measure(
        "store", f"bare zarr {name} to float32", "GB/s", _bare(session, codec, rows), repeats=1
    )
    default = session.measure(
        "store", f"zarr-python default read {plain}", "GB/s", _default_read(session, codec, rows)
    )
    their_row = session.measure(
        "store", f"zarr-python default random row {plain}", "ms", _default_rows(session, codec, rows)
    )
    for line in (*ours, bare):
        if line is not None:
            line.compare(default)
    if row is not None:
        row.compare(their_row)


def _rate(write: Callable[[], None], size: int) -> float:
    """Megabytes per second."""
    return size / seconds(write, _CPU) / 1e6


def _cpu_time(write: Callable[[], None], size: int) -> float:
    """Processor time of all threads of the process, in the kernel too: seconds per gigabyte."""
    start = time.process_time()
    write()
    return (time.process_time() - start) / (size / 1e9)


@contextmanager
def _write(
    session: Session, codec: Codec, rows: int, figure: Callable[[Callable[[], None], int], float]
) -> Iterator[Prepared]:
    """figure(write, bytes): what is measured of writing a store."""
    sequences, path = encoded_sequences(codec, _LAYER, rows), session.directory / "written.zarr"
    size = sum(len(s.position) for s in sequences) * codec.row_bytes

    def once() -> float:
        shutil.rmtree(path, ignore_errors=True)
        return figure(partial(write_store, path, codec, _LAYER, sequences), size)

    yield Prepared(once)
    shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _stored(session: Session, codec: Codec, rows: int) -> Iterator[CaptureStore]:
    path = session.directory / "read.zarr"
    write_store(path, codec, _LAYER, encoded_sequences(codec, _LAYER, rows))
    yield CaptureStore.open(path)
    shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _read(session: Session, codec: Codec, rows: int) -> Iterator[Prepared]:
    """In bulk, a shard at a time."""
    with _stored(session, codec, rows) as store:

        def read() -> None:
            reader, count, shard = store.layer(_LAYER), 0, default_shard_rows(codec)
            for start in range(0, store.rows, shard):
                count += len(reader.encoded(start, min(start + shard, store.rows)).codes)
            expect("rows", count, store.rows)

        size = store.rows * codec.row_bytes
        yield Prepared(lambda: size / seconds(read, session.device) / 1e6)


@contextmanager
def _bulk(session: Session, codec: Codec, rows: int, dtype: torch.dtype) -> Iterator[Prepared]:
    """Every row as a tensor on the device; on a CPU by one thread."""
    with _stored(session, codec, rows) as store:

        def read() -> None:
            blocks = store.layer(_LAYER).tensors(
                device=session.device, dtype=dtype, threads=_threads(session)
            )
            expect("rows", sum(len(block) for _, block in blocks), store.rows)

        yield Prepared(lambda: _logical(store.rows, codec) / seconds(read, session.device) / 1e9)


def _threads(session: Session) -> int:
    return 4 if session.device.type == "cuda" else 0


def _logical(rows: int, codec: Codec) -> int:
    """Bytes of the rows as bfloat16."""
    return rows * codec.d_model * 2


def _milliseconds(read: Callable[[int], Any], rows: int) -> float:
    """The median time of reading one row."""
    numbers = np.random.default_rng(0).integers(0, rows, _SINGLE_ROWS).tolist()
    return 1e3 * median([seconds(partial(read, number), _CPU) for number in numbers])


@contextmanager
def _random_rows(session: Session, codec: Codec, rows: int) -> Iterator[Prepared]:
    with _stored(session, codec, rows) as store:
        reader = store.layer(_LAYER)
        yield Prepared(lambda: _milliseconds(lambda number: reader[number], store.rows))


@contextmanager
def _bare(session: Session, codec: Codec, rows: int) -> Iterator[Prepared]:
    """The int8 reader of docs/store_format.md with bare zarr, the whole array at once."""
    with _stored(session, codec, rows) as store:

        def read() -> None:
            import zarr

            group: Any = zarr.open_group(store.path, mode="r")[f"layer_{_LAYER}"]
            n, d, block = store.rows, codec.d_model, codec.block
            matrix = hadamard_matrix(block).astype(np.float32)
            scales = np.repeat(group["scales"][:n].astype(np.float32), codec.group, axis=1)
            rms = (group["norm"][:n] / np.float32(d**0.5))[:, None]
            x = ((group["codes"][:n] * scales).reshape(n, d // block, block) @ matrix).reshape(n, d) * rms
            expect("rows", len(x), n)

        yield Prepared(lambda: _logical(store.rows, codec) / seconds(read, session.device) / 1e9)


@contextmanager
def _default_array(session: Session, codec: Codec, rows: int) -> Iterator[Any]:
    """The bfloat16 bits of random rows in an array with zarr-python's defaults."""
    import zarr

    path = session.directory / "default.zarr"
    array = zarr.create_array(str(path), shape=(rows, codec.d_model), dtype="uint16", overwrite=True)
    block = bf16_bits(np.random.default_rng(0).standard_normal((min(rows, 4096), codec.d_model), np.float32))
    _fill(array, block)
    yield array
    shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _default_read(session: Session, codec: Codec, rows: int) -> Iterator[Prepared]:
    with _default_array(session, codec, rows) as array:
        step = max(array.chunks[0], 4096)

        def read() -> None:
            count = sum(len(array[start : start + step]) for start in range(0, rows, step))
            expect("rows", count, rows)

        yield Prepared(lambda: _logical(rows, codec) / seconds(read, session.device) / 1e9)


@contextmanager
def _default_rows(session: Session, codec: Codec, rows: int) -> Iterator[Prepared]:
    with _default_array(session, codec, rows) as array:
        yield Prepared(lambda: _milliseconds(lambda number: array[number], rows))


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
