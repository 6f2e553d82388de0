"""Which other text stands beside each text: of another sequence if there is one, drawn by sequence and position."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from nla_engine.referee.partners import partners


def other_texts(
    rows: np.ndarray, sequence: np.ndarray, position: np.ndarray, seed: int, like: np.ndarray | None = None
) -> np.ndarray:
    """int64 [n]: for each of n texts the place of one of another row; -1 if all are of one row.

    rows, sequence, position: int64 [n], of each text. like: int64 [n]; one with the same number, if there is one
    """
    several = len(np.unique(sequence)) > 1
    own = sequence if several else rows
    found = partners(np.zeros(len(rows), np.int64), own, position, sequence, seed)
    if like is None:
        return found
    alike = partners(like, own, position, sequence, seed)
    return np.where(alike >= 0, alike, found)


def named_others(others: Mapping[int, int] | None) -> dict[str, Any]:
    """For the identity of a run: which other rows were named for its rows; nothing if they are drawn."""
    if others is None:
        return {}
    return {"others": hashlib.sha256(repr(sorted(others.items())).encode()).hexdigest()[:16]}
