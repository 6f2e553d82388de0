"""Rows of sequences on the host until their sequences end: in memory up to a limit, beyond it in files without a name.

A file without a name is gone when it is closed or its process ends, however that happens, so no later run can find one.
Knows nothing of devices, and is used by one thread at a time, whose copies several threads make.
"""

from __future__ import annotations

import math
import mmap
import os
import resource
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nla_engine.codec.rows import Codec
from nla_engine.errors import EngineError, WriteError
from nla_engine.store.objects import Place

#: The part of the host memory of a run that is for running sequences. The rest is for those that have ended.
RUNNING_PART = 1 / 4
#: Threads that copy, and most bytes of one copy. One alone is slow where memory is written for the first time, because
#: the system has to find and clear each page.
_COPIERS, _COPIED_BYTES = 4, 1 << 20

#: A copy that a thread is to make.
_Job = Callable[[], object]


@dataclass(frozen=True)
class HostRows:
    """n rows of L layers, each row's layers side by side.

    codes [n, L, ...] in the codec's dtype, scales float16 [n, L, ...], norm float32 [n, L]
    """

    codes: np.ndarray
    scales: np.ndarray
    norm: np.ndarray

    @classmethod
    def empty(cls, codec: Codec, layers: int, size: int) -> HostRows:
        """Room for so many rows. What is never written takes no memory."""
        return cls(*(np.empty(shape, dtype) for shape, dtype in _shapes(codec, layers, size)))

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        return (self.codes, self.scales, self.norm)

    @property
    def size(self) -> int:
        return len(self.norm)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    def part(self, start: int, stop: int) -> HostRows:
        """Views of the rows [start, stop)."""
        return HostRows(*(array[start:stop] for array in self.arrays))

    def chosen(self, index: np.ndarray) -> HostRows:
        """Copies of the rows at index, int64 [k]."""
        return HostRows(*(array[index] for array in self.arrays))

    def copy_to(self, other: HostRows) -> None:
        """Copy the rows to others, without the interpreter's lock."""
        for mine, its in zip(self.arrays, other.arrays, strict=True):
            np.copyto(its, mine)


def _shapes(codec: Codec, layers: int, size: int) -> list[tuple[tuple[int, ...], Any]]:
    """Shape and dtype of codes, scales and norms."""
    return [
        ((size, layers, codec.code_width), np.dtype(codec.code_dtype)),
        ((size, layers, codec.scale_width), np.dtype(np.float16)),
        ((size, layers), np.dtype(np.float32)),
    ]


@dataclass(eq=False)
class HeldRows:
    """The rows of one sequence that have left the device, `size` of at most `most`, all in memory or all in a file.

    ended: they no longer count as those of a running sequence
    """

    most: int
    size: int = 0
    ended: bool = False
    memory: HostRows | None = None
    file: RowFile | None = None

    @property
    def counts(self) -> bool:
        """Whether they are in the memory of running sequences."""
        return self.file is None and not self.ended


@dataclass(frozen=True)
class Piece:
    """`size` rows of a sequence, number `start` and those after it."""

    held: HeldRows
    start: int
    size: int


class RowKeeper:
    """Keeps the rows of running sequences, at most `limit` bytes of them in memory.

    directory: where files are made; None: the system's directory for temporary files
    peak: most bytes in memory so far; spilled: bytes written to files
    """

    def __init__(
        self, codec: Codec, layers: int, limit: float = math.inf, directory: Path | None = None
    ) -> None:
        self.codec, self._layers = codec, layers
        self._limit, self._directory = limit, directory
        self._row_bytes = layers * codec.row_bytes
        self._held: set[HeldRows] = set()
        self._bytes = self.peak = self.spilled = 0
        self._copiers = _new_copiers()

    @classmethod
    def beside(cls, store: Place, codec: Codec, layers: int, host_bytes: float) -> RowKeeper:
        """For a capture into this store: files are made beside it if it is a directory, else where temporary files are.

        host_bytes: for all rows that are not in the store
        """
        beside = Path(os.path.realpath(store)).parent if isinstance(store, Path) else None
        return cls(codec, layers, host_bytes * RUNNING_PART, beside)

    def add(self, pieces: Sequence[Piece], rows: HostRows) -> None:
        """Copy rows of some sequences, those of each piece after those of the piece before it.

        EngineError if others of its sequence should have come before. WriteError if they must go to a file, and it
        cannot be written.
        """
        self._make_room(pieces)
        jobs: list[_Job] = []
        begin = 0
        for piece in pieces:
            held, end = piece.held, begin + piece.size
            if piece.start != held.size or held.size + piece.size > held.most:
                raise EngineError(
                    f"row {piece.start} of a sequence left the device when {held.size} had left"
                )
            jobs += self._copies(held, held.size, rows.part(begin, end))
            held.size += piece.size
            if held.counts:
                self._bytes += piece.size * self._row_bytes
            begin = end
        self.peak = max(self.peak, self._bytes)
        self._do(jobs)

    def end(self, sequences: Sequence[HeldRows]) -> None:
        """These sequences have ended: what is in memory of them, or still comes, no longer counts."""
        for held in sequences:
            if held.counts:
                self._bytes -= held.size * self._row_bytes
            held.ended = True

    def norms(self, held: HeldRows) -> np.ndarray:
        """float32 [size, L]: the norms of all rows held."""
        return self._rows(held).norm

    def take(self, held: HeldRows, index: np.ndarray | None) -> HostRows:
        """The rows at `index` (int64 [k], ascending; None: all); the sequence is held no longer.

        Rows in a file come as read-only views of it, and it is gone when they are.
        """
        try:
            if index is None:
                return self._rows(held)
            if held.file is None:
                return self._rows(held).chosen(index)
            held.file.compact(index)
            return held.file.rows(len(index))
        finally:
            self.drop(held)

    def drop(self, held: HeldRows) -> None:
        """Forget a sequence."""
        self.end([held])
        self._held.discard(held)
        held.memory = None
        if held.file is not None:
            held.file.close()
        held.file = None

    def close(self) -> None:
        """Forget all sequences."""
        self._copiers.shutdown()
        self._copiers = _new_copiers()
        for held in list(self._held):
            self.drop(held)

    def _rows(self, held: HeldRows) -> HostRows:
        if held.file is not None:
            return held.file.rows(held.size)
        whole = held.memory or HostRows.empty(self.codec, self._layers, 0)
        return whole.part(0, held.size)

    def _make_room(self, pieces: Sequence[Piece]) -> None:
        """Move the largest sequences to files until these pieces fit the memory, or those left go to files as well."""
        coming: Counter[HeldRows] = Counter()
        for piece in pieces:
            coming[piece.held] += piece.size
        self._held.update(coming)
        for held, size in coming.items():  # its memory may have no room for the last rows
            if held.ended and held.memory is not None and held.size + size > held.memory.size:
                self._spill(held)
        new = sum(size for held, size in coming.items() if held.counts)
        while new and self._bytes + new * self._row_bytes > self._limit:
            most = max(
                (held for held in self._held if held.counts), key=lambda each: each.size + coming[each]
            )
            new -= coming[most]
            self._spill(most)

    def _spill(self, held: HeldRows) -> None:
        """Move a sequence to a file, where its further rows will go."""
        rows = self._rows(held)
        self._bytes -= held.counts * rows.nbytes
        try:
            _allow_open_files()
            held.file = RowFile(self.codec, self._layers, held.most, self._directory)
        except OSError as error:
            raise self._not_written(error) from error
        self._do(self._copies(held, 0, rows))
        held.memory = None

    def _copies(self, held: HeldRows, start: int, rows: HostRows) -> list[_Job]:
        """The copies that put rows where those of a sequence are, from number `start` on."""
        step = max(_COPIED_BYTES // self._row_bytes, 1)
        parts = [(at, rows.part(at, at + step)) for at in range(0, rows.size, step)]
        if held.file is not None:
            self.spilled += rows.nbytes
            return [partial(held.file.write, start + at, part) for at, part in parts]
        if held.memory is None:
            most = held.most if held.ended else min(held.most, self._limit / self._row_bytes)
            held.memory = HostRows.empty(self.codec, self._layers, int(most))
        memory = held.memory.part(start, start + rows.size)
        return [partial(part.copy_to, memory.part(at, at + step)) for at, part in parts]

    def _do(self, jobs: Sequence[_Job]) -> None:
        """Make these copies."""
        try:
            if len(jobs) < 2:
                return _each(jobs)
            share = -(-len(jobs) // _COPIERS)  # neighbours, which may write the same page
            for _ in self._copiers.map(_each, [jobs[i : i + share] for i in range(0, len(jobs), share)]):
                pass
        except OSError as error:
            raise self._not_written(error) from error

    def _not_written(self, error: OSError) -> WriteError:
        place = self._directory or tempfile.gettempdir()
        return WriteError(
            f"{place}: rows of running sequences do not fit --host-memory, and cannot be written here: "
            f"{error.strerror or error}: mend the cause; a capture goes on with --resume"
        )


def _new_copiers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_COPIERS, "rows-copied")


def _each(jobs: Sequence[_Job]) -> None:
    for job in jobs:
        job()


def _allow_open_files() -> None:
    """Raise the soft limit of open files, often 1,024, to what this process may have: each sequence has a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 1 << 16 if hard == resource.RLIM_INFINITY else min(hard, 1 << 16)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


class RowFile:
    """A file of one sequence's rows, with room for `most` of them. They can be read in place, and where none have been
    written the file takes no space. OSError if it cannot be written."""

    def __init__(self, codec: Codec, layers: int, most: int, directory: Path | None) -> None:
        self._shapes = _shapes(codec, layers, most)
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in self._shapes]
        self._start = [sizes[2] + sizes[1], sizes[2], 0]  # the widest numbers first, so that all are aligned
        self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115
        os.ftruncate(self._file.fileno(), sum(sizes))

    def write(self, start: int, rows: HostRows) -> None:
        """Put rows in their places, from number `start` on. Several threads may write different rows."""
        for array, begin in zip(rows.arrays, self._start, strict=True):
            if rest := array.nbytes:
                at, data = begin + start * (rest // len(array)), array.data.cast("B")
                while rest:  # the disk is full, or a signal came
                    done = os.pwrite(self._file.fileno(), data, at)
                    at, data, rest = at + done, data[done:], rest - done

    def compact(self, index: np.ndarray) -> None:
        """Keep only the rows at index, int64 [k], ascending, as the first ones."""
        rows = self.rows(int(index[-1]) + 1 if len(index) else 0)
        step = max(_COPIED_BYTES // max(rows.part(0, 1).nbytes, 1), 1)
        for at in range(
            0, len(index), step
        ):  # a row never moves back, so each is read before it is overwritten
            self.write(at, rows.chosen(index[at : at + step]))

    def rows(self, size: int) -> HostRows:
        """The first rows, as read-only views of the file that stay valid when it is closed."""
        memory = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        arrays = [
            np.frombuffer(memory, dtype, math.prod(shape), start).reshape(shape)[:size]
            for (shape, dtype), start in zip(self._shapes, self._start, strict=True)
        ]
        return HostRows(*arrays)

    def close(self) -> None:
        """Give the file up: its space is free once nothing views it."""
        self._file.close()
