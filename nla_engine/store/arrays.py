"""One array of a store: a log that only grows (ArrayLog), and a reader of its committed part (ArrayReader)."""

from __future__ import annotations

import os
from threading import Event, Lock

import numpy as np

from nla_engine.store.format import ArraySpec
from nla_engine.store.manifest import METADATA_NAME, json_bytes
from nla_engine.store.objects import ObjectPath, Place
from nla_engine.store.queue import WriteQueue
from nla_engine.store.shards import (
    TEMPORARY_SUFFIX,
    Piece,
    ShardImage,
    fsync_directory,
    read_chunks,
    write_file_atomically,
    writing,
)

#: Below this many bytes, copying at once is faster than handing the copy to the queue.
_COPIED_BY_QUEUE_BYTES = 1 << 20


class _Copy:
    """Pieces to put into an image once, by whichever thread comes first."""

    def __init__(self, image: ShardImage, pieces: list[Piece]) -> None:
        self._image, self._pieces = image, pieces
        self._claim, self._ended = Lock(), Event()
        self._made = False

    @property
    def made(self) -> bool:
        return self._made

    def make(self) -> None:
        """Copy, unless another thread is copying or has copied."""
        if self._claim.acquire(blocking=False):
            try:
                self._image.put(self._pieces)
                self._made = True
            finally:
                self._pieces.clear()  # the caller's arrays may go
                self._ended.set()

    def wait(self) -> None:
        """Wait for the copy, or make it if no thread has begun. RuntimeError if it failed in another thread."""
        self.make()
        self._ended.wait()
        if not self._made:
            raise RuntimeError("rows could not be copied")


class ArrayLog:
    """Appends rows; full shards go to the write queue at once, the last partial one waits in memory for `flush`.

    What `flush` and `describe` submit is on disk once the queue has been joined.
    """

    def __init__(self, root: Place, spec: ArraySpec, queue: WriteQueue) -> None:
        """A log of length 0. Nothing is written."""
        self.spec = spec
        self._queue = queue
        self.length = 0
        self._root = root
        self._tail = ShardImage(spec)
        self._copying: list[_Copy] = []
        self._into_tail: list[_Copy] = []
        self._written: list[ShardImage] = []  # images to reuse: fresh memory costs more than the copy
        self._flushed = 0
        self._described: int | None = None

    @classmethod
    def resume(cls, root: Place, spec: ArraySpec, length: int, queue: WriteQueue) -> ArrayLog:
        """The log as it was when `length` rows were committed. Later rows are removed or overwritten.

        Raises StoreError when the last committed rows are damaged, WriteError when a stale file cannot be removed.
        """
        log = cls(root, spec, queue)
        first = length - length % spec.shard_rows
        log._tail.put([(0, ArrayReader(root, spec, length).read(first, length))])
        log.length = length
        # The last shard on disk may hold rows after the commit: the next flush rewrites it.
        log._flushed = first
        log._remove_stale(-(-length // spec.shard_rows))
        return log

    def _remove_stale(self, needed: int) -> None:
        """Remove temporary files, and shards from number `needed` on.

        Only the last shard that is needed may have been rewritten. Earlier ones cannot have leftovers, so they are not
        searched.
        """
        array = self._root / self.spec.path
        if isinstance(array, ObjectPath):
            with writing(array):
                for name in (array / "c").names():
                    shard = name.split("/")[0]
                    if shard.isdigit() and int(shard) >= needed:
                        (array / "c" / name).unlink()
            return
        chunks = array / "c"
        for name in sorted(os.listdir(chunks)):
            shard = name.removesuffix(TEMPORARY_SUFFIX)
            if not shard.isdigit() or int(shard) < needed - 1:
                continue
            for path in (chunks / name, *sorted((chunks / name).rglob("*"))):
                stale = int(shard) >= needed or path.name.endswith(TEMPORARY_SUFFIX)
                if stale and path.is_file():
                    with writing(path):
                        path.unlink()
        with writing(array):
            (array / (METADATA_NAME + TEMPORARY_SUFFIX)).unlink(missing_ok=True)
            fsync_directory(
                chunks
            )  # a killed writer may just have made directories here, which will not be made again

    def append(self, *parts: np.ndarray) -> None:
        """Append copies of parts [n, *trailing] of the array's dtype. Raises the WriteError of an earlier write.

        The queue's threads copy large parts, those of several shards and arrays at once. So the parts must not change
        until `wait_until_copied`.
        """
        shard_rows = self.spec.shard_rows
        pieces: list[Piece] = []
        for rows in parts:
            done = 0
            while done < len(rows):
                used = self.length % shard_rows
                count = min(shard_rows - used, len(rows) - done)
                pieces.append((used, rows[done : done + count]))
                self.length += count
                done += count
                if used + count == shard_rows:
                    self._copy(pieces)
                    self._write_tail()
                    pieces = []
                    self._tail = self._written.pop() if self._written else ShardImage(self.spec)
                    self._into_tail = []
        self._copy(pieces)

    def adopt(self, rows: int) -> None:
        """Count rows that lie in whole shard files, which are in place already as the next shards."""
        assert not self.length % self.spec.shard_rows and not rows % self.spec.shard_rows
        self.length += rows
        self._flushed = self.length

    def wait_until_copied(self) -> None:
        """Wait until everything appended has been copied. Copies that no thread has begun are made here."""
        for copy in self._copying:
            copy.make()
        while self._copying:
            self._copying[-1].wait()
            self._copying.pop()

    def flush(self) -> None:
        """Submit every row to the queue. The last partial shard is rewritten if it has grown.

        Nothing may be appended until the queue has been joined.
        """
        if self._flushed < self.length:
            self._write_tail()

    def describe(self) -> None:
        """Submit the array's zarr.json to the queue, if its length changed."""
        if self._described != self.length:
            metadata = json_bytes(self.spec.metadata(self.length), self.spec.path)
            path = self._root / self.spec.path / METADATA_NAME
            self._queue.submit(lambda: write_file_atomically(path, metadata), len(metadata))
            self._described = self.length

    def _copy(self, pieces: list[Piece]) -> None:
        """Put pieces into the tail, large ones by the queue's threads."""
        if sum(rows.nbytes for _, rows in pieces) < _COPIED_BY_QUEUE_BYTES:
            self._tail.put(pieces)
            return
        copy = _Copy(self._tail, pieces)
        self._into_tail.append(copy)
        self._copying = [*(each for each in self._copying if not each.made), copy]
        self._queue.submit(copy.make, 0)

    def _write_tail(self) -> None:
        """Submit the tail to the queue."""
        shard, last = divmod(self.length - 1, self.spec.shard_rows)
        path, image, full = (
            self._root / self.spec.shard_path(shard),
            self._tail,
            last + 1 == self.spec.shard_rows,
        )
        copies = self._into_tail

        def write() -> None:
            for copy in copies:
                copy.wait()
            image.write(path, last + 1)
            if full:
                self._written.append(image)

        self._queue.submit(write, image.nbytes)
        self._flushed = self.length


class ArrayReader:
    """The first `length` rows of an array. Stateless: every read opens the shards it needs."""

    def __init__(self, root: Place, spec: ArraySpec, length: int) -> None:
        self.spec = spec
        self.length = length
        self._root = root

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [start, stop), 0 <= start <= stop <= length. Raises StoreError on damaged or missing files."""
        stop = self.length if stop is None else stop
        if not 0 <= start <= stop <= self.length:
            raise IndexError(f"{self.spec.path}: rows {start}:{stop} are outside its {self.length}")
        chunk_rows, per_shard = self.spec.chunk_rows, self.spec.shard_chunks
        first, last = start // chunk_rows, -(-stop // chunk_rows) if stop > start else 0
        out = self._empty(max(last - first, 0))
        chunk = first
        while chunk < last:
            end = min(last, (chunk // per_shard + 1) * per_shard)
            self.read_shard(chunk // per_shard, range(chunk, end), out[chunk - first : end - first])
            chunk = end
        rows = out.reshape(-1, *self.spec.trailing)
        return rows[start - first * chunk_rows :][: stop - start]

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Rows int64 [n], each in [0, length), any order, repeats allowed. Each chunk is read once.

        Raises IndexError for other numbers, and what `read` raises.
        """
        out = np.empty((len(rows), *self.spec.trailing), self.spec.dtype)
        if len(rows) == 0:
            return out
        if not 0 <= rows.min() <= rows.max() < self.length:
            raise IndexError(
                f"{self.spec.path}: rows {rows.min()} to {rows.max()} are outside its {self.length}"
            )
        order = np.argsort(rows, kind="stable")
        ordered = rows[order]
        shards = ordered // self.spec.shard_rows
        starts = np.flatnonzero(np.diff(shards, prepend=-1))
        for begin, end in zip(starts, [*starts[1:], len(rows)], strict=True):
            part = ordered[begin:end]
            chunks, which = np.unique(part // self.spec.chunk_rows, return_inverse=True)
            block = self._empty(len(chunks))
            self.read_shard(int(shards[begin]), chunks.tolist(), block)
            out[order[begin:end]] = block[which, part % self.spec.chunk_rows]
        return out

    def _empty(self, chunks: int) -> np.ndarray:
        return np.empty((chunks, self.spec.chunk_rows, *self.spec.trailing), self.spec.dtype)

    def read_shard(self, shard: int, chunks: range | list[int], out: np.ndarray) -> None:
        """Read chunks of one shard, numbered from the start of the array."""
        inside = [chunk - shard * self.spec.shard_chunks for chunk in chunks]
        read_chunks(self._root / self.spec.shard_path(shard), inside, self.spec.shard_chunks, out)
