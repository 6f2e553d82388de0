"""The way of rows from the device to the host: a thread of its own, one portion after the other.

A portion is a copy on the device. It goes to pinned memory on a second stream, is checked, and is put in its place on
the host. If the host falls behind, `send` waits, so the memory of portions under way is bounded and none is lost.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from nla_engine.capture.spill import HostRows, Piece, RowKeeper
from nla_engine.capture.staging import UNWRITTEN, Rows
from nla_engine.engine.streams import enter_device, side_stream
from nla_engine.errors import EngineError
from nla_engine.sites import Site

#: Most bytes of a portion, and of the portions that are under way.
PORTION_BYTES, UNDERWAY_BYTES = 1 << 25, 1 << 29

_T = TypeVar("_T")


class Outbox:
    """Brings rows of L `layers` to `keeper`, which only this object's thread uses. most: rows of a portion."""

    def __init__(self, layers: Sequence[Site], keeper: RowKeeper, device: torch.device) -> None:
        self._layers, self.keeper, self._device = tuple(layers), keeper, device
        self.most = max(PORTION_BYTES // (keeper.codec.row_bytes * len(self._layers)), 1)
        self._thread = self._new_thread()
        self._underway: deque[tuple[Future[None], int]] = deque()
        self._bytes = 0
        self._error: BaseException | None = None
        self._pinned: list[torch.Tensor] = []

    def prepare(self, like: Rows) -> None:
        """Allocate pinned memory for a portion of rows such as these. That is slow, and may hold the device up."""
        if like.norm.is_cuda and not self._pinned:
            room = self.most * len(self._layers)
            self._pinned = [
                torch.empty((room, *tensor.shape[1:]), dtype=tensor.dtype, pin_memory=True)
                for tensor in like.tensors
            ]

    def send(self, rows: Rows, pieces: Sequence[Piece]) -> None:
        """Bring these to the host: rows of all layers, at most `most`, those of one piece after the other.

        Raises the error of an earlier portion.
        """
        size = sum(tensor.nbytes for tensor in rows.tensors)
        while self._underway and (self._underway[0][0].done() or self._bytes + size > UNDERWAY_BYTES):
            done, its_size = self._underway.popleft()
            self._bytes -= its_size
            done.result()
        self.prepare(rows)
        self._underway.append((self.call(self._receive, rows, pieces, self._now(rows)), size))
        self._bytes += size

    def call(self, function: Callable[..., _T], *given: Any) -> Future[_T]:
        """Call a function, which may use the keeper, once all that was sent has arrived."""
        return self._thread.submit(self._run, function, *given)

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
        arrived = self._on_host(rows, copied)
        for layer, missing in zip(self._layers, (arrived.norm == UNWRITTEN).sum(0), strict=True):
            if missing:
                raise EngineError(f"{layer.label}: {missing} rows that left the device were never written")
        self.keeper.add(pieces, arrived)

    def _on_host(self, rows: Rows, copied: torch.cuda.Event | None) -> HostRows:
        """The rows in pinned memory; on a CPU, where they are. They stay alive, and so are not used again, until they
        have been copied."""
        tensors: Sequence[torch.Tensor] = rows.tensors
        if copied is not None:
            tensors = [host[: len(rows.norm)] for host in self._pinned]
            stream = side_stream(self._device)
            stream.wait_event(copied)
            with torch.inference_mode(), torch.cuda.stream(stream):
                for host, tensor in zip(tensors, rows.tensors, strict=True):
                    host.copy_(tensor, non_blocking=True)
            stream.synchronize()
        shape = (len(rows.norm) // len(self._layers), len(self._layers))
        codes, scales, norm = (tensor.numpy().reshape(*shape, *tensor.shape[1:]) for tensor in tensors)
        return HostRows(codes.view(self.keeper.codec.code_dtype), scales, norm)
