"""The rows of a run, and those of them that its controls are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from nla_engine.config import StageTwoOptions, WritingOptions
from nla_engine.roundtrip.rows import follow_rows, nothing_selected, select_rows
from nla_engine.roundtrip.slots import Slots
from nla_engine.store import CaptureStore
from nla_engine.store.views.draw import draw_rows

#: Rows in the sample of the controls, at most.
CONTROL_ROWS = 1024


@dataclass(frozen=True)
class Chosen:
    """Rows to explain, by sequence and position. segments: int64 arrays, those of a store that grows as they come;
    sample: those of the controls.

    rows: all of them, int64 [n]; None if they are not known yet
    """

    segments: Iterator[np.ndarray]
    sample: np.ndarray
    rows: np.ndarray | None


def choose(
    store: CaptureStore,
    options: WritingOptions,
    rows: np.ndarray | None,
    wanted: int,
    announce: Callable[[str], None],
) -> Chosen:
    """The given rows, or those that the options select. wanted: most rows in the sample of the controls."""
    slots, left_out = slots_of(options), 0

    def keep(found: np.ndarray) -> np.ndarray:
        nonlocal left_out
        if slots is None:
            return found
        kept = slots.complete(store, found)
        left_out += len(found) - len(kept)
        return kept

    if slots is not None:
        slots.check(store)
    if rows is not None:
        rows = store.in_order(rows)
    elif not options.follow:
        rows = select_rows(store, options, keep)
    segments = follow_rows(store, options.where, announce, keep) if rows is None else iter([rows])
    if left_out:
        announce(f"{left_out:,} rows are left out: the store lacks a vector that --slots names for them")
    segments, sample = _control_sample(segments, options, wanted)
    if not len(sample):
        raise nothing_selected(options)
    return Chosen(segments, sample, rows)


def _control_sample(
    segments: Iterator[np.ndarray], options: WritingOptions, wanted: int
) -> tuple[Iterator[np.ndarray], np.ndarray]:
    """The segments again, and the rows of the controls: at random of all, or the first ones of a store that grows."""
    held: list[np.ndarray] = []
    for rows in segments:
        held.append(rows)
        if sum(map(len, held)) >= wanted:
            break
    rows = np.concatenate(held) if held else np.zeros(0, np.int64)
    sample = rows[:wanted] if options.follow else draw_rows(rows, wanted, options.seed)

    def again() -> Iterator[np.ndarray]:
        if len(rows):
            yield rows
        yield from segments

    return again(), sample


def slots_of(options: StageTwoOptions) -> Slots | None:
    """The vectors that enter one prompt, None if a row's own does."""
    given = options.slots if isinstance(options, WritingOptions) else None
    return None if given is None else Slots.parse(given)
