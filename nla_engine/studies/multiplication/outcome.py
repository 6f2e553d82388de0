"""Everything that the multiplication study found, computed from its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from nla_engine.referee.intervals import Bootstrap, Estimate
from nla_engine.roundtrip.results import ranked_among, read_metadata
from nla_engine.studies.clauses import Clause, clause_losses
from nla_engine.studies.findings import Contrast, Finding
from nla_engine.studies.models import Models
from nla_engine.studies.multiplication.agreement import Agreement, agreement
from nla_engine.studies.multiplication.analysis import (
    Origin,
    accuracy,
    correctness,
    detection,
    findings,
    load_rows,
    origins,
    tokenisation,
)
from nla_engine.studies.multiplication.answers import PLACES, Reply, places_of
from nla_engine.studies.multiplication.naming import kind_of
from nla_engine.studies.patched import Patched, load_patched, patch_findings, patched_means


@dataclass(frozen=True)
class Setup:
    """What was studied. first, second: ranges of the operands, as they were given. split: see `draw_problems`."""

    models: Models
    first: str
    second: str
    split: str
    seed: int
    samples: int
    temperature: float


@dataclass(frozen=True)
class Outcome:
    """The results. A list is empty if the rows do not allow an answer, or if it was not measured."""

    setup: Setup
    problems: int
    pairs: int
    right: int
    unanswered: int
    rows: int
    early_rows: int
    status_ok: float
    variance: float
    variance_rows: int
    control_vectors: int
    accuracy: list[tuple[str, str, Estimate]]
    tokenisation: list[tuple[int, str, int, Estimate, Estimate]]
    findings: list[Finding]
    correctness: list[Contrast]
    detection: list[tuple[Contrast, Estimate]]
    origins: list[Origin]
    agreement: list[Agreement]
    by_number: list[Clause]
    by_kind: list[Clause]
    patched: list[Patched]

    @property
    def places(self) -> dict[str, str]:
        """The places that were measured, in reading order, and their labels."""
        there = {finding.place for finding in self.findings}
        return {place: title for place, title in PLACES.items() if place in there}

    @property
    def wrong(self) -> int:
        """Problems answered wrongly or not at all."""
        return self.problems - self.right


def measure(
    setup: Setup,
    replies: list[Reply],
    explained: Path,
    reread: Path,
    *,
    samples: Path | None = None,
    patched: Path | None = None,
    clauses: Path | None = None,
) -> Outcome:
    """The outcome of a finished study, from its tables. samples, patched, clauses: if there are."""
    bootstrap = Bootstrap(setup.seed)
    rows = load_rows(replies, explained, reread)
    metadata = read_metadata(explained)
    facts = pq.read_table(explained, columns=["early", "status"]).to_pydict()
    clusters = dict(zip(rows.row.tolist(), rows.cluster.tolist(), strict=True))
    by_number, by_kind = (
        ([], [])
        if clauses is None
        else clause_losses(clauses, places_of(replies), clusters, PLACES, kind_of, bootstrap)
    )
    found = findings(
        rows, ranked_among(metadata), read_metadata(reread).get("control_vectors", {}), bootstrap
    )
    means: list[Patched] = []
    if patched is not None:
        columns, there = load_patched(patched, rows.row), rows.places(PLACES)
        found += [each for place in there for each in patch_findings(rows, columns, place, bootstrap)]
        means = patched_means(rows, columns, there, bootstrap)
    return Outcome(
        setup=setup,
        problems=len(replies),
        pairs=len({reply.pair for reply in replies}),
        right=sum(reply.correct for reply in replies),
        unanswered=sum(reply.answer is None for reply in replies),
        rows=len(facts["status"]),
        early_rows=int(np.sum(facts["early"])),
        status_ok=facts["status"].count("ok") / len(facts["status"]),
        variance=float(metadata["variance"]),
        variance_rows=int(metadata["variance_rows"]),
        control_vectors=ranked_among(metadata),
        accuracy=accuracy(replies),
        tokenisation=tokenisation(replies),
        findings=found,
        correctness=correctness(rows, bootstrap),
        detection=detection(rows, bootstrap),
        origins=origins(rows, bootstrap),
        agreement=[] if samples is None else agreement(replies, samples, bootstrap),
        by_number=by_number,
        by_kind=by_kind,
        patched=means,
    )
