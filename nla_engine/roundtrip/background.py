"""Background work: jobs run one after another, on a thread (and a CUDA stream) of their own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext

import torch

from nla_engine.engine.streams import enter_device

#: Most jobs queued or running, which bounds the memory that they hold.
_MOST = 3


class AtOnce:
    """Runs each job when it is submitted, on the thread that submits it: ranks of a group need one order of work."""

    def submit(self, job: Callable[[], None]) -> None:
        """Run a job."""
        job()

    def __enter__(self) -> AtOnce:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is left to wait for."""


class Background:
    """A context manager; leaving it waits for the jobs. The first error is raised by the next `submit`, or on leaving.

    No job runs after one that failed: it would write in the wrong place.
    """

    def __init__(self, stream: torch.cuda.Stream | None = None) -> None:
        """stream: the CUDA stream of the jobs."""
        device = torch.device("cpu") if stream is None else stream.device
        self._pool = ThreadPoolExecutor(1, "background", enter_device, (device,))
        self._jobs: deque[Future[None]] = deque()
        self._failed = False
        self._stream = stream

    def submit(self, job: Callable[[], None]) -> None:
        """Queue a job; waits while too many are queued or running."""
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
                    self._stream.synchronize()  # a job's GPU work ends before its memory is freed
        except BaseException:
            self._failed = True
            raise

    def __enter__(self) -> Background:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            while kind is None and self._jobs:
                self._jobs.popleft().result()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)
