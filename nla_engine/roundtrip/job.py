"""One run of stage 2 in one piece: its models and rows, loaded and checked, and the table that it writes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from nla_engine.config import RoundtripOptions, ScoreOptions, StageTwoOptions, WritingOptions
from nla_engine.errors import RequestError
from nla_engine.progress import Announce, Phases
from nla_engine.provenance import describe_run
from nla_engine.roundtrip import parallel
from nla_engine.roundtrip.chosen import CONTROL_ROWS, Chosen, choose, slots_of
from nla_engine.roundtrip.far import Watcher
from nla_engine.roundtrip.finish import finish_table, speed_of
from nla_engine.roundtrip.layers import controls_of
from nla_engine.roundtrip.pair import Pair, choose_layer, load_pair
from nla_engine.roundtrip.pipeline import Pipeline
from nla_engine.roundtrip.reconstruct import Reconstructor
from nla_engine.roundtrip.results import (
    SCHEMA,
    WITHOUT_SCORES,
    ResultTable,
    but_last,
    check_table,
    with_layers,
)
from nla_engine.roundtrip.rows import draws_of, open_store
from nla_engine.roundtrip.score import Controls
from nla_engine.roundtrip.summary import EXPLAINING, FINISHING, LOADING, PREPARING, SCORING, STARTING
from nla_engine.roundtrip.text_checks import check_layer, check_lengths
from nla_engine.roundtrip.text_file import TextFile
from nla_engine.roundtrip.texts import DRAW_OPTIONS, Texts, Written
from nla_engine.roundtrip.verbalize import Verbalizer
from nla_engine.sites import Site
from nla_engine.store import CaptureStore
from nla_engine.store.views.draw import draw_rows
from nla_engine.workers.pool import Pool


def prepare_run(
    options: StageTwoOptions,
    announce: Announce,
    phases: Phases,
    verbalizer: Verbalizer | None = None,
    reconstructor: Reconstructor | None = None,
    rows: np.ndarray | None = None,
    opened: ExitStack | None = None,
) -> Run:
    """Load the models and check everything; nothing is written. Arguments and errors as for `run_roundtrip`.

    opened: what ends the processes of --tensor-parallel
    """
    phases.phase(LOADING)
    if isinstance(options, ScoreOptions):
        return _prepare_score(options, announce, phases, reconstructor, opened)
    check_table(options.out, resume=options.resume, overwrite=options.overwrite)
    store = open_store(options, announce)
    scored = isinstance(options, RoundtripOptions)
    chosen = choose(store, options, rows, CONTROL_ROWS if scored else 1, announce)
    pair = load_pair(options, announce, verbalizer, reconstructor, opened=opened)
    phases.phase(PREPARING)
    layer = choose_layer(store, options, pair)
    written, controls = _written(store, options, pair), {}
    if isinstance(options, RoundtripOptions):
        controls = controls_of(store, layer, chosen.sample, options, pair, announce)
    return Run(options, store, layer, pair, chosen, written, controls)


def _prepare_score(
    options: ScoreOptions,
    announce: Announce,
    phases: Phases,
    reconstructor: Reconstructor | None,
    opened: ExitStack | None,
) -> Run:
    store = CaptureStore.open(options.store)
    check_table(options.out, options.texts, resume=options.resume, overwrite=options.overwrite)
    texts = TextFile.read(options.texts, store, options.prefixes)
    rows = texts.selected
    chosen = Chosen(iter([rows]), draw_rows(rows, CONTROL_ROWS, options.seed), rows)
    told = None if texts.layer is None else texts.layer.layer
    if None not in (options.layer, told) and options.layer != told:
        raise RequestError(
            f"--layer {options.layer}: the texts of {options.texts} are about layer {told}: leave --layer out"
        )
    pair = load_pair(options, announce, reconstructor=reconstructor, layer=told, opened=opened)
    phases.phase(PREPARING)
    layer = choose_layer(store, options, pair)
    check_layer(texts, layer, options.ar)
    check_lengths(texts, pair.ar)
    controls = controls_of(store, layer, chosen.sample, options, pair, announce)
    return Run(options, store, layer, pair, chosen, texts, controls)


@dataclass(frozen=True)
class Run:
    """One run of stage 2, ready to start. controls: by layer, the run's own first; empty if nothing is scored."""

    options: StageTwoOptions
    store: CaptureStore
    layer: Site
    pair: Pair
    chosen: Chosen
    texts: Texts
    controls: Mapping[Site, Controls]

    def finish(
        self, announce: Announce, phases: Phases, pool: Pool | None = None
    ) -> tuple[dict[str, float], float]:
        """Write the table, or what is missing of it. Returns the seconds by phase, and the rows that are new.

        pool: of processes that the rows are shared out to; the models here are given up then
        """
        options, texts = self.options, self.texts
        table = ResultTable.open(
            options.out,
            options=self.identity(),
            resume=options.resume,
            overwrite=options.overwrite,
            schema=self.schema(),
        )
        before = table.done
        with table:
            if not table.finished:
                (
                    self._fill(table, announce, phases)
                    if pool is None
                    else self._share(table, announce, phases, pool)
                )
        return phases.seconds(), texts.rows_of(table.done) - texts.rows_of(before)

    def _fill(self, table: ResultTable, announce: Announce, phases: Phases) -> None:
        """Explain and score the rows that the table does not hold yet, and finish it."""
        options, texts, layer, known, done = self.options, self.texts, self.layer, 0, table.done

        phases.phase(EXPLAINING if isinstance(texts, Written) else SCORING, texts.unit)

        def write(columns: dict[str, Any]) -> None:
            table.append(columns)
            if not isinstance(texts, Written):  # else the watcher tells, as soon as a text is written
                phases(table.done, texts.up_to_row(known))

        longest = options.max_new_tokens if isinstance(options, WritingOptions) else None
        with closing(self.pair):
            pipeline = self.pipeline(texts, write, longest)
            for part in self.chosen.segments:
                first, known = known, known + len(part)
                there = max(texts.rows_of(table.done) - first, 0)
                announce(
                    f"{known:,} rows of {layer.label}, {texts.each(known)}"
                    + (f" ({table.done:,} already there)" if there else "")
                )
                if isinstance(texts, Written) and isinstance(options, WritingOptions):
                    whole, written = texts.up_to_row(known), texts.up_to_row(first + there)
                    phases(written, whole, part=0.0)
                    texts.watch = Watcher(
                        phases,
                        options,
                        texts.verbalizer,
                        written=written,
                        left=whole - written,
                        known=self.chosen.rows is not None,
                    )
                if there < len(part):
                    pipeline.run(part[there:], first + there)
            phases(table.done, texts.up_to_row(known), part=1.0)
            self._end(table, self._metadata(), phases, table.done - done)

    def _share(self, table: ResultTable, announce: Announce, phases: Phases, pool: Pool) -> None:
        """As `_fill`, in the processes of a pool."""
        texts, rows, pair, options = self.texts, self.chosen.rows, self.pair, self.options
        assert rows is not None  # --follow is refused
        before, done = table.done, texts.rows_of(table.done)
        announce(
            f"{len(rows):,} rows of {self.layer.label}, {texts.each(len(rows))}"
            + (f" ({table.done:,} already there)" if done else "")
        )
        metadata = self._metadata()
        work = parallel.StageTwoWork(
            options=options,
            layer=self.layer,
            told=texts.layer.layer if isinstance(texts, TextFile) and texts.layer is not None else None,
            sample=self.chosen.sample if self.controls else None,
            schema=but_last(self.schema()),
            models=parallel.fingerprints(pair.verbalizer, pair.reconstructor),
        )
        with closing(pair):
            pair.verbalizer = pair.reconstructor = None
        if isinstance(texts, Written):
            texts.give_up()
        if pair.ranks is not None:
            pair.ranks.close()
        parallel.free_memory()
        phases.phase(STARTING)
        counted = (EXPLAINING if isinstance(texts, Written) else SCORING, texts.unit)
        parallel.fill_table(pool, work, rows, done, texts.up_to_row, table, phases, counted)
        self._end(table, metadata, phases, table.done - before)

    def _end(self, table: ResultTable, metadata: dict[str, Any], phases: Phases, new: int) -> None:
        """Measure what is measured over all rows, and join the table, which has `new` lines of this run."""
        phases.phase(FINISHING)
        speed = speed_of(phases, self.texts.rows_of(new), self.pair.device)
        finish_table(
            table, metadata | speed, self.options, self.store, self.layer, self.controls, self.pair.device
        )

    def pipeline(
        self, texts: Texts, write: Callable[[dict[str, Any]], None], longest: int | None = None
    ) -> Pipeline:
        """The way of the rows through the models. longest: tokens of the longest text that the AV may write."""
        slots = slots_of(self.options)
        return Pipeline(self.store, self.layer, self.pair, texts, self.controls, write, longest, slots)

    def schema(self) -> pa.Schema:
        """Of the table."""
        further = [number for number in self.controls if number != self.layer]
        schema = with_layers(SCHEMA, further) if self.controls else WITHOUT_SCORES
        if not isinstance(self.texts, TextFile):
            return schema
        if clash := set(schema.names) & set(self.texts.more.names):
            raise RequestError(
                f"{self.texts.path}: the result has a field {min(clash)} of its own: rename it in the file"
            )
        return pa.schema([*schema, *self.texts.more])

    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one it continues."""
        given, store, pair, chosen = self.options.to_dict(), self.store, self.pair, self.chosen
        names = (
            "where",
            "limit",
            *DRAW_OPTIONS,
            "precision",
            "variance",
            "follow",
            "slots",
        )
        same: dict[str, Any] = {name: given[name] for name in names if name in given}
        same |= {
            "layer": self.layer.key,
            "base": store.provenance.get("weights"),
            "store": store.attributes["store_id"],
            "drawn_by": "sequence and position",  # older versions: the place in the store
        }
        if chosen.rows is not None:
            same["rows"] = len(chosen.rows)
            same["selection"] = hashlib.sha256(chosen.rows.tobytes()).hexdigest()[:16]
        if self.controls:
            same["controls"] = hashlib.sha256(chosen.sample.tobytes()).hexdigest()[:16]
        if pair.verbalizer is not None:
            same["av"] = pair.verbalizer.fingerprint()
        if pair.reconstructor is not None:
            same["ar"] = pair.reconstructor.fingerprint()
        if isinstance(self.texts, TextFile):
            same["texts"] = self.texts.fingerprint()
            same["prefixes"] = given.get("prefixes") or None  # None: as in tables of older versions
        elif not self.controls:
            same["scores"] = False  # the table of a round trip has all the rest in common with this one
        return same

    def _metadata(self) -> dict[str, Any]:
        models = self.pair.describe()
        if isinstance(self.texts, TextFile):
            models = self.texts.written_by() | models
        return {**describe_run(), "run": self.options.to_dict(), **models, "layer": self.layer.key}


def _written(store: CaptureStore, options: WritingOptions, pair: Pair) -> Written:
    """What the AV will write. RequestError if it has no room for so many tokens."""
    if options.max_new_tokens > (room := pair.av.room):
        raise RequestError(
            f"--max-new-tokens is {options.max_new_tokens}: {options.av} has room for {room}: lower it"
        )
    return Written(options, pair.av, pair.device, partial(draws_of, store))
