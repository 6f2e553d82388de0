"""Files written in the background, a few at a time, so that syncing one does not hold up the next.

Writes and syncs release the interpreter, so threads are enough. Knows nothing of what a file holds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

WRITE_THREADS = 8
#: Files that may wait; with shards of at most 16 MiB this bounds what they hold in memory.
MOST_WAITING = 16


class WriteQueue:
    """Runs write jobs in no order. The first failure is raised by the next call of `submit` or `join`.

    As a context manager it joins at the end.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(WRITE_THREADS, thread_name_prefix="store-writer")
        self._waiting: deque[Future[None]] = deque()

    def submit(self, job: Callable[[], None]) -> None:
        """Start a job; waits while too many are under way. Raises what an earlier job raised."""
        while self._waiting and (self._waiting[0].done() or len(self._waiting) >= MOST_WAITING):
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(job))

    def join(self) -> None:
        """Wait until every job is done. Raises what the first that failed raised."""
        while self._waiting:
            self._waiting.popleft().result()

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
