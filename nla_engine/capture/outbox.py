"""The way of rows from the device to the host while sequences run: a thread of its own, one portion after the other.

A portion is a copy on the device. It goes to pinned memory on a second stream, is checked, and is put in its place on
the host. If the host falls behind, `send` waits, so the memory of portions under way is bounded and none is lost.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from nla_engine.capture.spill import HeldRows, HostRows, RowKeeper
from nla_engine.capture.staging import UNWRITTEN, Rows
from nla_engine.engine.streams import enter_device, side_stream
from nla_engine.errors import EngineError
from nla_engine.sites import Site

#: Most bytes of a portion, and of the portions that are under way.
PORTION_BYTES, UNDERWAY_BYTES = 1 << 25, 1 << 29

_T = TypeVar("_T")


@dataclass(frozen=True)
class Piece:
    """`size` rows of a sequence, number `start` and those after it."""

    held: HeldRows
    start: int
    size: int


class Outbox:
    """Brings rows of L `layers` to `keeper`, which only this object's thread uses. most: rows of a portion."""

    def __init__(self, layers: Sequence[Site], keeper: RowKeeper, device: torch.device) -> None:
        self._layers, self.keeper, self._device = tuple(layers), keeper, device
        self.most = max(PORTION_BYTES // (keeper.codec.row_bytes * len(self._layers)), 1)
        self._thread = self._new_thread()
        self._underway: deque[tuple[Future[None], int]] = deque()
        self._bytes = 0
        self._error: BaseException | None = None
        self._pinned: tuple[torch.Tensor, ...] = ()

    def send(self, rows: Rows, pieces: Sequence[Piece]) -> None:
        """Bring these to the host: of each piece the rows of all layers, [L * size], one piece after the other.

        At most `most` rows. Raises the error of an earlier portion.
        """
        size = sum(tensor.nbytes for tensor in rows.tensors)
        while self._underway and (self._underway[0][0].done() or self._bytes + size > UNDERWAY_BYTES):
            done, its_size = self._underway.popleft()
            self._bytes -= its_size
            done.result()
        self._underway.append((self._submit(self._receive, rows, pieces, self._now(rows)), size))
        self._bytes += size

    def fetch(self, rows: Rows, use: Callable[[list[np.ndarray]], _T]) -> Future[_T]:
        """Bring these to the host, as arrays of their own, and call `use` with codes, scales and norms once all
        that was sent before has arrived."""
        return self._submit(self._fetch, rows, use, self._now(rows))

    def call(self, function: Callable[..., _T], *given: Any) -> Future[_T]:
        """Call a method of the keeper once all that was sent has arrived."""
        return self._submit(function, *given)

    def _now(self, rows: Rows) -> torch.cuda.Event | None:
        """This point of the device's queue, at which the rows are there; None on a CPU."""
        if not rows.norm.is_cuda:
            return None
        now = torch.cuda.Event()
        now.record(torch.cuda.current_stream(self._device))
        return now

    def _new_thread(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, "rows-leave", lambda: enter_device(self._device))

    def close(self) -> None:
        """Wait for the thread, and forget all rows. Errors no longer matter. It may be used again."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._thread, self._bytes, self._error = self._new_thread(), 0, None
        self._underway.clear()
        self.keeper.close()

    def _submit(self, function: Callable[..., _T], *given: Any) -> Future[_T]:
        return self._thread.submit(self._run, function, *given)

    def _run(self, function: Callable[..., _T], *given: Any) -> _T:
        """After an error nothing more is done: rows are missing."""
        if self._error is not None:
            raise self._error
        try:
            return function(*given)
        except BaseException as error:
            self._error = error
            raise

    def _receive(self, rows: Rows, pieces: Sequence[Piece], copied: torch.cuda.Event | None) -> None:
        if copied is not None and not self._pinned:
            room = self.most * len(self._layers)
            self._pinned = tuple(
                torch.empty((room, *tensor.shape[1:]), dtype=tensor.dtype, pin_memory=True)
                for tensor in rows.tensors
            )
        arrays = self._on_host(rows, copied, self._pinned)
        norm, start = arrays[2], 0
        for piece in pieces:
            end = start + len(self._layers) * piece.size
            self._check(norm[start:end].reshape(len(self._layers), -1))
            shaped = [
                array[start:end].reshape(len(self._layers), piece.size, *array.shape[1:]) for array in arrays
            ]
            self.keeper.add(piece.held, piece.start, HostRows(*shaped))
            start = end

    def _fetch(
        self, rows: Rows, use: Callable[[list[np.ndarray]], _T], copied: torch.cuda.Event | None
    ) -> _T:
        own: Sequence[torch.Tensor] = ()
        if copied is not None:
            own = [torch.empty(each.shape, dtype=each.dtype, pin_memory=True) for each in rows.tensors]
        return use(self._on_host(rows, copied, own))

    def _check(self, norm: np.ndarray) -> None:
        """EngineError if a row of a piece was never written. norm: [L, size]."""
        for layer, missing in zip(self._layers, (norm == UNWRITTEN).sum(1), strict=True):
            if missing:
                raise EngineError(f"{layer.label}: {missing} rows that left the device were never written")

    def _on_host(
        self, rows: Rows, copied: torch.cuda.Event | None, pinned: Sequence[torch.Tensor]
    ) -> list[np.ndarray]:
        """The rows in this pinned memory; on a CPU, where they are. They stay alive, and so are not used again, until
        they have been copied."""
        if copied is None:
            return self._in_codec(rows.tensors)
        stream = side_stream(self._device)
        stream.wait_event(copied)
        with torch.inference_mode(), torch.cuda.stream(stream):
            for host, tensor in zip(pinned, rows.tensors, strict=True):
                host[: len(tensor)].copy_(tensor, non_blocking=True)
        stream.synchronize()
        return self._in_codec([host[: len(rows.norm)] for host in pinned])

    def _in_codec(self, tensors: Sequence[torch.Tensor]) -> list[np.ndarray]:
        """Codes, scales and norms as arrays, the codes in the codec's dtype."""
        codes, scales, norm = (tensor.numpy() for tensor in tensors)
        return [codes.view(self.keeper.codec.code_dtype), scales, norm]
