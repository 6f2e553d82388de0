"""Which sequence numbers a store holds already: each may be there once."""

from __future__ import annotations

import numpy as np

from nla_engine.errors import StoreError


class Numbers:
    """A set of numbers, most of which follow each other from 0.

    following: one after the highest
    """

    def __init__(self) -> None:
        self.following = 0
        self._below = 0  # all below this are in the set
        self._beyond: set[int] = set()

    def __contains__(self, number: int) -> bool:
        return number < self._below or number in self._beyond

    def check(self, numbers: np.ndarray) -> None:
        """StoreError if one of these, int64 [k], is negative, or is there already, or twice."""
        new: set[int] = set()
        for number in numbers.tolist():
            if number < 0:
                raise StoreError(f"sequence {number}: numbers are counted from 0")
            if number in new or number in self:
                raise StoreError(f"sequence {number} is in the store already")
            new.add(number)

    def add(self, numbers: np.ndarray) -> None:
        """Take these, int64 [k]."""
        numbers = np.sort(numbers)
        self.following = max(self.following, int(numbers.max(initial=-1)) + 1)
        follow = numbers == self._below + np.arange(len(numbers))
        count = len(numbers) if follow.all() else int(np.argmin(follow))
        self._below += count
        self._beyond.update(numbers[count:].tolist())
        while self._below in self._beyond:
            self._beyond.remove(self._below)
            self._below += 1

    def missing(self, count: int) -> np.ndarray:
        """int64, ascending: the numbers below `count` that are not in the set."""
        rest = np.arange(self._below, count)
        return rest[~np.isin(rest, np.fromiter(self._beyond, np.int64, len(self._beyond)))]
