"""The bytes of one Zarr v3 shard file: how they are built, put on disk, and read back.

A shard is its inner chunks in order, each as raw little-endian values followed by their crc32c, then the
index (u64 offset and u64 length of every inner chunk, 2^64-1 twice for an absent one) and the index's crc32c.
Knows nothing of what the values mean, of commits or of metadata.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import google_crc32c
import numpy as np

from nla_engine import extension
from nla_engine.errors import StoreError, WriteError

CHECKSUM_BYTES = 4
ABSENT = 2**64 - 1
TEMPORARY_SUFFIX = ".tmp"


def index_bytes(shard_chunks: int) -> int:
    """Size of the index at the end of a shard of `shard_chunks` inner chunks, its checksum included."""
    return 16 * shard_chunks + CHECKSUM_BYTES


def build_shard(rows: np.ndarray, chunk_rows: int, shard_chunks: int) -> np.ndarray:
    """The file contents, uint8 [bytes], of a shard of rows [n, ...], 0 < n <= chunk_rows * shard_chunks.

    Only the inner chunks that hold rows are present; the last one is filled up with zeros. Built by the extension,
    which lets other threads run meanwhile, or, without it, by `build_shard_reference`: the same bytes.
    """
    native = extension.load()
    if native is None:
        return build_shard_reference(rows, chunk_rows, shard_chunks)
    raw = _raw_bytes(rows)
    built = native.build_shard(raw, chunk_rows * (raw.size // len(rows)), shard_chunks)
    return np.frombuffer(built, np.uint8)


def _raw_bytes(rows: np.ndarray) -> np.ndarray:
    """The values of rows as little-endian bytes, uint8 [bytes]; a view where they are so already."""
    return np.ascontiguousarray(rows, rows.dtype.newbyteorder("<")).reshape(-1).view(np.uint8)


def build_shard_reference(rows: np.ndarray, chunk_rows: int, shard_chunks: int) -> np.ndarray:
    """`build_shard` in numpy."""
    raw = _raw_bytes(rows)
    chunk_bytes = chunk_rows * (raw.size // len(rows))
    stride = chunk_bytes + CHECKSUM_BYTES
    full, rest = divmod(raw.size, chunk_bytes)
    chunks = full + (rest > 0)
    out = np.empty(chunks * stride + index_bytes(shard_chunks), np.uint8)
    body = out[: chunks * stride].reshape(chunks, stride)
    body[:full, :chunk_bytes] = raw[: full * chunk_bytes].reshape(full, chunk_bytes)
    if rest:
        body[full, :rest] = raw[full * chunk_bytes :]
        body[full, rest:chunk_bytes] = 0
    for chunk in body:
        chunk[chunk_bytes:] = _checksum(chunk[:chunk_bytes])
    index = np.full((shard_chunks, 2), ABSENT, "<u8")
    index[:chunks, 0] = np.arange(chunks) * stride
    index[:chunks, 1] = stride
    out[chunks * stride : -CHECKSUM_BYTES] = index.reshape(-1).view(np.uint8)
    out[-CHECKSUM_BYTES:] = _checksum(out[chunks * stride : -CHECKSUM_BYTES])
    return out


def read_chunks(path: Path, chunks: Sequence[int], shard_chunks: int, out: np.ndarray) -> None:
    """Read inner chunks of a shard file into out [len(chunks), chunk_rows, ...] (C order), checksums tested.

    Raises StoreError, naming the file, when it is missing, cut short, or any byte read is not as written.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise StoreError(f"{path}: a shard with committed rows is missing: restore it from a copy") from None
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        _read_open_shard(fd, chunks, shard_chunks, out)
    except _Damage as damage:
        raise StoreError(f"{path}: damaged: {damage}: restore it from a copy") from None
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}") from error
    finally:
        os.close(fd)


def write_file_atomically(path: Path, data: bytes | memoryview) -> None:
    """Put a file in place whole or not at all, durably: temporary name, fsync, rename, fsync of directory.

    Raises WriteError with the file and the system's message; the temporary file is gone then.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    with writing(path):
        if not path.parent.is_dir():
            path.parent.mkdir(exist_ok=True)
            fsync_directory(path.parent.parent)
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            try:
                rest = memoryview(data).cast("B")
                while rest:
                    rest = rest[os.write(fd, rest) :]
                os.fsync(fd)
            finally:
                os.close(fd)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        fsync_directory(path.parent)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError inside into a WriteError that names `path`."""
    try:
        yield
    except OSError as error:
        raise WriteError(f"{path}: cannot be written: {error.strerror or error}") from error


def fsync_directory(path: Path) -> None:
    """Make renames in a directory durable. A filesystem that cannot sync a directory is taken as it is."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


class _Damage(Exception):
    """What is wrong with a shard file."""


def _read_open_shard(fd: int, chunks: Sequence[int], shard_chunks: int, out: np.ndarray) -> None:
    body_bytes = os.fstat(fd).st_size - index_bytes(shard_chunks)
    raw = np.empty(index_bytes(shard_chunks), np.uint8)
    if body_bytes < 0 or os.preadv(fd, [raw.data], body_bytes) != raw.size:
        raise _Damage("it is cut short")
    if not np.array_equal(raw[-CHECKSUM_BYTES:], _checksum(raw[:-CHECKSUM_BYTES])):
        raise _Damage("its index fails its checksum (or the file is cut short)")
    index = raw[:-CHECKSUM_BYTES].view("<u8").reshape(shard_chunks, 2).tolist()
    stored = np.empty(CHECKSUM_BYTES, np.uint8)
    for number, values in zip(chunks, out, strict=True):
        offset, length = index[number]
        if offset == ABSENT:
            raise _Damage(f"inner chunk {number} is absent")
        if length != values.nbytes + CHECKSUM_BYTES or offset + length > body_bytes:
            raise _Damage(f"inner chunk {number} has {length} bytes at {offset}, which cannot be")
        # Straight into the caller's array. (With a mapping, a cut file would be a signal, not an error.)
        if os.preadv(fd, [values.data, stored.data], offset) != length:
            raise _Damage(f"inner chunk {number} is cut short")
        if not np.array_equal(stored, _checksum(values)):
            raise _Damage(f"inner chunk {number} fails its checksum")


def _checksum(data: np.ndarray) -> np.ndarray:
    """crc32c of a contiguous array's bytes, as its four little-endian bytes (uint8 [4])."""
    return np.frombuffer(google_crc32c.value(data).to_bytes(4, "little"), np.uint8)
