"""What a run of stage 2 would write and how long it would take: its checks, and a short run on a few of its rows.

Writes no files. The time is that of the AV's generation and of the AR's reading, one after the other; measuring Var and
joining the table are left out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from nla_engine.config import ScoreOptions, StageTwoOptions, WritingOptions
from nla_engine.engine.forecast import Forecast
from nla_engine.progress import Phases, Progress
from nla_engine.roundtrip.far import AT_ONCE
from nla_engine.roundtrip.job import Run, prepare_run
from nla_engine.roundtrip.pipeline import Explained
from nla_engine.roundtrip.results import ResultTable
from nla_engine.roundtrip.rows import draws_of
from nla_engine.roundtrip.sample import (
    SAMPLE,
    SHORT,
    WRITE_SECONDS,
    Enough,
    Timed,
    Timing,
    bytes_per_token,
    evenly,
    first_prompt,
    table_bytes,
)
from nla_engine.roundtrip.text_file import TextFile
from nla_engine.roundtrip.texts import Written
from nla_engine.roundtrip.verbalize import Explanation

#: Most seconds of scoring, in the sample.
SCORE_SECONDS = 5.0


@dataclass(frozen=True)
class StageTwoEstimate:
    """rows, texts: all that the run is about; already_done: texts that an earlier run left.

    seconds_expected: of writing and scoring what is left; None if the sample was too short to say
    load_seconds: to load the models and check everything; bytes_expected: of the table, without fields of records
    sample_texts, sample_seconds: what was measured
    """

    layer: int | str
    rows: int
    texts: int
    already_done: int
    seconds_expected: float | None
    rows_per_second: float | None
    tokens_per_text: float | None
    bytes_expected: int | None
    load_seconds: float
    sample_texts: int
    sample_seconds: float

    def to_dict(self) -> dict[str, Any]:
        return {"dry_run": True, **asdict(self)}


def estimate_stage_two(
    options: StageTwoOptions, announce: Callable[[str], None] = lambda text: None
) -> StageTwoEstimate:
    """Load and check all that a run would, and time a few rows. Raises what the run would raise before it writes."""
    with ExitStack() as opened:
        return _estimate(options, announce, opened)


def _estimate(
    options: StageTwoOptions, announce: Callable[[str], None], opened: ExitStack
) -> StageTwoEstimate:
    started = time.perf_counter()
    run = prepare_run(replace(options, dry_run=False), announce, Phases(Progress()), opened=opened)
    with closing(run.pair):
        assert run.chosen.rows is not None  # --follow is refused with --dry-run
        rows, texts = run.chosen.rows, run.texts
        run.schema()  # refuses fields of the same name
        done = ResultTable.done_before(options.out, run.identity(), overwrite=options.overwrite)
        load_seconds = time.perf_counter() - started
        announce(f"{len(rows):,} rows of {run.layer.label}, {texts.each(len(rows))}")
        announce(_first_prompt(run, options))
        left, before = rows[texts.rows_of(done) :], texts.rows_of(done)
        measured = _measure(run, options, left, before) if len(left) else _Measured([], 0.0, 0.0)
    total = texts.up_to_row(len(rows))
    seconds = measured.seconds
    known = seconds is not None and len(left) > 0
    return StageTwoEstimate(
        layer=run.layer.key,
        rows=len(rows),
        texts=total,
        already_done=done,
        seconds_expected=None if seconds is None else round(seconds, 3),
        rows_per_second=round(len(left) / seconds, 2) if known and seconds else None,
        tokens_per_text=None if measured.tokens is None else round(measured.tokens, 1),
        bytes_expected=None if measured.bytes is None else round(measured.bytes),
        load_seconds=round(load_seconds, 1),
        sample_texts=len(measured.texts),
        sample_seconds=round(measured.sample_seconds, 3),
    )


@dataclass(frozen=True)
class _Measured:
    """texts: of the sample; sample_seconds: it took; seconds: all that is left will take, None if not known.

    tokens: that the AV will write per text; bytes: of the whole table
    """

    texts: list[Explanation]
    sample_seconds: float
    seconds: float | None
    tokens: float | None = None
    bytes: float | None = None


def _measure(run: Run, options: StageTwoOptions, left: np.ndarray, before: int) -> _Measured:
    """Write and score a sample of the rows that are left. before: rows that are done."""
    most, together = SAMPLE[run.pair.device.type]
    whole = run.texts.up_to_row(before + len(left))
    total = whole - run.texts.up_to_row(before)
    places = evenly(len(left), max(most * len(left) // total, 1), together)
    run.pair.verbalize_next()
    took, tokens = 0.0, None
    seconds: float | None = 0.0
    if isinstance(options, WritingOptions):
        said, timing = _write(run, options, left[places], len(left))
        took, seconds, tokens = timing.took, timing.seconds, timing.tokens
        if not said:
            short = replace(options, max_new_tokens=min(options.max_new_tokens, SHORT), samples=1)
            said = _write(run, short, left[places[:1]], 1, math.inf)[0]
    else:
        reader = run.store.layer(run.layer)
        said = [
            next(run.texts.of_rows(reader, left[place : place + 1], before + place))
            for place in places.tolist()
        ]
    if not said:
        return _Measured([], took, seconds, tokens)
    made, reading = _score(run, left[places], said, together)
    texts = [text for each in said for text in each]
    n_tokens = [text.n_tokens for text in texts]
    more = max(tokens - float(np.mean(n_tokens)), 0.0) if tokens is not None else 0.0
    longer = more * bytes_per_token([text.text for text in texts], n_tokens)
    size = table_bytes(made, whole) + longer * whole
    if run.controls and seconds is not None:
        mean = float(np.mean(run.pair.ar.prompt_sizes([text.text for text in texts])))
        seconds += reading / len(made) * total * (mean + more) / mean
    return _Measured(texts, took + reading, seconds, tokens, size)


def _write(
    run: Run, options: WritingOptions, rows: np.ndarray, left: int, most_seconds: float = WRITE_SECONDS
) -> tuple[list[list[Explanation]], Timing]:
    """The AV's texts of these rows, as far as the time reaches, and what they say of `left` rows."""
    av, new = run.pair.av, options.max_new_tokens
    written = Written(options, av, run.pair.device, partial(draws_of, run.store))
    tail = len(av.prompt.token_ids) - len(av.prompt.shared)
    device = run.pair.device.type
    slots = options.batch_size or AT_ONCE[device]
    forecast = Forecast(left * options.samples, left * tail, new, slots, device)
    written.watch = timed = Timed(forecast, most_seconds)
    said: list[list[Explanation]] = []
    vectors = run.pipeline(written, lambda columns: None).vectors()
    with suppress(Enough), closing(written.of_rows(vectors, rows, 0)) as texts:
        said.extend(texts)
    return said, timed.timing()


def _score(
    run: Run, rows: np.ndarray, said: list[list[Explanation]], together: int
) -> tuple[pa.Table, float]:
    """Make rows of the table, scored if there is an AR; and the seconds of that.

    rows: of the sample, the first of which have the texts in `said`
    """
    pipeline = run.pipeline(run.texts, lambda columns: None)
    pipeline.vectors()
    if run.controls:
        run.pair.reconstruct_next()
        run.pair.ar.prepare(max(run.pair.ar.prompt_sizes([text.text for texts in said for text in texts])))
    started, parts = time.perf_counter(), []
    for start in range(0, len(said), together):
        part = said[start : start + together]
        owners = np.repeat(rows[start : start + len(part)], [len(texts) for texts in part])
        columns = pipeline.columns(Explained(owners, [text for texts in part for text in texts]))
        schema = pa.schema([field for field in run.schema() if field.name in columns])
        parts.append(pa.table(columns, schema=schema))
        if time.perf_counter() - started > SCORE_SECONDS:
            break
    took = time.perf_counter() - started
    return pa.concat_tables(parts), took if run.controls else 0.0


def _first_prompt(run: Run, options: StageTwoOptions) -> str:
    """For people: what the first model reads first."""
    if isinstance(options, ScoreOptions):
        who, lm = "AR", run.pair.ar.lm
        assert isinstance(run.texts, TextFile)
        (ids,) = run.pair.ar.prompts([run.texts.text(0)])
    else:
        who, lm, ids = "AV", run.pair.av.lm, list(run.pair.av.prompt.token_ids)
    return first_prompt(who, lm.tokenizer, ids)
