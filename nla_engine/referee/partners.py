"""Other rows that stand in for a row: drawn by the seed, the sequence's number and the position.

Where rows lie in a store, and which others are selected in what order, plays no part beyond which ones there are.
"""

from __future__ import annotations

import numpy as np


def partners(
    group: np.ndarray, own: np.ndarray, position: np.ndarray, sequence: np.ndarray, seed: int
) -> np.ndarray:
    """int64 [n]: for each of n rows the place of another with the same `group` and another `own`; -1 without one.

    group, own, position, sequence: int64 [n]. Each of those that qualify is as likely as any other.
    """
    order = np.lexsort((position, sequence, own, group))
    groups, owns = group[order], own[order]
    place = np.arange(len(order))
    first, last = _runs(np.diff(groups) != 0)
    start, end = _runs((np.diff(groups) != 0) | (np.diff(owns) != 0))
    others = (last - first) - (end - start)
    found = np.full(len(order), -1, np.int64)
    for at in place[others > 0]:
        row = order[at]
        drawn = first[at] + _below(int(others[at]), seed, int(sequence[row]), int(position[row]))
        found[row] = order[drawn if drawn < start[at] else drawn + end[at] - start[at]]
    return found


def _runs(change: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each place the [start, end) of its run. change: bool [n - 1], where a new run begins."""
    bounds = np.concatenate([[0], np.flatnonzero(change) + 1, [len(change) + 1]])
    sizes = np.diff(bounds)
    return np.repeat(bounds[:-1], sizes), np.repeat(bounds[1:], sizes)


def _below(count: int, seed: int, sequence: int, position: int) -> int:
    """A number below `count`, the same for the same row and seed."""
    bits = np.random.Philox(key=seed, counter=[position, sequence, 0, 0])
    return int(np.random.Generator(bits).integers(count))


def drawn_sequences(sequence: np.ndarray, position: np.ndarray, count: int, seed: int) -> np.ndarray:
    """int64 [m], m <= count: places of rows, each of another sequence, drawn by the seed.

    sequence, position: int64 [n]
    """
    order = np.lexsort((position, sequence))
    numbers, first, size = np.unique(sequence[order], return_index=True, return_counts=True)
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(numbers))[:count]
    return np.array([order[first[i] + rng.integers(size[i])] for i in chosen], np.int64)
