"""The shared modules are enough for a second study: interrupted at every stage, resumed, refused and overwritten."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pytest
from commands import contents

from nla_engine.errors import RequestError
from nla_engine.referee.intervals import Bootstrap, interval_note
from nla_engine.studies.directory import EXPLAINED, REREAD, StudyDirectory
from nla_engine.studies.findings import Finding, load_scored, score_findings
from nla_engine.studies.models import Models
from nla_engine.studies.reread import explained_rows, plan
from nla_engine.studies.sentences import Words
from nla_engine.studies.shown import findings_table, scores_figure
from nla_engine.studies.stages import Progress, Stages
from nla_engine.studies.writeup import Writeup

PLACES = {"start": "first token", "end": "last token"}
NOTE = interval_note("questions")
WORDS = Words(PLACES, "questions", {})


@dataclass(frozen=True)
class Options:
    """Options of the second study."""

    out: Path
    questions: int = 5
    resume: bool = False
    overwrite: bool = False


def run_sums(options: Options, progress: Progress) -> list[Finding]:
    """The second study: does an explanation carry its row, where a reply about a sum starts and ends?"""
    out = options.out
    asked = {**asdict(options), "out": str(out)}
    with StudyDirectory(out, "sums.md", asked, options.resume, options.overwrite).opened():
        stages = Stages(out, Models.named(None, None, None, None), lambda text: None, progress, device="cpu")
        records = [
            {"messages": [{"role": "user", "content": f"What is {n} + {3 * n}?"}], "sum": 4 * n}
            for n in range(11, 11 + options.questions)
        ]
        store = stages.capture(records, max_new_tokens=6, positions="generated")
        sequences = list(store.iter_sequences())
        places = {sequence.rows.start: "start" for sequence in sequences}
        places |= {sequence.rows.stop - 1: "end" for sequence in sequences}
        clusters = {sequence.number: str(sequence.source["sum"]) for sequence in sequences}
        av, ar = stages.load_pair()
        variance = stages.explain(np.array(sorted(places)), av, ar, max_new_tokens=24)
        explained = explained_rows(out / EXPLAINED, places, clusters)
        stages.reread(plan(explained, 0), ar, variance=variance)
        rows = load_scored(out / EXPLAINED, out / REREAD, places, clusters)
        found = [
            finding
            for place in rows.places(PLACES)
            for finding in score_findings(rows, place, len(places), {}, Bootstrap(0))
        ]
        table = findings_table(found, "own", PLACES, {"fve": "FVE"}, "scores", "FVE", NOTE)
        figure = scores_figure(found, PLACES, len(places))
        reading = [WORDS.variance(found), WORDS.retrieval(found)]
        Writeup("sums.md", "Sums", "Sums", "Sums", reading, [table], [table], [figure]).write(out)
        return found


def progress(stop: str | None = None) -> Progress:
    """Stops the run, as Ctrl-C does, when something is first counted under this name."""

    def update(counted: str, done: int) -> None:
        if counted == stop and done:
            raise KeyboardInterrupt

    @contextmanager
    def counting(counted: str) -> Iterator[Callable[[int, int], None]]:
        yield lambda done, total: update(counted, done)

    return counting


def test_a_second_study_needs_no_more(tmp_path: Path) -> None:
    out = tmp_path / "sums"
    for stage in ("sequences", "texts"):
        with pytest.raises(KeyboardInterrupt):
            run_sums(Options(out, resume=True), progress(stage))
    explained = contents(out / EXPLAINED)
    found = run_sums(Options(out, resume=True), progress())
    assert contents(out / EXPLAINED) == explained, "what was there is made again"
    assert [(f.place, f.measure) for f in found] == [
        (place, measure) for place in PLACES for measure in ("fve", "top1", "top1_place")
    ]
    assert "FVE" in (out / "sums.md").read_text() and "questions (2,000" in (out / "report.html").read_text()
    assert (out / "tables/scores.csv").exists() and (out / "figures/scores.svg").exists()

    before = contents(out)
    with pytest.raises(RequestError, match="exists; pass --resume"):
        run_sums(Options(out), progress())
    with pytest.raises(
        RequestError, match="other options .questions was 5, is now 2.; --overwrite starts again"
    ):
        run_sums(Options(out, questions=2, resume=True), progress())
    assert contents(out) == before

    (out / "mine.txt").write_text("mine")
    with pytest.raises(KeyboardInterrupt):
        run_sums(Options(out, questions=2, overwrite=True), progress("sequences"))
    assert {path.name for path in out.iterdir()} == {"study.json", "problems.jsonl", "run.zarr", "mine.txt"}
