"""`nla-engine study multiplication`: makes problems, runs both stages, reads texts again, measures, writes it all down.

Uses the stages as any caller does. A study is a directory; every step of it can be interrupted and gone on with.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nla_engine.capture.run import run_capture
from nla_engine.config import CaptureOptions, MultiplicationOptions, RoundtripOptions
from nla_engine.demo.run import LAYER, TRIO
from nla_engine.errors import EngineError, RequestError, WriteError
from nla_engine.models.load import pick_device, pick_dtype
from nla_engine.roundtrip.reconstruct import Reconstructor
from nla_engine.roundtrip.results import batches, read_metadata
from nla_engine.roundtrip.run import run_roundtrip
from nla_engine.roundtrip.verbalize import Verbalizer
from nla_engine.store import CaptureStore
from nla_engine.store.lease import Lease
from nla_engine.store.objects import LOCK_NAME
from nla_engine.store.shards import TEMPORARY_SUFFIX, make_directory, write_file_atomically, writing
from nla_engine.studies.answers import Reply, read_replies
from nla_engine.studies.outcome import Outcome, Setup, measure
from nla_engine.studies.present import FIGURES, MARKDOWN, PAGE, TABLES, write_outcome
from nla_engine.studies.problems import (
    check_bundled,
    draw_problems,
    parse_phrasings,
    parse_range,
)
from nla_engine.studies.reread import Explained, plan, run_reread

#: What a study writes into its directory; nothing else there is touched.
STORE, EXPLAINED, SAMPLES, REREAD = "run.zarr", "explained.parquet", "samples.parquet", "reread.parquet"
RECORD, PROBLEMS = "study.json", "problems.jsonl"
#: Options that a resumed study may change.
_FREE = {"out", "batch_size", "device", "resume", "overwrite"}

Progress = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]


@dataclass(frozen=True)
class MultiplicationSummary:
    """What came out; its keys are those of `--json`. Estimates are [value, low, high]."""

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
    """Run the study, or go on with it. Raises the errors of `nla_engine.errors`."""
    started = time.perf_counter()
    setup = _setup(options)
    records = _problem_records(options, setup)
    _check_directory(options)
    with writing(options.out):
        make_directory(options.out)
    with Lease.of_directory(options.out):
        return _run(options, setup, records, started, announce, progress)


def _run(
    options: MultiplicationOptions,
    setup: Setup,
    records: list[dict[str, object]],
    started: float,
    announce: Callable[[str], None],
    progress: Progress,
) -> MultiplicationSummary:
    """The study, once nobody else is at its directory."""
    _open_directory(options)
    out = options.out
    _write(out / PROBLEMS, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    stages = _Stages(options, setup, announce, progress)
    replies = stages.capture()
    stages.explain(replies)
    announce("4  statistics, tables, figures")
    samples = out / SAMPLES if options.samples else None
    outcome = measure(setup, replies, out / EXPLAINED, out / REREAD, samples)
    written = write_outcome(outcome, out, CaptureStore.open(out / STORE), out / EXPLAINED)
    return _summary(outcome, out, written.reading, written.page.out, time.perf_counter() - started)


def _setup(options: MultiplicationOptions) -> Setup:
    given = (options.model, options.av, options.ar)
    bundled = options.model is None
    base, av, ar = (str(name or TRIO / own) for name, own in zip(given, ("base", "av", "ar"), strict=True))
    return Setup(
        models=(base, av, ar),
        bundled=bundled,
        layer=LAYER if options.layer is None else options.layer,
        first=options.first,
        second=options.second,
        split=options.split or ("held_out" if bundled else "any"),
        seed=options.seed,
        samples=options.samples,
        temperature=options.temperature,
    )


def _problem_records(options: MultiplicationOptions, setup: Setup) -> list[dict[str, object]]:
    first, second = parse_range(options.first, "--first"), parse_range(options.second, "--second")
    if setup.bundled:
        check_bundled(first, second)
    phrasings = parse_phrasings(options.phrasings)
    problems = draw_problems(options.problems, options.seed, first, second, phrasings, setup.split)
    return [problem.record(number) for number, problem in enumerate(problems)]


def _check_directory(options: MultiplicationOptions) -> bool:
    """Whether a study is there that is to be gone on with. RequestError if the directory cannot be used as asked."""
    out, record = options.out, options.out / RECORD
    if out.exists() and not out.is_dir():
        raise RequestError(f"{out}: a file is in the way; choose another --out")
    if not out.is_dir() or set(os.listdir(out)) <= {LOCK_NAME, RECORD + TEMPORARY_SUFFIX}:
        return False
    if not record.exists():
        raise RequestError(f"{out}: holds other files and no study; choose another --out")
    if options.resume and not options.overwrite:
        _check_same(record, _asked(options))
    elif not options.overwrite:
        raise RequestError(f"{out}: exists; pass --resume to go on with it or --overwrite to replace it")
    return not options.overwrite


def _open_directory(options: MultiplicationOptions) -> None:
    """A directory for the study: new, gone on with, or emptied of what a study writes."""
    if not _check_directory(options):
        _remove_study(options.out)
        _write(options.out / RECORD, json.dumps(_asked(options), indent=1) + "\n")


def _asked(options: MultiplicationOptions) -> dict[str, Any]:
    return {key: value for key, value in options.to_dict().items() if key not in _FREE}


def _check_same(record: Path, asked: dict[str, Any]) -> None:
    try:
        before = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"{record}: cannot be read ({error}); start again with --overwrite") from error
    differ = [
        f"{key} was {before.get(key)!r}, is {value!r}"
        for key, value in asked.items()
        if before.get(key) != value
    ]
    if differ:
        raise RequestError(
            f"{record}: the study was made with other options ({'; '.join(differ)}); --overwrite starts again"
        )


def _remove_study(out: Path) -> None:
    """All that a study writes but its record: without that a half-emptied directory would be nobody's."""
    try:
        for name in (EXPLAINED, SAMPLES, REREAD, PROBLEMS, MARKDOWN, PAGE):
            (out / name).unlink(missing_ok=True)
        for name in (STORE, TABLES, FIGURES, *(f"{table}.parts" for table in (EXPLAINED, SAMPLES, REREAD))):
            if (out / name).exists():
                shutil.rmtree(out / name)
    except OSError as error:
        raise WriteError(f"{out}: cannot be overwritten ({error.strerror})") from error


def _write(path: Path, text: str) -> None:
    write_file_atomically(path, text.encode())


class _Stages:
    """The model runs of a study, each resumable on its own."""

    def __init__(
        self,
        options: MultiplicationOptions,
        setup: Setup,
        announce: Callable[[str], None],
        progress: Progress,
    ) -> None:
        self.options, self.layer = options, setup.layer
        self.base, self.av, self.ar = setup.models
        self.announce, self.progress = announce, progress
        self.out = options.out
        self.common: dict[str, Any] = {
            "batch_size": options.batch_size,
            "dtype": options.dtype,
            "device": options.device,
            "kernels": options.kernels,
            "trust_remote_code": options.trust_remote_code,
            "resume": True,  # what is there was made with the same options: `_open_directory` saw to it
        }

    def capture(self) -> list[Reply]:
        """The base model's replies. EngineError if none of them states a number."""
        self.announce(f"1  capture: {self.options.problems:,} multiplications")
        capture_options = CaptureOptions(
            model=self.base,
            prompts=self.out / PROBLEMS,
            layer=(self.layer,),
            out=str(self.out / STORE),
            max_new_tokens=self.options.max_new_tokens,
            positions="generated,last",  # the prompt's last token comes before an answer that opens the reply
            seed=self.options.seed,
            **self.common,
        )
        with self.progress("sequences") as update:
            run_capture(capture_options, announce=self.announce, progress=update)
        replies = read_replies(CaptureStore.open(self.out / STORE))
        if not any(reply.spots for reply in replies):
            raise EngineError(
                f"{self.out / STORE}: no reply states a result, so there is no answer to study; look at the replies, "
                "try other --phrasings or a longer --max-new-tokens"
            )
        return replies

    def explain(self, replies: list[Reply]) -> None:
        """The greedy explanations, the sampled ones, and everything that the AR reads again."""
        options, store = self.options, CaptureStore.open(self.out / STORE)
        device = pick_device(options.device)
        dtype, remote = pick_dtype(options.dtype, device), options.trust_remote_code
        av = Verbalizer.load(self.av, device=device, dtype=dtype, remote_code=remote)
        ar = Reconstructor.load(
            self.ar, device=device, dtype=dtype, remote_code=remote, kernels=options.kernels
        )
        answer_rows = np.array(sorted(row for reply in replies for row in reply.spots), np.int64)
        rows = answer_rows if options.rows == "answer" else np.arange(store.rows)
        self.announce("2  round trip: rows into words and back")
        self._roundtrip(EXPLAINED, rows, av, ar, max_new_tokens=options.explanation_tokens)
        variance = float(read_metadata(self.out / EXPLAINED)["variance"])
        if options.samples:
            self.announce(f"   again, {options.samples} samples a row at temperature {options.temperature:g}")
            chosen = {reply.sequence for reply in _first_answered(replies, options.sampled_problems)}
            sequence = store.column("sequence")
            few = answer_rows[np.isin(sequence[answer_rows], sorted(chosen))]
            self._roundtrip(
                SAMPLES,
                few,
                av,
                ar,
                max_new_tokens=options.explanation_tokens,
                samples=options.samples,
                temperature=options.temperature,
                variance=variance if variance > 0 else None,
            )
        self.announce("3  the reconstructor reads changed texts")
        ablated = {reply.sequence for reply in _first_answered(replies, options.ablated_problems)}
        readings = plan(self._explained(replies), lambda entry: entry.sequence in ablated, options.seed)
        with self.progress("texts") as update:
            run_reread(
                store,
                self.layer,
                readings,
                ar,
                self.out / REREAD,
                variance=variance,
                seed=options.seed,
                resume=True,
                overwrite=False,
                progress=update,
            )

    def _roundtrip(
        self, name: str, rows: np.ndarray, av: Verbalizer, ar: Reconstructor, **changes: Any
    ) -> None:
        roundtrip_options = RoundtripOptions(
            store=str(self.out / STORE),
            av=self.av,
            ar=self.ar,
            out=self.out / name,
            layer=self.layer,
            seed=self.options.seed,
            **{"variance": self.options.variance, **self.common, **changes},
        )
        with self.progress("explanations") as update:
            run_roundtrip(
                roundtrip_options,
                announce=self.announce,
                progress=update,
                verbalizer=av,
                reconstructor=ar,
                rows=rows,
            )

    def _explained(self, replies: list[Reply]) -> list[Explained]:
        owner = {reply.sequence: reply for reply in replies}
        out = []
        for part in batches(self.out / EXPLAINED, ["row", "sequence", "explanation", "status"]):
            columns = (part[name] for name in ("row", "sequence", "explanation", "status"))
            for row, sequence, text, status in zip(*columns, strict=True):
                reply = owner[int(sequence)]
                spot = reply.spots.get(int(row))
                if spot and status in ("ok", "unclosed", "untagged"):
                    pair = str(reply.record["pair"])
                    out.append(Explained(int(row), int(sequence), spot.place, pair, str(text)))
        return out


def _first_answered(replies: list[Reply], count: int) -> list[Reply]:
    return [reply for reply in replies if reply.spots][:count]


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
            clause.clause: {name: getattr(clause, name).numbers() for name in ("removed", "swapped", "alone")}
            for clause in outcome.by_number
            if clause.place == "all places"
        },
        reading=reading,
        page=page,
        seconds=round(seconds, 3),
    )
