"""Work that goes on behind the main thread: one job after another, on a thread (and a CUDA stream) of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext

import torch

from nla_engine.engine.streams import enter_device

#: Jobs that may wait or be under way, so that what they hold stays bounded.
_MOST = 3


class Behind:
    """A context manager; leaving it waits for the jobs. The first error is raised by the next `submit`, or there.

    No job runs after one that failed: what it would write would stand in the wrong place.
    """

    def __init__(self, stream: torch.cuda.Stream | None = None) -> None:
        """stream: where the jobs' work on a GPU goes."""
        device = torch.device("cpu") if stream is None else stream.device
        self._pool = ThreadPoolExecutor(1, "behind", enter_device, (device,))
        self._jobs: deque[Future[None]] = deque()
        self._failed = False
        self._stream = stream

    def submit(self, job: Callable[[], None]) -> None:
        """Start a job after those before it; waits while too many are under way."""
        while self._jobs and (self._jobs[0].done() or len(self._jobs) >= _MOST):
            self._jobs.popleft().result()
        self._jobs.append(self._pool.submit(self._run, job))

    def _run(self, job: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
                job()
                if self._stream is not None:
                    self._stream.synchronize()  # nothing of a job is in flight when its memory is given back
        except BaseException:
            self._failed = True
            raise

    def __enter__(self) -> Behind:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            while kind is None and self._jobs:
                self._jobs.popleft().result()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)
