"""Stage 2: explain, score, or both, which is the round trip. In one process or several, from options to a summary."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from nla_engine.config import ExplainOptions, RoundtripOptions, ScoreOptions, StageTwoOptions
from nla_engine.errors import RequestError
from nla_engine.progress import Announce, Heard, Phases, Progress
from nla_engine.roundtrip import parallel
from nla_engine.roundtrip.job import prepare_run
from nla_engine.roundtrip.reconstruct import Reconstructor
from nla_engine.roundtrip.summary import ExplainSummary, RoundtripSummary, summarise, summarise_texts
from nla_engine.roundtrip.verbalize import Verbalizer
from nla_engine.workers.devices import grouped, worker_devices
from nla_engine.workers.pool import Pool


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

    rows: int64 [n] row numbers, in any order, instead of what `where` and `limit` select.
    """
    done = _run(options, announce, progress, verbalizer, reconstructor, rows)
    return replace(summarise(options, done.seconds, done.rows), **done.processes)


def run_explain(
    options: ExplainOptions,
    *,
    announce: Announce = lambda text: None,
    progress: Heard = Progress(),
    verbalizer: Verbalizer | None = None,
    rows: np.ndarray | None = None,
) -> ExplainSummary:
    """The first half of a round trip: the texts, and no scores. Arguments and errors as for `run_roundtrip`."""
    done = _run(options, announce, progress, verbalizer, rows=rows)
    return replace(summarise_texts(options, done.seconds, done.rows), **done.processes)


def run_score(
    options: ScoreOptions,
    *,
    announce: Announce = lambda text: None,
    progress: Heard = Progress(),
    reconstructor: Reconstructor | None = None,
) -> RoundtripSummary:
    """The second half of a round trip: scores of the texts of a file. Arguments and errors as for `run_roundtrip`."""
    done = _run(options, announce, progress, reconstructor=reconstructor)
    return replace(summarise(options, done.seconds, done.rows), **done.processes)


@dataclass(frozen=True)
class _Done:
    """seconds: by phase; rows: that are new; processes: what the summary says of these, if there were several"""

    seconds: dict[str, float]
    rows: float
    processes: dict[str, Any] = field(default_factory=dict)


def _run(
    options: StageTwoOptions,
    announce: Announce,
    progress: Heard,
    verbalizer: Verbalizer | None = None,
    reconstructor: Reconstructor | None = None,
    rows: np.ndarray | None = None,
) -> _Done:
    """In this process, or shared out to several."""
    if options.dry_run:
        raise RequestError(
            "--dry-run writes nothing: call `nla_engine.roundtrip.estimate.estimate_stage_two`"
        )
    phases = Phases(progress)
    models = (verbalizer, reconstructor)
    devices = worker_devices(options.gpus, options.workers, options.device, loaded=models != (None, None))
    devices = grouped(devices, options.tensor_parallel)
    if devices:
        options = replace(options, device=devices[0])
    if len(devices) < 2:
        with ExitStack() as opened:
            run = prepare_run(options, announce, phases, *models, rows, opened)
            return _Done(*run.finish(announce, phases))
    with (
        ExitStack() as opened,
        Pool(devices, imports=parallel.__name__, announce=announce, unit="parts of the rows") as pool,
    ):
        run = prepare_run(options, announce, phases, rows=rows, opened=opened)
        seconds, new = run.finish(announce, phases, pool)
        told = {"workers_lost": pool.lost.workers, "parts_again": pool.lost.items}
        return _Done(
            seconds, new, {"workers": len(pool.devices), **told, "workers_waited": asdict(pool.waited)}
        )
