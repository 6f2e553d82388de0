"""The rows that all sides have, found by what they are: (store, sequence, position, layer), never by their place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nla_engine.errors import RequestError
from nla_engine.referee.evidence import Evidence


@dataclass(frozen=True)
class Matched:
    """rows: of each side, int64 [n], the places of the shared rows in it; left_out: of each side, how many are not.

    other_stores: whether the sides are of several stores, whose rows are the same by content
    """

    rows: Sequence[np.ndarray]
    left_out: Sequence[int]
    other_stores: bool


def match(sides: Sequence[Evidence], across_layers: bool = False) -> Matched:
    """RequestError for sides of different layers, without a shared row, or of stores whose rows differ."""
    first = sides[0]
    layers = {side.site for side in sides}
    if len(layers) > 1 and not across_layers:
        other = next(side for side in sides if side.site != first.site)
        raise RequestError(
            f"{other.name}: is about {other.site.label}, {first.name} about {first.site.label}: --across-layers "
            "compares them all the same"
        )
    numbers = [{place: at for at, place in enumerate(side.places)} for side in sides]
    shared = sorted(set.intersection(*(set(number) for number in numbers)))
    if not shared:
        raise RequestError(
            f"{', '.join(side.name for side in sides)}: have no row in common: compare tables of the same rows"
        )
    rows = [np.array([number[place] for place in shared], np.int64) for number in numbers]
    for side, at in zip(sides[1:], rows[1:], strict=True):
        _check_same(first, rows[0], side, at)
    return Matched(
        rows,
        [side.size - len(shared) for side in sides],
        len({side.store for side in sides}) > 1,
    )


def _check_same(first: Evidence, at: np.ndarray, side: Evidence, place: np.ndarray) -> None:
    """RequestError unless the tokens of the rows are the same, and in one layer the vectors' norms too."""
    names = ["token", "next_token", "generated", *(["norm"] if side.site == first.site else [])]
    for name in names:
        mine, other = first.rows[name][at], side.rows[name][place]
        equal = (mine == other) | ((mine != mine) & (other != other))
        if not np.all(equal):
            where = int(np.flatnonzero(~np.asarray(equal, bool))[0])
            sequence, position = (int(first.rows[key][at[where]]) for key in ("sequence", "position"))
            if side.store != first.store:
                raise RequestError(
                    f"{side.name}: is about another store than {first.name}, and its rows are others ({name} of "
                    f"sequence {sequence}, position {position}): compare tables of one store"
                )
            raise RequestError(
                f"{side.name}: has another {name} than {first.name} at sequence {sequence}, position {position}: make "
                "the tables again"
            )
