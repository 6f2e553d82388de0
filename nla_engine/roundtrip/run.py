"""Stage 2 from its options to its summary: explain, score, or both, which is the round trip."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from nla_engine.config import (
    ExplainOptions,
    RoundtripOptions,
    ScoreOptions,
    ScoringOptions,
    StageTwoOptions,
    WritingOptions,
)
from nla_engine.errors import RequestError
from nla_engine.progress import Phases, Progress
from nla_engine.provenance import describe_run
from nla_engine.roundtrip.far import Watcher
from nla_engine.roundtrip.layers import controls_of, explained_variance, measured_of
from nla_engine.roundtrip.pair import Pair, choose_layer, load_pair
from nla_engine.roundtrip.pipeline import Pipeline
from nla_engine.roundtrip.reconstruct import Reconstructor
from nla_engine.roundtrip.results import (
    SCHEMA,
    WITHOUT_SCORES,
    ResultTable,
    check_table,
    with_layers,
)
from nla_engine.roundtrip.rows import follow_rows, nothing_selected, open_store, select_rows
from nla_engine.roundtrip.score import Controls
from nla_engine.roundtrip.slots import Slots
from nla_engine.roundtrip.summary import (
    EXPLAINING,
    FINISHING,
    LOADING,
    PREPARING,
    SCORING,
    ExplainSummary,
    RoundtripSummary,
    summarise,
    summarise_texts,
)
from nla_engine.roundtrip.text_file import TextFile, check_layer, check_lengths
from nla_engine.roundtrip.texts import Texts, Written
from nla_engine.roundtrip.verbalize import Verbalizer
from nla_engine.sites import Site
from nla_engine.store import CaptureStore
from nla_engine.store.views.draw import draw_rows

#: Rows in the sample of the controls, at most.
CONTROL_ROWS = 1024

#: announce(line for the user)
Announce = Callable[[str], None]
#: progress(texts done, texts in all, as far as is known), or one that is told the phases too
Heard = Callable[[int, int], None] | Progress


def run_roundtrip(
    options: RoundtripOptions,
    *,
    announce: Announce = lambda text: None,
    progress: Heard = Progress(),
    verbalizer: Verbalizer | None = None,
    reconstructor: Reconstructor | None = None,
    rows: np.ndarray | None = None,
) -> RoundtripSummary:
    """Run stage 2. `verbalizer`, `reconstructor`: if they are loaded. Raises the errors of `nla_engine.errors`.

    rows: int64 [n] ascending row numbers, instead of what `where` and `limit` select.
    """
    _check_wet(options)
    phases = Phases(progress)
    run = prepare_run(options, announce, phases, verbalizer, reconstructor, rows)
    return summarise(options, *run.finish(announce, phases))


def run_explain(
    options: ExplainOptions,
    *,
    announce: Announce = lambda text: None,
    progress: Heard = Progress(),
    verbalizer: Verbalizer | None = None,
    rows: np.ndarray | None = None,
) -> ExplainSummary:
    """The first half of a round trip: the texts, and no scores. Arguments and errors as for `run_roundtrip`."""
    _check_wet(options)
    phases = Phases(progress)
    run = prepare_run(options, announce, phases, verbalizer, rows=rows)
    return summarise_texts(options, *run.finish(announce, phases))


def run_score(
    options: ScoreOptions,
    *,
    announce: Announce = lambda text: None,
    progress: Heard = Progress(),
    reconstructor: Reconstructor | None = None,
) -> RoundtripSummary:
    """The second half of a round trip: scores of the texts of a file. Arguments and errors as for `run_roundtrip`."""
    _check_wet(options)
    phases = Phases(progress)
    run = prepare_run(options, announce, phases, reconstructor=reconstructor)
    return summarise(options, *run.finish(announce, phases))


def _check_wet(options: StageTwoOptions) -> None:
    if options.dry_run:
        raise RequestError(
            "--dry-run writes nothing: call `nla_engine.roundtrip.estimate.estimate_stage_two`"
        )


def prepare_run(
    options: StageTwoOptions,
    announce: Announce,
    phases: Phases,
    verbalizer: Verbalizer | None = None,
    reconstructor: Reconstructor | None = None,
    rows: np.ndarray | None = None,
) -> Run:
    """Load the models and check everything; nothing is written. Arguments and errors as for `run_roundtrip`."""
    phases.phase(LOADING)
    if isinstance(options, ScoreOptions):
        return _prepare_score(options, announce, phases, reconstructor)
    check_table(options.out, resume=options.resume, overwrite=options.overwrite)
    store = open_store(options, announce)
    scored = isinstance(options, RoundtripOptions)
    chosen = _choose(store, options, rows, CONTROL_ROWS if scored else 1, announce)
    pair = load_pair(options, announce, verbalizer, reconstructor)
    phases.phase(PREPARING)
    layer = choose_layer(store, options, pair)
    written, controls = _written(options, pair), {}
    if isinstance(options, RoundtripOptions):
        controls = controls_of(store, layer, chosen.sample, options, pair, announce)
    return Run(options, store, layer, pair, chosen, written, controls)


def _prepare_score(
    options: ScoreOptions, announce: Announce, phases: Phases, reconstructor: Reconstructor | None
) -> Run:
    store = CaptureStore.open(options.store)
    if options.out.exists() and options.texts.exists() and options.out.samefile(options.texts):
        raise RequestError(f"{options.out}: is the file of the texts: choose another name for the result")
    check_table(options.out, resume=options.resume, overwrite=options.overwrite)
    texts = TextFile.read(options.texts, store, options.prefixes)
    rows = texts.selected
    chosen = Chosen(iter([rows]), draw_rows(rows, CONTROL_ROWS, options.seed), rows)
    told = None if texts.layer is None else texts.layer.layer
    if None not in (options.layer, told) and options.layer != told:
        raise RequestError(
            f"--layer {options.layer}: the texts of {options.texts} are about layer {told}: leave --layer out"
        )
    pair = load_pair(options, announce, reconstructor=reconstructor, layer=told)
    phases.phase(PREPARING)
    layer = choose_layer(store, options, pair)
    check_layer(texts, layer, options.ar)
    check_lengths(texts, pair.ar)
    controls = controls_of(store, layer, chosen.sample, options, pair, announce)
    return Run(options, store, layer, pair, chosen, texts, controls)


@dataclass(frozen=True)
class Chosen:
    """Rows to explain. segments: int64 arrays, which follow a store that grows; sample: those of the controls.

    rows: all of them, int64 [n]; None if they are not known yet
    """

    segments: Iterator[np.ndarray]
    sample: np.ndarray
    rows: np.ndarray | None


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

    def finish(self, announce: Announce, phases: Phases) -> tuple[dict[str, float], float]:
        """Write the table, or what is missing of it. Returns the seconds by phase, and the rows that are new."""
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
                self._fill(table, announce, phases)
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
            phases.phase(FINISHING)
            if not self.controls or not isinstance(options, ScoringOptions):
                table.finish(self._metadata() | self._speed(phases, table.done - done), store=self.store)
                return
            measured = {
                number: measured_of(options, self.store, number, controls, self.pair.device)
                for number, controls in self.controls.items()
            }
        variances = {number: float(about["variance"]) for number, about in measured.items()}
        metadata = self._metadata() | self._speed(phases, table.done - done) | measured.pop(layer)
        if measured:
            metadata["further_layers"] = {str(number): about for number, about in measured.items()}
        table.finish(metadata, lambda part: explained_variance(part, layer, variances), self.store)

    def _speed(self, phases: Phases, new: int) -> dict[str, Any]:
        """Rows per second of this run, which added `new` rows of the table, and on what."""
        seconds = sum(phases.seconds().get(phase, 0.0) for phase in (EXPLAINING, SCORING))
        device, rate = self.pair.device, self.texts.rows_of(new) / seconds if seconds else 0.0
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return {"speed": {"rows_per_second": round(rate, 2), "device": name}}

    def pipeline(
        self, texts: Texts, write: Callable[[dict[str, Any]], None], longest: int | None = None
    ) -> Pipeline:
        """The way of the rows through the models. longest: tokens of the longest text that the AV may write."""
        slots = _slots(self.options)
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
            "samples",
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "seed",
            "max_new_tokens",
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


def _choose(
    store: CaptureStore, options: WritingOptions, rows: np.ndarray | None, wanted: int, announce: Announce
) -> Chosen:
    """The given rows, or those that the options select. wanted: most rows in the sample of the controls."""
    slots, left_out = _slots(options), 0

    def keep(found: np.ndarray) -> np.ndarray:
        nonlocal left_out
        if slots is None:
            return found
        kept = slots.complete(store, found)
        left_out += len(found) - len(kept)
        return kept

    if slots is not None:
        slots.check(store)
    if rows is None and not options.follow:
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


def _written(options: WritingOptions, pair: Pair) -> Written:
    """What the AV will write. RequestError if it has no room for so many tokens."""
    if options.max_new_tokens > (room := pair.av.room):
        raise RequestError(
            f"--max-new-tokens is {options.max_new_tokens}: {options.av} has room for {room}: lower it"
        )
    return Written(options, pair.av, pair.device)


def _slots(options: StageTwoOptions) -> Slots | None:
    """The vectors that enter one prompt, None if a row's own does."""
    given = options.slots if isinstance(options, WritingOptions) else None
    return None if given is None else Slots.parse(given)
