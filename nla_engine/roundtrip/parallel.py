"""Stage 2 in several processes: each has the models, and returns the lines of parts of the rows to the one that writes.

The table is that of one process: lines are written in the order of the rows, and what is measured over rows (Var, the
sample of the controls) is the same. So a run is resumed with any number of processes.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from nla_engine.config import ScoringOptions, StageTwoOptions, WritingOptions
from nla_engine.engine.forecast import Tally
from nla_engine.engine.leader import ending_alone
from nla_engine.errors import EngineError
from nla_engine.progress import Progress
from nla_engine.roundtrip.chosen import slots_of
from nla_engine.roundtrip.layers import controls_of
from nla_engine.roundtrip.pair import load_pair
from nla_engine.roundtrip.pipeline import CHUNK, COMMIT_SECONDS, Item, Pipeline
from nla_engine.roundtrip.results import ResultTable
from nla_engine.roundtrip.rows import draws_of
from nla_engine.roundtrip.text_file import TextFile
from nla_engine.roundtrip.texts import Texts, Written
from nla_engine.sites import Site
from nla_engine.store import CaptureStore
from nla_engine.workers.job import Parent
from nla_engine.workers.pool import Pool

#: Texts of an item, about: enough for one pass of an AR, few enough that no process is left idle at the end.
ITEM = {"cpu": 16, "cuda": 128}
#: Items that a process gets at once: an AV's batch on a GPU. Lines wait for those of earlier rows, so not many more.
_AT_ONCE = 8


@dataclass(frozen=True)
class StageTwoWork:
    """Picklable: all that a process has to know before its first rows.

    layer: to read; sample: rows of the controls, int64 [m], None if nothing is scored; schema: of what it returns
    told: the layer that the texts of a file are about, if it says; models: fingerprints of AV and AR of the run
    """

    options: StageTwoOptions
    layer: Site
    told: int | None
    sample: np.ndarray | None
    schema: pa.Schema
    models: tuple[str | None, str | None]

    def open(self, device: str, parent: Parent) -> StageTwoWorker:
        """Load the models there. Raises what loading raises."""
        return StageTwoWorker(self, device, parent)


class StageTwoWorker:
    """See `workers.job.Worker`."""

    def __init__(self, work: StageTwoWork, device: str, parent: Parent) -> None:
        options = replace(work.options, device=device, gpus=None, workers=1)
        store = CaptureStore.open(options.store)
        self.opened = ExitStack()
        pair = load_pair(options, parent.announce, layer=work.told, opened=self.opened)
        if fingerprints(pair.verbalizer, pair.reconstructor) != work.models:
            raise EngineError("AV or AR changed after the run began: start it again")
        texts: Texts
        if isinstance(options, WritingOptions):
            texts = Written(options, pair.av, pair.device, lambda rows: draws_of(store, rows))
            texts.watch = self._watch
        else:
            texts = TextFile.read(options.texts, store, options.prefixes)
        controls = {}
        if work.sample is not None and isinstance(options, ScoringOptions):
            controls = controls_of(store, work.layer, work.sample, options, pair, parent.announce)
        longest = options.max_new_tokens if isinstance(options, WritingOptions) else None
        self.pipeline = Pipeline(
            store, work.layer, pair, texts, controls, lambda columns: None, longest, slots_of(options)
        )
        self.parent, self.schema = parent, work.schema
        self._before, self._now = (0, 0), Tally()

    def run(self, items: Iterator[Item | None]) -> Iterator[tuple[int, pa.Table]]:
        """The lines of each item."""
        with ending_alone(self.pipeline.pair.ranks), self.opened:
            while (item := next(items, ...)) is not ...:
                for number, columns in self.pipeline.stream(chain([item], items)):
                    yield number, pa.table(columns, schema=self.schema)

    def _watch(self, tally: Callable[[], Tally]) -> None:
        def state() -> tuple[int, int]:
            now = tally()
            if now is not self._now:  # of another generator
                self._before = _sum([self._before, (self._now.ended, self._now.tokens)])
                self._now = now
            return _sum([self._before, (now.ended, now.tokens)])

        self.parent.state(state)


def fill_table(
    pool: Pool,
    work: StageTwoWork,
    rows: np.ndarray,
    done: int,
    up_to_row: Callable[[int], int],
    table: ResultTable,
    progress: Progress,
    phase: tuple[str, str],
) -> None:
    """Write the lines of the rows, int64 [n], from number `done` on, in their order.

    up_to_row: how many texts the first so many rows have; phase: which begins with the first worker, and its unit
    """
    total, before = up_to_row(len(rows)), table.done
    item_texts = ITEM["cpu" if work.options.gpus is None else "cuda"]
    size = max(item_texts * len(rows) // max(total, 1), 1)
    starts = range(done, len(rows), size)
    arrived: dict[int, pa.Table] = {}  # of items whose turn has not come
    held: list[pa.Table] = []
    following, ended, since, begun = 0, before, time.monotonic(), False

    def told(number: int) -> Item:
        return Item(number, rows[starts[number] : starts[number] + size], starts[number])

    def watch(now: list[Any], lost: list[Any]) -> None:
        nonlocal begun
        if not begun:
            begun = True
            progress.phase(*phase)
        texts, tokens = _sum([*now, *lost])
        progress(min(max(before + texts, ended), total), total, tokens=tokens)

    pool.keep_for(len(starts))
    for results in pool.run(work, range(len(starts)), told=told, most=_AT_ONCE, watch=watch):
        for number, lines in results:
            arrived[number] = lines
            ended += len(lines)
        while following in arrived:
            held.append(arrived.pop(following))
            following += 1
            late = time.monotonic() - since >= COMMIT_SECONDS
            if late or sum(map(len, held)) >= CHUNK or following == len(starts):
                joined = pa.concat_tables(held)
                table.append(dict(zip(joined.column_names, joined.columns, strict=True)))
                held, since = [], time.monotonic()
        progress(ended, total)


def fingerprints(verbalizer: Any, reconstructor: Any) -> tuple[str | None, str | None]:
    """Of AV and AR, None for one that is not needed."""
    av, ar = (None if model is None else str(model.fingerprint()) for model in (verbalizer, reconstructor))
    return av, ar


def free_memory() -> None:
    """Of models that nobody holds any more, so that the processes find it free."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _sum(pairs: Sequence[tuple[int, int]]) -> tuple[int, int]:
    return sum(a for a, _ in pairs), sum(b for _, b in pairs)
