"""Which rows of a store are explained: the selected ones, or those that a writer is still adding."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nla_engine.config import (
    AskOptions,
    ClaimsOptions,
    ClausesOptions,
    ControlsOptions,
    LensOptions,
    PatchOptions,
    WritingOptions,
)
from nla_engine.errors import EngineError, RequestError, StoreError, WhereRecordError
from nla_engine.roundtrip import draws
from nla_engine.store import CaptureStore, LayerReader, RowFlag, WriterWatch
from nla_engine.store.format import flagged
from nla_engine.store.objects import place

#: Seconds between two looks at a store that is being written.
POLL_SECONDS = 1.0


def row_columns(store: CaptureStore, layer: LayerReader, rows: np.ndarray) -> dict[str, Any]:
    """What tables say of rows, int64 [n], and of the tokens that they belong to. layer: of their norm."""
    return token_columns(store, rows) | {"norm": layer.norm_at(rows)}


def token_columns(store: CaptureStore, rows: np.ndarray) -> dict[str, Any]:
    """What every table says of the tokens of rows, int64 [n]."""
    flags = store.column("flags")[rows]
    return {
        "row": rows,
        "sequence": store.column("sequence")[rows],
        "position": store.column("position")[rows],
        "token": store.token_text(store.column("token_id")[rows]),
        "next_token": store.token_text(store.column("next_token_id")[rows]),
        "generated": flagged(flags, RowFlag.GENERATED),
        "early": flagged(flags, RowFlag.EARLY),
    }


def draws_of(store: CaptureStore, rows: np.ndarray) -> np.ndarray:
    """int64 [n]: what names the random numbers of the texts about each of these rows, int64 [n]."""
    return draws.of_rows(store.column("sequence")[rows], store.column("position")[rows])


def select_rows(
    store: CaptureStore,
    options: WritingOptions | LensOptions,
    keep: Callable[[np.ndarray], np.ndarray] = lambda rows: rows,
) -> np.ndarray:
    """int64 [n]: the rows that `where` and `limit` select, by sequence and position. StoreError if there are none.

    keep: gives those of some rows that can be explained
    """
    rows = store.in_order(keep(_matching(store, options.where, 0)))
    if not len(rows):
        raise nothing_selected(options)
    if options.limit is not None and options.limit < len(rows):
        rows = rows[spread(len(rows), options.limit)]
    return rows


def spread(count: int, kept: int) -> np.ndarray:
    """int64 [kept]: evenly spread numbers below `count`, ascending."""
    return np.linspace(0, count - 1, kept).round().astype(np.int64)


def nothing_selected(
    options: WritingOptions
    | AskOptions
    | LensOptions
    | PatchOptions
    | ControlsOptions
    | ClausesOptions
    | ClaimsOptions,
) -> StoreError:
    """The error for a store, or a selection, without rows."""
    what = (
        "holds no rows: nothing to explain"
        if options.where is None
        else f"has no row for --where {options.where!r}: widen it (docs/where.md says what there is)"
    )
    return StoreError(f"{options.store}: {what}")


def open_store(options: WritingOptions, announce: Callable[[str], None] = lambda text: None) -> CaptureStore:
    """The store of the options. With `follow` it need not be there yet: its writer first loads a model.

    RequestError if it is to be followed and is not on a local disk.
    """
    if not options.follow:
        return CaptureStore.open(options.store)
    where = place(options.store)
    if not isinstance(where, Path):
        raise RequestError(
            f"{where}: --follow needs a store on a local disk: wait for the writer, then leave --follow out"
        )
    waiting = False
    while not where.exists():
        if not waiting:
            announce(f"waiting for {where}: start its capture; Ctrl-C ends the waiting")
        waiting = True
        time.sleep(POLL_SECONDS)
    return CaptureStore.open(options.store)


def follow_rows(
    store: CaptureStore,
    where: str | None,
    announce: Callable[[str], None] = lambda text: None,
    keep: Callable[[np.ndarray], np.ndarray] = lambda rows: rows,
) -> Iterator[np.ndarray]:
    """The selected rows of each commit that the writer makes, int64 [n], until it has finished; shows `store` anew.

    Those of a commit are in order of sequence and position.

    EngineError if the writer has gone without finishing. The store is on a local disk.
    """
    assert isinstance(store.path, Path)
    seen, waiting, gone, watch = 0, False, False, WriterWatch(store.path)
    while True:
        store.refresh()
        try:
            rows, seen = store.in_order(keep(_matching(store, where, seen))), store.rows
        except WhereRecordError:  # a later prompt may have what these lack
            if store.complete:
                raise
            rows = np.zeros(0, np.int64)
        if len(rows):
            waiting = gone = False
            yield rows
            continue
        if store.complete:
            return
        if gone:
            raise EngineError(
                f"{store.path}: the writer ended without finishing: run capture with --resume, "
                "then this command with --resume"
            )
        gone = not watch.has_writer()  # then it may have committed since the look: look once more
        if not gone:
            if not waiting:
                announce(f"waiting for the writer: {store.rows:,} rows so far")
            waiting = True
            time.sleep(POLL_SECONDS)


def _matching(store: CaptureStore, where: str | None, first: int) -> np.ndarray:
    """int64 [n]: the rows from `first` on for which `where` holds."""
    return np.arange(first, store.rows) if where is None else store.where(where, first)
