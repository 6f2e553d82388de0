"""`nla-engine study multiplication`: makes problems, runs both stages, reads texts again, measures, writes the results.

Every step can be interrupted and resumed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nla_engine.errors import EngineError
from nla_engine.referee.clauses import CONTROL
from nla_engine.store import CaptureStore
from nla_engine.studies.directory import (
    CLAUSES,
    EXPLAINED,
    PATCHED,
    REREAD,
    SAMPLES,
    STORE,
    StudyDirectory,
)
from nla_engine.studies.findings import ALL
from nla_engine.studies.models import Models
from nla_engine.studies.multiplication.answers import Reply, clusters_of, places_of, read_replies
from nla_engine.studies.multiplication.options import MultiplicationOptions
from nla_engine.studies.multiplication.outcome import Outcome, Setup, measure
from nla_engine.studies.multiplication.present import MARKDOWN, writeup_of
from nla_engine.studies.multiplication.problems import (
    check_bundled,
    draw_problems,
    parse_phrasings,
    parse_range,
)
from nla_engine.studies.reread import Explained, choose_partners, explained_rows, plan
from nla_engine.studies.stages import Progress, Stages
from nla_engine.workers.devices import worker_devices


@dataclass(frozen=True)
class MultiplicationSummary:
    """The results; its keys are those of `--json`. Estimates are [value, low, high]."""

    out: str
    problems: int
    pairs: int
    product_accuracy: list[float]
    unanswered: int
    rows: int
    variance: float
    status_ok: float
    measures: dict[str, dict[str, dict[str, list[float | None]]]]
    agreement: dict[str, list[float | None]]
    clauses: dict[str, dict[str, list[float | None]]]
    reading: list[str]
    page: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def run_multiplication(
    options: MultiplicationOptions, *, announce: Callable[[str], None], progress: Progress
) -> MultiplicationSummary:
    """Run the study, or resume it. Raises the errors of `nla_engine.errors`."""
    started = time.perf_counter()
    out, setup = options.out, _setup(options)
    records = _problem_records(options, setup)
    worker_devices(options.gpus, options.workers, options.device)  # refused before anything is written
    directory = StudyDirectory(
        out, MARKDOWN, options.to_dict(), resume=options.resume, overwrite=options.overwrite
    )
    with directory.opened():
        stages = Stages(
            out,
            setup.models,
            announce,
            progress,
            seed=options.seed,
            batch_size=options.batch_size,
            dtype=options.dtype,
            device=options.device,
            gpus=options.gpus,
            workers=options.workers,
            kernels=options.kernels,
            trust_remote_code=options.trust_remote_code,
        )
        replies = _capture(stages, records, options.max_new_tokens)
        _explain(stages, replies, options)
        announce("4  statistics, tables, figures")
        held = {"samples": SAMPLES, "patched": PATCHED, "clauses": CLAUSES}
        there = {name: out / file for name, file in held.items() if (out / file).exists()}
        outcome = measure(setup, replies, out / EXPLAINED, out / REREAD, **there)
        writeup = writeup_of(outcome)
        page = writeup.write(out)
        seconds = time.perf_counter() - started
        return _summary(outcome, out, writeup.reading, page.out, seconds)


def _setup(options: MultiplicationOptions) -> Setup:
    models = Models.named(options.model, options.av, options.ar, options.layer)
    return Setup(
        models=models,
        first=options.first,
        second=options.second,
        split=options.split or ("held_out" if models.bundled else "any"),
        seed=options.seed,
        samples=options.samples,
        temperature=options.temperature,
    )


def _problem_records(options: MultiplicationOptions, setup: Setup) -> list[dict[str, object]]:
    first, second = parse_range(options.first, "--first"), parse_range(options.second, "--second")
    if setup.models.bundled:
        check_bundled(first, second)
    phrasings = parse_phrasings(options.phrasings)
    problems = draw_problems(options.problems, options.seed, first, second, phrasings, setup.split)
    return [problem.record(number) for number, problem in enumerate(problems)]


def _capture(stages: Stages, records: list[dict[str, object]], max_new_tokens: int) -> list[Reply]:
    """The base model's replies. EngineError if none of them states a number."""
    stages.announce(f"1  capture: {len(records):,} multiplications")
    # "last": the prompt's last token comes before an answer that opens the reply.
    store = stages.capture(records, max_new_tokens=max_new_tokens, positions="generated,last")
    replies = read_replies(store)
    if not any(reply.spots for reply in replies):
        raise EngineError(
            f"{stages.out / STORE}: no reply states a result, so there is no answer to study; look at the replies, "
            "try other --phrasings or a longer --max-new-tokens"
        )
    return replies


def _explain(stages: Stages, replies: list[Reply], options: MultiplicationOptions) -> None:
    """The greedy explanations, the sampled ones, and what the referee measures of them."""
    store = CaptureStore.open(stages.out / STORE)
    places, longest = places_of(replies), options.explanation_tokens
    answer_rows = np.array(sorted(places), np.int64)
    rows = answer_rows if options.rows == "answer" else np.arange(store.rows)
    av, ar = stages.load_pair()
    stages.announce("2  round trip: rows into words and back")
    variance = stages.explain(rows, av, ar, max_new_tokens=longest, variance=options.variance)
    if options.samples:
        stages.announce(f"   again, {options.samples} samples per row at temperature {options.temperature:g}")
        sampled = _first_answered(replies, options.sampled_problems)
        few = answer_rows[np.isin(store.column("sequence")[answer_rows], sorted(sampled))]
        stages.sample(
            few,
            av,
            ar,
            max_new_tokens=longest,
            samples=options.samples,
            temperature=options.temperature,
            variance=variance,
        )
    del av
    stages.announce("3  referee: other problems' texts, vectors in place of the model's, clauses, claims")
    explained = explained_rows(stages.out / EXPLAINED, places, clusters_of(replies))
    ar = ar or stages.load_ar()  # what follows runs in this process
    stages.reread(plan(explained, options.seed), ar, variance=variance)
    patched = stages.patch(answer_rows, _partners(explained, options.seed), ar)
    ablated = _first_answered(replies, options.ablated_problems)
    cut = [entry for entry in explained if entry.sequence in ablated]
    if len(cut) > 1:
        chosen = np.array([entry.row for entry in cut], np.int64)
        others = _partners(cut, options.seed)
        stages.clauses(chosen, others, ar, variance=variance, patched=patched)
    stages.claims()


def _partners(explained: list[Explained], seed: int) -> dict[int, int]:
    """For rows the row of another problem at the same place."""
    return {row: other.row for row, other in choose_partners(explained, seed).items()}


def _first_answered(replies: list[Reply], count: int) -> set[int]:
    """Sequences of the first replies with an answer."""
    return {reply.sequence for reply in [reply for reply in replies if reply.spots][:count]}


def _summary(
    outcome: Outcome, out: Path, reading: list[str], page: str, seconds: float
) -> MultiplicationSummary:
    measures: dict[str, dict[str, dict[str, list[float | None]]]] = {}
    for finding in outcome.findings:
        measures.setdefault(finding.place, {})[finding.measure] = {
            name: getattr(finding, name).numbers() for name in ("own", "shuffled", "text_only", "margin")
        }
    everywhere = next(iter(outcome.agreement), None)
    names = ("same_pair", "unanimous", "right", "right_unanimous", "right_divided")
    overall = outcome.accuracy[0][2]
    return MultiplicationSummary(
        out=str(out),
        problems=outcome.problems,
        pairs=outcome.pairs,
        product_accuracy=[round(value, 6) for value in (overall.value, overall.low, overall.high)],
        unanswered=outcome.unanswered,
        rows=outcome.rows,
        variance=round(outcome.variance, 6),
        status_ok=round(outcome.status_ok, 6),
        measures=measures,
        agreement={name: getattr(everywhere, name).numbers() for name in names} if everywhere else {},
        clauses={
            clause.clause: {
                f"{column}_{change}{end}": getattr(cost, field).numbers()
                for (column, change), cost in clause.costs.items()
                for end, field in (("", "own"), (CONTROL, "control"), ("_margin", "margin"))
            }
            for clause in outcome.by_number
            if clause.place == ALL
        },
        reading=reading,
        page=page,
        seconds=round(seconds, 3),
    )
