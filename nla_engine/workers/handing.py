"""Which worker has which items: handed out in small ranges, taken back from workers that die, each done once."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Sequence

import numpy as np

from nla_engine.errors import EngineError

#: Most items of a range, unless it is said, and the part of a worker's share that one range is at most: so none has too
#: many at the end.
RANGE, _PART = 128, 4
#: An item that was with so many workers when they died is not tried again.
MOST_DEATHS = 3


class Handing:
    """items: ascending, each once; together: items with the same number // together are best done by one worker.
    most: items of a range

    done: items with a result; again: items that were taken back from a worker that died, each time they were
    One thread at a time may use it.
    """

    def __init__(
        self, items: Sequence[int] | np.ndarray, workers: int, together: int = 1, most: int = RANGE
    ) -> None:
        self._items, self._at, self._together, self._most = items, 0, together, most
        self._back: deque[int] = deque()
        self._with: dict[int, set[int]] = {}  # by worker: items whose results have not arrived
        self._unfinished: dict[int, int] = {}  # how many of them it had not finished when it last asked
        self._deaths: Counter[int] = Counter()
        self.workers = workers
        self.done = self.again = 0

    @property
    def finished(self) -> bool:
        """Whether every item has its result."""
        return self.done == len(self._items)

    def take(self, worker: int, unfinished: int | None = None, ahead: bool = False) -> list[int]:
        """The next items for a worker; none if nothing waits, or the others have too few.

        unfinished: how many of its items the worker has not finished; None: all whose results have not arrived
        ahead: it needs them later; then enough stay for each worker to have as many again as it has now
        """
        mine = self._with.setdefault(worker, set())
        self._unfinished[worker] = len(mine) if unfinished is None else unfinished
        waiting = len(self._items) - self._at + len(self._back)
        running = sum(map(self._unfinished_of, self._with))
        share = math.ceil((waiting + running) / max(self.workers, 1))
        room = waiting - running if ahead else max(share, 1) - self._unfinished_of(worker)
        most = min(max(share // _PART, 1), self._most, room)
        taken: list[int] = []
        while len(taken) < room and (item := self._next()) is not None:
            if len(taken) >= most and item // self._together != taken[-1] // self._together:
                break
            self._step()
            taken.append(item)
        mine.update(taken)
        self._unfinished[worker] += len(taken)
        return taken

    def _unfinished_of(self, worker: int) -> int:
        """At most how many items a worker has not finished."""
        return min(self._unfinished.get(worker, 0), len(self._with[worker]))

    def _next(self) -> int | None:
        """The item that comes next, those taken back first."""
        if self._back:
            return self._back[0]
        return int(self._items[self._at]) if self._at < len(self._items) else None

    def _step(self) -> None:
        if self._back:
            self._back.popleft()
        else:
            self._at += 1

    def end(self, worker: int, item: int) -> None:
        """A worker has the result of an item. EngineError if it did not have the item."""
        if item not in self._with.get(worker, ()):
            raise EngineError(f"a worker returned {item}, which it did not have")
        self._with[worker].remove(item)
        self.done += 1

    def died(self, worker: int) -> tuple[list[int], list[int]]:
        """Take a worker's items back. Returns them, ascending, and those that were lost too often."""
        lost = sorted(self._with.pop(worker, ()))
        self._unfinished.pop(worker, None)
        self._deaths.update(lost)
        self.again += len(lost)
        self._back = deque(sorted([*lost, *self._back]))
        return lost, [item for item in lost if self._deaths[item] >= MOST_DEATHS]
