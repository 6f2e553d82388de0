"""The bytes of one Zarr v3 shard file: how they are built, put on disk, and read back.

A shard is its inner chunks in order, each as raw little-endian values followed by their crc32c, then the
index (u64 offset and u64 length of every inner chunk, 2^64-1 twice for an absent one) and the index's crc32c.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import google_crc32c
import numpy as np

from nla_engine import extension
from nla_engine.errors import DamageError, StoreError, WriteError
from nla_engine.store.format import CHECKSUM_BYTES, ArraySpec, index_bytes
from nla_engine.store.objects import ObjectPath, Place

ABSENT = 2**64 - 1
TEMPORARY_SUFFIX = ".tmp"
#: Up to a fourth of an object's chunks are read by themselves, more with the whole object.
_FEW_CHUNKS_PART = 4
#: What to do about damage.
MEND = "restore it from a copy, or give up what is lost with `nla-engine verify --repair`"

#: The first row in the shard, and the rows [n, *trailing] that go there.
Piece = tuple[int, np.ndarray]


class ShardImage:
    """A shard file being built: rows are put where they lie in the file, `seal` adds checksums and index.

    So a value is copied only twice: into the image, and by the system into the file. An image can be reused for the
    next shard.
    """

    def __init__(self, spec: ArraySpec) -> None:
        """Room for the rows [spec.shard_rows, *spec.trailing] of one shard."""
        row_bytes = math.prod(spec.trailing) * spec.dtype.itemsize
        self._chunk_bytes = spec.chunk_rows * row_bytes
        self._spec, self._row_bytes = spec, row_bytes
        stride = self._chunk_bytes + CHECKSUM_BYTES
        self._bytes = np.empty(spec.shard_chunks * stride + index_bytes(spec.shard_chunks), np.uint8)
        self.chunks = np.ndarray(
            (spec.shard_chunks, spec.chunk_rows, *spec.trailing),
            spec.dtype,
            self._bytes.data,
            strides=(stride, row_bytes, *(() if not spec.trailing else (spec.dtype.itemsize,))),
        )

    @property
    def nbytes(self) -> int:
        return self._bytes.nbytes

    def put(self, pieces: Sequence[Piece]) -> None:
        """Copy rows into their places.

        With the extension this is one call, which copies without the interpreter's lock.
        """
        native = extension.load()
        if native is None or not all(self._is_as_stored(rows) for _, rows in pieces):
            self.put_reference(pieces)
            return
        places = [(start * self._row_bytes, rows) for start, rows in pieces]
        native.fill_shard(self._bytes, self._chunk_bytes, self._spec.shard_chunks, places)

    def _is_as_stored(self, rows: np.ndarray) -> bool:
        spec = self._spec
        return rows.flags.c_contiguous and rows.dtype == spec.dtype and rows.shape[1:] == spec.trailing

    def put_reference(self, pieces: Sequence[Piece]) -> None:
        """`put` in numpy."""
        chunk_rows = self._spec.chunk_rows
        for start, rows in pieces:
            done = 0
            while done < len(rows):
                chunk, used = divmod(start + done, chunk_rows)
                count = min(chunk_rows - used, len(rows) - done)
                self.chunks[chunk, used : used + count] = rows[done : done + count]
                done += count

    def seal(self, rows: int) -> memoryview:
        """The file's contents when the shard holds its first `rows` > 0 rows; valid until the next `put`.

        Only the inner chunks with rows are present; the last one is padded with zeros.
        """
        native = extension.load()
        if native is None:
            return self.seal_reference(rows)
        size = native.seal_shard(
            self._bytes, rows * self._row_bytes, self._chunk_bytes, self._spec.shard_chunks
        )
        return self._bytes.data[:size]

    def seal_reference(self, rows: int) -> memoryview:
        """`seal` in numpy: the same bytes."""
        stride, shard_chunks = self._chunk_bytes + CHECKSUM_BYTES, self._spec.shard_chunks
        present = -(-rows // self._spec.chunk_rows)
        body = self._bytes[: present * stride].reshape(present, stride)
        body[-1, (rows - (present - 1) * self._spec.chunk_rows) * self._row_bytes : self._chunk_bytes] = 0
        for chunk in body:
            chunk[self._chunk_bytes :] = _checksum(chunk[: self._chunk_bytes])
        index = np.full((shard_chunks, 2), ABSENT, "<u8")
        index[:present, 0] = np.arange(present) * stride
        index[:present, 1] = stride
        contents = self._bytes[: present * stride + index_bytes(shard_chunks)]
        contents[present * stride : -CHECKSUM_BYTES] = index.reshape(-1).view(np.uint8)
        contents[-CHECKSUM_BYTES:] = _checksum(contents[present * stride : -CHECKSUM_BYTES])
        return contents.data

    def write(self, path: Place, rows: int) -> None:
        """Seal the shard and put it in place as `write_file_atomically` does.

        With the extension this is one call, which runs without the interpreter's lock.
        """
        native = extension.load()
        if native is None or isinstance(path, ObjectPath):
            write_file_atomically(path, self.seal(rows))
            return
        arguments = (rows * self._row_bytes, self._chunk_bytes, self._spec.shard_chunks)
        with writing(path):
            native.write_shard(path, self._bytes, *arguments)


def read_chunks(path: Place, chunks: Sequence[int], shard_chunks: int, out: np.ndarray) -> None:
    """Read inner chunks of a shard file into out [len(chunks), chunk_rows, ...] (C order), and check them.

    Raises DamageError, naming the file, if it is missing, truncated, or a byte read is not as written.
    """
    try:
        if isinstance(path, ObjectPath):
            _read_object(path, chunks, shard_chunks, out)
        else:
            with _open_file(path) as (size, read):
                _read_shard(size, read, chunks, shard_chunks, out)
    except FileNotFoundError:
        raise DamageError(f"{path}: a shard with committed rows is missing: {MEND}") from None
    except _Damage as damage:
        raise DamageError(f"{path}: damaged: {damage}: {MEND}") from None
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}") from error


def write_file_atomically(path: Place, data: bytes | memoryview) -> None:
    """Put a file in place whole or not at all, durably: temporary name, fsync, rename, fsync of directory.

    On an object store this is one put. Raises WriteError with the file and the system's message, and removes the
    temporary file.
    """
    if isinstance(path, ObjectPath):
        with writing(path):
            path.write_bytes(data)
        return
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    with writing(path):
        make_directory(path.parent)
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
def writing(path: Place) -> Iterator[None]:
    """Turn an OSError inside into a WriteError that names `path`."""
    try:
        yield
    except OSError as error:
        raise WriteError(f"{path}: cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`. The file or directory made there becomes `path`, durably, if the body succeeds.

    Else it is removed. An OSError in the body becomes a WriteError that names `path`.
    """
    temporary = path.with_name(f".{path.name}{TEMPORARY_SUFFIX}")
    with writing(path):
        make_directory(path.parent)
        try:
            yield temporary
            for file in [temporary] if temporary.is_file() else [*temporary.rglob("*"), temporary]:
                fsync_directory(file) if file.is_dir() else _fsync(file)
            temporary.replace(path)
        except BaseException:
            if temporary.is_dir():
                shutil.rmtree(temporary)
            temporary.unlink(missing_ok=True)
            raise
        fsync_directory(path.parent)


def _fsync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def make_directory(path: Path) -> None:
    """Make a directory and its missing parents, durably."""
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
        fsync_directory(path.parent)


def fsync_directory(path: Path) -> None:
    """Make renames in a directory durable. Does nothing on a file system that cannot sync a directory."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def sync_file_system(path: Path) -> bool:
    """Make all that was written to the file system of a directory durable; False if this system cannot. OSError.

    One call, where thousands of directories would need one each.
    """
    sync = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)
    if sync is None:
        return False
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if sync(fd) == 0:
            return True
        error = ctypes.get_errno()
        if error in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
            return False
        raise OSError(error, os.strerror(error), str(path))
    finally:
        os.close(fd)


class _Damage(Exception):
    """What is wrong with a shard file."""


#: read(buffers, offset): fills the buffers in turn from offset on; returns the bytes read, fewer at the end.
_Read = Callable[[Sequence[memoryview], int], int]


@contextlib.contextmanager
def _open_file(path: Path) -> Iterator[tuple[int, _Read]]:
    """The size of a file, and a function that reads it."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # With a memory map, a truncated file would raise a signal, not an error.
        yield os.fstat(fd).st_size, lambda buffers, offset: os.preadv(fd, buffers, offset)
    finally:
        os.close(fd)


def _read_object(path: ObjectPath, chunks: Sequence[int], shard_chunks: int, out: np.ndarray) -> None:
    """Read a few neighbouring chunks in three small requests, anything else by reading the whole object.

    If a writer replaces the object between two requests it looks damaged; then it is read again as a whole.
    """
    few = len(chunks) == 1 or len(chunks) <= shard_chunks // _FEW_CHUNKS_PART
    if few and chunks[-1] - chunks[0] + 1 == len(chunks):
        with contextlib.suppress(_Damage):
            read = _reading(_ahead(path.read_range, out.nbytes + CHECKSUM_BYTES * len(chunks)))
            return _read_shard(path.size(), read, chunks, shard_chunks, out)
    whole = path.read_bytes()
    return _read_shard(len(whole), _reading(lambda start, stop: whole[start:stop]), chunks, shard_chunks, out)


def _ahead(part: Callable[[int, int], bytes], size: int) -> Callable[[int, int], bytes]:
    """`part`, reading at least `size` bytes at a time, since the bytes after are wanted next."""
    start, data = 0, b""

    def read(first: int, stop: int) -> bytes:
        nonlocal start, data
        if not start <= first <= stop <= start + len(data):
            start, data = first, part(first, max(stop, first + size))
        return data[first - start : stop - start]

    return read


def _reading(part: Callable[[int, int], bytes]) -> _Read:
    """A `_Read` from a function that gives bytes [start, stop)."""

    def read(buffers: Sequence[memoryview], offset: int) -> int:
        data = part(offset, offset + sum(buffer.nbytes for buffer in buffers))
        done = 0
        for buffer in buffers:
            piece = data[done : done + buffer.nbytes]
            buffer.cast("B")[: len(piece)] = piece
            done += len(piece)
        return done

    return read


def _read_shard(size: int, read: _Read, chunks: Sequence[int], shard_chunks: int, out: np.ndarray) -> None:
    body_bytes = size - index_bytes(shard_chunks)
    raw = np.empty(index_bytes(shard_chunks), np.uint8)
    if body_bytes < 0 or read([raw.data], body_bytes) != raw.size:
        raise _Damage("it is cut short")
    if not np.array_equal(raw[-CHECKSUM_BYTES:], _checksum(raw[:-CHECKSUM_BYTES])):
        raise _Damage("its index fails its checksum (or the file is cut short)")
    index = raw[:-CHECKSUM_BYTES].view("<u8").reshape(shard_chunks, 2)[list(chunks)].tolist()
    stored = np.empty(CHECKSUM_BYTES, np.uint8)
    for number, (offset, length), values in zip(chunks, index, out, strict=True):
        if offset == ABSENT:
            raise _Damage(f"inner chunk {number} is absent")
        if length != values.nbytes + CHECKSUM_BYTES or offset + length > body_bytes:
            raise _Damage(f"inner chunk {number} has {length} bytes at {offset}, which cannot be")
        if read([values.data, stored.data], offset) != length:  # straight into the caller's array
            raise _Damage(f"inner chunk {number} is cut short")
        if not np.array_equal(stored, _checksum(values)):
            raise _Damage(f"inner chunk {number} fails its checksum")


def _checksum(data: np.ndarray) -> np.ndarray:
    """crc32c of a contiguous array's bytes, as its four little-endian bytes (uint8 [4])."""
    return np.frombuffer(google_crc32c.value(data).to_bytes(4, "little"), np.uint8)
