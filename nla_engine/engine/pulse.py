"""How far each rank of a group is, in a file that all of them see, so that one that hangs can be named.

A rank counts what it begins: calls, and what all ranks do together. A thread of it counts seconds, which shows that the
process runs at all.
"""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np

#: Seconds between two counts of the thread.
_TICK_SECONDS = 1.0
_FILE = "pulse"


def make_pulse(folder: Path, size: int) -> None:
    """The file, before any rank starts."""
    (folder / _FILE).write_bytes(bytes(16 * size))


def counts_of(folder: Path, size: int) -> np.ndarray:
    """int64 [size, 2], of every rank: what it began, and its seconds. It changes."""
    return np.memmap(folder / _FILE, np.int64, "r+", shape=(size, 2))


class Pulse:
    """One rank's."""

    def __init__(self, folder: Path, rank: int, size: int) -> None:
        self._own = counts_of(folder, size)[rank]
        self._closed = threading.Event()
        threading.Thread(target=self._tick, name="pulse", daemon=True).start()

    def beat(self) -> None:
        """It begins something."""
        self._own[0] += 1

    def _tick(self) -> None:
        while not self._closed.wait(_TICK_SECONDS):
            self._own[1] += 1

    def close(self) -> None:
        """Count no longer."""
        self._closed.set()


class Hangs:
    """Which rank has hung, by looks at all counts, one every second: time in which nothing runs does not count."""

    def __init__(self, counts: np.ndarray) -> None:
        self._counts = counts
        self._before = counts.copy()
        self._still = np.zeros_like(self._before)

    def look(self, most: int) -> str:
        """Of the first rank that did not move for `most` looks what it does not do; empty: none.

        A rank that began as much as rank 0 waits for others, or for its device.
        """
        now = self._counts.copy()
        still = now == self._before
        still[:, 0] &= now[:, 0] < now[0, 0]  # one that has nothing to begin is not waited for
        self._still = np.where(still, self._still + 1, 0)
        self._before = now
        for rank in range(1, len(now)):
            begun, seconds = self._still[rank]
            if seconds >= most:
                return f"rank {rank} has not responded for {most} s: its process is stopped or hangs"
            if begun >= most and not seconds and now[rank, 0] < now[0, 0]:
                return f"rank {rank} hangs: the others have waited {most} s for it"
        return ""
