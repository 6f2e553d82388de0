"""A round trip from its options to its summary."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import numpy as np
import torch

from nla_engine.config import RoundtripOptions
from nla_engine.errors import RequestError
from nla_engine.provenance import describe_run
from nla_engine.roundtrip import score
from nla_engine.roundtrip.pair import Pair, choose_layer, load_pair
from nla_engine.roundtrip.pipeline import Pipeline
from nla_engine.roundtrip.reconstruct import Reconstructor
from nla_engine.roundtrip.results import ResultTable, check_table, nullable
from nla_engine.roundtrip.rows import follow_rows, nothing_selected, select_rows
from nla_engine.roundtrip.score import Controls, DirectionVariance
from nla_engine.roundtrip.summary import RoundtripSummary, summarise
from nla_engine.roundtrip.verbalize import Verbalizer
from nla_engine.store import CaptureStore
from nla_engine.store.views.draw import draw_rows

#: Most rows that Var is measured on, and most rows in the sample of the controls.
VARIANCE_ROWS = 100_000
CONTROL_ROWS = 1024
_VARIANCE_BLOCK = 4096

#: progress(explanations done, explanations in all, as far as is known)
Progress = Callable[[int, int], None]


def run_roundtrip(
    options: RoundtripOptions,
    *,
    announce: Callable[[str], None] = lambda text: None,
    progress: Progress = lambda done, total: None,
    verbalizer: Verbalizer | None = None,
    reconstructor: Reconstructor | None = None,
    rows: np.ndarray | None = None,
) -> RoundtripSummary:
    """Run stage 2. `verbalizer`, `reconstructor`: if already loaded. Raises the errors of `nla_engine.errors`.

    rows: int64 [n] ascending row numbers, instead of what `where` and `limit` select.
    """
    store = CaptureStore.open(options.store)
    if rows is None and not options.follow:
        rows = select_rows(store, options)
    segments = follow_rows(store, options.where, announce) if rows is None else iter([rows])
    segments, sample = _control_sample(segments, options)
    if not len(sample):
        raise nothing_selected(options)
    check_table(options.out, resume=options.resume, overwrite=options.overwrite)
    pair = load_pair(options, announce, verbalizer, reconstructor)
    layer = choose_layer(store, options, pair)
    if options.max_new_tokens > (room := pair.verbalizer.room):
        raise RequestError(
            f"--max-new-tokens is {options.max_new_tokens}: {options.av} has room for {room}: lower it"
        )
    vectors = store.layer(layer).torch(sample, pair.device)
    controls = Controls.of(sample, store.column("sequence")[sample], vectors, options.seed)
    table = ResultTable.open(
        options.out,
        options=_identity(options, store, layer, pair, rows, sample),
        resume=options.resume,
        overwrite=options.overwrite,
    )
    started, before = time.perf_counter(), table.done
    with table:
        if not table.finished:
            _explain(options, table, store, layer, pair, controls, segments, announce, progress)
    seconds = time.perf_counter() - started
    return summarise(options, seconds, (table.done - before) / options.samples)


def _explain(
    options: RoundtripOptions,
    table: ResultTable,
    store: CaptureStore,
    layer: int,
    pair: Pair,
    controls: Controls,
    segments: Iterator[np.ndarray],
    announce: Callable[[str], None],
    progress: Progress,
) -> None:
    """Explain the rows of the segments that the table does not hold yet, and finish it."""
    known = 0

    def write(columns: dict[str, Any]) -> None:
        table.append(columns)
        progress(table.done, known * options.samples)

    with closing(pair):
        pipeline = Pipeline(options, store, layer, pair, controls, write)
        for part in segments:
            first, known = known, known + len(part)
            there = max(table.done // options.samples - first, 0)
            each = "an explanation" if options.samples == 1 else f"{options.samples} explanations"
            announce(
                f"{known:,} rows of layer {layer}, {each} each"
                + (f" ({table.done:,} already there)" if there else "")
            )
            if there < len(part):
                pipeline.run(part[there:], first + there)
        variance, measured = _variance(options, store, layer, pair.device)
    metadata = _metadata(options, layer, pair) | {
        "variance": variance,
        "variance_rows": measured,
        "control_rows": len(controls.rows),
        "control_vectors": len(controls.distinct),
    }
    table.finish(metadata, lambda mse: _explained_variance(mse, variance))


def _control_sample(
    segments: Iterator[np.ndarray], options: RoundtripOptions
) -> tuple[Iterator[np.ndarray], np.ndarray]:
    """The segments again, and the rows of the controls: drawn from all, or the first ones of a growing store."""
    held: list[np.ndarray] = []
    for rows in segments:
        held.append(rows)
        if sum(map(len, held)) >= CONTROL_ROWS:
            break
    rows = np.concatenate(held) if held else np.zeros(0, np.int64)
    if options.follow:
        sample = rows[:CONTROL_ROWS]
    else:
        sample = draw_rows(rows, CONTROL_ROWS, options.seed)

    def again() -> Iterator[np.ndarray]:
        if len(rows):
            yield rows
        yield from segments

    return again(), sample


def _identity(
    options: RoundtripOptions,
    store: CaptureStore,
    layer: int,
    pair: Pair,
    rows: np.ndarray | None,
    sample: np.ndarray,
) -> dict[str, Any]:
    """What must be the same when a run is resumed. rows: None if they are not known yet."""
    given = options.to_dict()
    names = (
        "where",
        "limit",
        "samples",
        "temperature",
        "seed",
        "max_new_tokens",
        "precision",
        "variance",
        "follow",
    )
    same: dict[str, Any] = {name: given[name] for name in names}
    same |= {"layer": layer, "base": store.provenance.get("weights"), "store": store.attributes["store_id"]}
    if rows is not None:
        same["rows"] = len(rows)
        same["selection"] = hashlib.sha256(rows.tobytes()).hexdigest()[:16]
    same["controls"] = hashlib.sha256(sample.tobytes()).hexdigest()[:16]
    return same | {"av": pair.verbalizer.fingerprint(), "ar": pair.reconstructor.fingerprint()}


def _metadata(options: RoundtripOptions, layer: int, pair: Pair) -> dict[str, Any]:
    return {
        **describe_run(),
        "run": options.to_dict(),
        "av": pair.verbalizer.lm.name,
        "ar": pair.reconstructor.lm.name,
        "av_revision": pair.verbalizer.lm.revision,
        "ar_revision": pair.reconstructor.lm.revision,
        "injection_scale": pair.verbalizer.injection.scale,
        "layer": layer,
    }


def _variance(
    options: RoundtripOptions, store: CaptureStore, layer: int, device: torch.device
) -> tuple[float, int]:
    """Var, and the number of rows it was measured on; 0 if Var was given."""
    if options.variance is not None:
        return options.variance, 0
    rows = draw_rows(np.arange(store.rows), VARIANCE_ROWS, options.seed)
    reader, variance = store.layer(layer), DirectionVariance()
    for start in range(0, len(rows), _VARIANCE_BLOCK):
        variance.add(reader.torch(rows[start : start + _VARIANCE_BLOCK], device))
    return variance.value, variance.rows


def _explained_variance(mse: np.ndarray, variance: float) -> dict[str, list[float | None]]:
    """The columns that need Var, for float64 [n] with NaN where there is no score."""
    return {
        "fve_nrm": nullable(score.fve_nrm(mse, variance)),
        "fve_meannorm": nullable(score.fve_meannorm(mse, variance)),
    }
