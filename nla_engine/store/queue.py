"""Files written in the background, a few at a time, so that syncing one does not hold up the next.

Writes and syncs release the interpreter's lock, so threads are enough.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

WRITE_THREADS = 8
#: Most bytes that wait to be written; beyond this `submit` waits for the disk.
MOST_WAITING_BYTES = 256 << 20


class WriteQueue:
    """Runs write jobs in any order. The first failure is raised by the next call of `submit` or `join`.

    As a context manager it joins at the end.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(WRITE_THREADS, thread_name_prefix="store-writer")
        self._waiting: deque[tuple[Future[None], int]] = deque()
        self._bytes = 0

    def submit(self, job: Callable[[], None], size: int) -> None:
        """Start a job that holds `size` bytes; waits while too many are pending. Raises the error of an earlier job."""
        while self._waiting and (self._waiting[0][0].done() or self._bytes + size > MOST_WAITING_BYTES):
            self._take()
        self._waiting.append((self._pool.submit(job), size))
        self._bytes += size

    def join(self) -> None:
        """Wait until every job is done. Raises the error of the first job that failed."""
        while self._waiting:
            self._take()

    def _take(self) -> None:
        """Wait for the oldest job."""
        job, size = self._waiting.popleft()
        self._bytes -= size
        job.result()

    def __enter__(self) -> WriteQueue:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.join()
        finally:
            self.close()

    def close(self) -> None:
        """Start no more jobs and wait for those under way; their errors no longer matter."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._waiting.clear()
