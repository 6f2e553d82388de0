"""Which block of the cache each slot holds for which of its places, counted on the host, without tensors.

A slot gets blocks as its sequence grows, and returns them when the sequence ends. Blocks that several sequences only
read, full ones of a prompt that they share, are held by all of them and are free once the last has returned them.
"""

from __future__ import annotations

import heapq

import numpy as np


class Blocks:
    """`count` blocks of `size` places, numbered from 0.

    Block `count` takes what is written to places that a slot has no block for. Its keys are never seen: a sequence
    that has ended may be computed for some more steps.
    """

    def __init__(self, count: int, size: int, slots: int) -> None:
        self.count, self.size = count, size
        self._free = list(range(count))  # a heap: the lowest numbers come first
        self._uses = [0] * count
        self._held: list[list[int]] = [[] for _ in range(slots)]
        self._changed: dict[tuple[int, int], int] = {}

    @property
    def free(self) -> int:
        return len(self._free)

    def of(self, places: int) -> int:
        """Blocks that hold so many places."""
        return -(-places // self.size)

    def room(self, slot: int) -> int:
        """Places that a slot has blocks for."""
        return len(self._held[slot]) * self.size

    def held(self, slot: int) -> list[int]:
        """The blocks of a slot, in the order of its places."""
        return list(self._held[slot])

    def grow(self, slot: int, places: int) -> None:
        """Give a slot the blocks that it lacks for so many places. There must be as many free ones."""
        held = self._held[slot]
        for _ in range(self.of(places) - len(held)):
            block = heapq.heappop(self._free)
            self._uses[block] = 1
            self._changed[slot, len(held)] = block
            held.append(block)

    def share(self, source: int, target: int, places: int) -> None:
        """Let a slot without blocks hold those of another slot that so many places fill to the end."""
        for column, block in enumerate(self._held[source][: places // self.size]):
            self._uses[block] += 1
            self._changed[target, column] = block
            self._held[target].append(block)

    def release(self, slot: int) -> None:
        """Take all blocks of a slot back."""
        for column, block in enumerate(self._held[slot]):
            self._uses[block] -= 1
            self._changed[slot, column] = self.count
            if not self._uses[block]:
                heapq.heappush(self._free, block)
        self._held[slot] = []

    def changes(self) -> np.ndarray:
        """int64 [3, n]: slot, column and block of what has changed since the last call."""
        changed, self._changed = self._changed, {}
        return np.array([(*at, block) for at, block in changed.items()], np.int64).reshape(-1, 3).T.copy()

    def follow(self, changes: np.ndarray) -> None:
        """Hold what `changes` of another Blocks says, int64 [3, n]. Which blocks are free is not known then."""
        for slot, column, block in sorted(zip(*changes.tolist(), strict=True)):
            self._held[slot][column:] = (
                [] if block == self.count else [block, *self._held[slot][column + 1 :]]
            )
