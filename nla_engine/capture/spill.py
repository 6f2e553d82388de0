"""Rows of running sequences on the host: in memory up to a limit, beyond it in files that have no name.

A file without a name is gone when it is closed or its process ends, however that happens, so no later run can find one.
Knows nothing of devices, and is used by one thread at a time.
"""

from __future__ import annotations

import math
import mmap
import os
import resource
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nla_engine.codec.rows import Codec
from nla_engine.errors import EngineError, WriteError
from nla_engine.store.objects import Place

#: The part of the host memory of a run that is for running sequences. The rest is for those that have ended.
RUNNING_PART = 1 / 4
#: Most buffers of one system call.
_MOST_BUFFERS = 512
#: Bytes that are moved at once inside a file.
_COMPACTED_BYTES = 1 << 22


@dataclass(frozen=True)
class HostRows:
    """n rows of L layers. codes [L, n, ...] in the codec's dtype, scales float16 [L, n, ...], norm float32 [L, n]."""

    codes: np.ndarray
    scales: np.ndarray
    norm: np.ndarray

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        return (self.codes, self.scales, self.norm)

    @property
    def size(self) -> int:
        return self.norm.shape[1]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    def copy(self) -> HostRows:
        return HostRows(*(array.copy() for array in self.arrays))

    def chosen(self, index: np.ndarray) -> HostRows:
        """Copies of the rows at index, int64 [k]."""
        return HostRows(*(array[:, index] for array in self.arrays))

    @staticmethod
    def joined(parts: Sequence[HostRows]) -> HostRows:
        """The rows of all parts, in their order. Copies unless there is one part."""
        if len(parts) == 1:
            return parts[0]
        return HostRows(
            *(np.concatenate(each, axis=1) for each in zip(*(p.arrays for p in parts), strict=True))
        )


@dataclass(eq=False)
class HeldRows:
    """The rows of one sequence that have left the device, of at most `most`: first those in `file`, then `parts`."""

    most: int
    size: int = 0
    nbytes: int = 0  # in memory
    parts: list[HostRows] = field(default_factory=list)
    file: RowFile | None = None


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
        self._held: set[HeldRows] = set()
        self._bytes = self.peak = self.spilled = 0

    @classmethod
    def beside(cls, store: Place, codec: Codec, layers: int, host_bytes: float) -> RowKeeper:
        """For a capture into this store: files are made beside it if it is a directory, else where temporary files are.

        host_bytes: for all rows that are not in the store
        """
        beside = Path(os.path.realpath(store)).parent if isinstance(store, Path) else None
        return cls(codec, layers, host_bytes * RUNNING_PART, beside)

    def add(self, held: HeldRows, start: int, rows: HostRows) -> None:
        """Copy the rows of a sequence from number `start` on. EngineError if others should have come before.

        WriteError if they must go to a file, and it cannot be written.
        """
        if start != held.size or start + rows.size > held.most:
            raise EngineError(f"row {start} of a sequence left the device when {held.size} had left")
        held.size += rows.size
        if rows.nbytes > self._limit:
            self._spill(held)
            self._write(held, [rows])
            return
        while self._bytes + rows.nbytes > self._limit:
            self._spill(max(self._held, key=lambda each: each.nbytes))
        held.parts.append(rows.copy())
        held.nbytes += rows.nbytes
        self._held.add(held)
        self._bytes += rows.nbytes
        self.peak = max(self.peak, self._bytes)

    def norms(self, held: HeldRows) -> np.ndarray:
        """float32 [L, size]: the norms of all rows held."""
        norms = [part.norm for part in held.parts]
        if held.file is not None:
            norms.insert(0, held.file.rows().norm)
        return np.concatenate(norms, axis=1)

    def take(self, held: HeldRows, index: np.ndarray | None, tail: HostRows) -> HostRows:
        """The rows at `index` (int64 [k], ascending; None: all) and then `tail`; the sequence is held no longer.

        If any are in a file, all are: the arrays are views of it, read-only, and it is gone when they are.
        """
        try:
            if held.file is None:
                if index is None:
                    return HostRows.joined([*held.parts, tail])
                return HostRows.joined([HostRows.joined(held.parts).chosen(index), tail])
            self._spill(held)
            if index is not None:
                held.file.compact(index)
            self._write(held, [tail])
            return held.file.rows()
        finally:
            self.drop(held)

    def drop(self, held: HeldRows) -> None:
        """Forget a sequence."""
        self._empty(held)
        self._held.discard(held)
        if held.file is not None:
            held.file.close()
        held.file = None

    def close(self) -> None:
        """Forget all sequences."""
        for held in list(self._held):
            self.drop(held)

    def _spill(self, held: HeldRows) -> None:
        """Move what is in memory of a sequence to its file."""
        if held.parts:
            self._write(held, held.parts)
            self._empty(held)

    def _empty(self, held: HeldRows) -> None:
        """Free what is in memory of a sequence."""
        self._bytes -= held.nbytes
        held.parts, held.nbytes = [], 0

    def _write(self, held: HeldRows, parts: Sequence[HostRows]) -> None:
        """Append to a sequence's file."""
        self._held.add(held)
        try:
            if held.file is None:
                _allow_open_files()
                held.file = RowFile(self.codec, self._layers, held.most, self._directory)
            self.spilled += held.file.append(parts)
        except OSError as error:
            place = self._directory or tempfile.gettempdir()
            raise WriteError(
                f"{place}: rows of running sequences do not fit --host-memory, and cannot be written here: "
                f"{error.strerror or error}: mend the cause; a capture goes on with --resume"
            ) from error


def _allow_open_files() -> None:
    """Raise the soft limit of open files, often 1,024, to what this process may have: each sequence has a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 1 << 16 if hard == resource.RLIM_INFINITY else min(hard, 1 << 16)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


class RowFile:
    """A file of one sequence's rows, with room for `most` of them. Each layer's are in one piece, so that they can be
    read in place; where none have been written the file takes no space. OSError if it cannot be written."""

    def __init__(self, codec: Codec, layers: int, most: int, directory: Path | None) -> None:
        self._shapes: list[tuple[tuple[int, ...], Any]] = [
            ((layers, most, codec.code_width), np.dtype(codec.code_dtype)),
            ((layers, most, codec.scale_width), np.dtype(np.float16)),
            ((layers, most), np.dtype(np.float32)),
        ]
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in self._shapes]
        self._start = [sizes[2] + sizes[1], sizes[2], 0]  # the widest numbers first, so that all are aligned
        self._layers, self._most, self._size = layers, most, 0
        self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115
        os.ftruncate(self._file.fileno(), sum(sizes))

    def append(self, parts: Sequence[HostRows]) -> int:
        """Write rows after those there. Returns the bytes written."""
        written = 0
        for at in range(0, len(parts), _MOST_BUFFERS):
            some = parts[at : at + _MOST_BUFFERS]
            for number in range(len(self._shapes)):
                for layer in range(self._layers):
                    buffers = [np.ascontiguousarray(part.arrays[number][layer]) for part in some]
                    written += self._write(buffers, self._place(number, layer, self._size))
            self._size += sum(part.size for part in some)
        return written

    def compact(self, index: np.ndarray) -> None:
        """Keep only the rows at index, int64 [k], ascending."""
        rows = self.rows()
        self._size = 0
        step = max(_COMPACTED_BYTES // rows.codes[:, :1].nbytes, 1)
        for at in range(
            0, len(index), step
        ):  # a row never moves back, so none is overwritten before it is read
            self.append([rows.chosen(index[at : at + step])])

    def rows(self) -> HostRows:
        """All rows, as views of the file that stay valid when it is closed."""
        memory = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        arrays = [
            np.frombuffer(memory, dtype, math.prod(shape), start).reshape(shape)[:, : self._size]
            for (shape, dtype), start in zip(self._shapes, self._start, strict=True)
        ]
        return HostRows(*arrays)

    def close(self) -> None:
        """Give the file up: its space is free once nothing views it."""
        self._file.close()

    def _place(self, number: int, layer: int, row: int) -> int:
        """Where a row of a layer starts in the file. number: of the array."""
        shape, dtype = self._shapes[number]
        width = math.prod(shape[2:]) * dtype.itemsize
        return self._start[number] + (layer * self._most + row) * width

    def _write(self, buffers: list[np.ndarray], at: int) -> int:
        """Write the buffers one after the other from `at` on."""
        total = sum(buffer.nbytes for buffer in buffers)
        done = os.pwritev(self._file.fileno(), [buffer.data for buffer in buffers], at) if total else 0
        if done < total:  # the disk is full, or a signal came
            rest = b"".join(buffer.tobytes() for buffer in buffers)
            while done < total:
                done += os.pwrite(self._file.fileno(), rest[done:], at + done)
        return total
