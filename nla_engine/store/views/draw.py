"""The order of rows that does not depend on when they were stored, and random samples in that order."""

from __future__ import annotations

import numpy as np

from nla_engine.store.reader import StoreReader


def in_order(store: StoreReader, rows: np.ndarray) -> np.ndarray:
    """Row numbers, int64 [n], by the number of their sequence and their position.

    Rows lie in a store in the order in which their sequences ended, which depends on the batch size of the capture.
    """
    sequence, position = (StoreReader.column(store, name)[rows] for name in ("sequence", "position"))
    return rows[np.lexsort((position, sequence))]


def draw_rows(rows: np.ndarray, count: int, seed: int) -> np.ndarray:
    """At most `count` of the numbers, drawn by the seed, in their order; all of them if there are no more.

    The draw is of places, so rows that are `in_order` give the same rows however they are stored.
    """
    if len(rows) <= count:
        return rows
    return rows[np.sort(np.random.default_rng(seed).choice(len(rows), count, replace=False))]
