"""A random sample of rows or sequences, the same for the same seed."""

from __future__ import annotations

import numpy as np


def draw_rows(rows: np.ndarray, count: int, seed: int) -> np.ndarray:
    """At most `count` of the numbers, drawn by the seed, ascending; all of them if there are no more."""
    if len(rows) <= count:
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, count, replace=False))
