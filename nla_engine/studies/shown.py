"""Tables and figures that any study shows of its findings and clauses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nla_engine.referee.intervals import Estimate
from nla_engine.studies.clauses import Clause
from nla_engine.studies.figures import GREY, SHARE, Figure, Panel, Series, own, shuffled
from nla_engine.studies.findings import ALL, Finding
from nla_engine.studies.tables import Cell, Table


def findings_table(
    findings: Sequence[Finding],
    field: str,
    places: Mapping[str, str],
    measures: Mapping[str, str],
    name: str,
    title: str,
    note: str,
) -> Table:
    """Measures down, places across. field: of a finding ("own"). places, measures: key -> label."""
    of = {(finding.place, finding.measure): getattr(finding, field) for finding in findings}
    rows: list[tuple[Cell, ...]] = [
        (written, *(of.get((place, measure)) for place in places))
        for measure, written in measures.items()
        if any((place, measure) in of for place in places)
    ]
    return Table(name, title, note, ("", *places.values()), rows)


def clauses_table(
    clauses: Sequence[Clause], column: str, places: Mapping[str, str], name: str, title: str, note: str
) -> Table:
    """FVE lost with each clause. column: heading of the clause column. note: about the intervals."""
    return Table(
        name,
        title,
        "Lost when the clause is left out; when the same clause of another problem's explanation stands there; "
        "and the FVE of the clause alone. About: what most of these clauses name. " + note,
        (
            "place",
            column,
            "about",
            "rows",
            "untouched FVE",
            "lost if left out",
            "lost if swapped",
            "FVE alone",
        ),
        [
            (
                places.get(entry.place, entry.place),
                entry.clause,
                entry.about,
                entry.rows,
                entry.whole,
                entry.removed,
                entry.swapped,
                entry.alone,
            )
            for entry in clauses
        ],
    )


def points(findings: Sequence[Finding], measure: str, field: str) -> dict[str, Estimate]:
    """One field of one measure, by place."""
    return {f.place: getattr(f, field) for f in findings if f.measure == measure}


def scores_figure(findings: Sequence[Finding], places: Mapping[str, str], control_vectors: int) -> Figure:
    """FVE and both retrievals. control_vectors: how many vectors a vector was searched among."""
    panels = [
        Panel(
            "variance explained",
            "FVE",
            [own(points(findings, "fve", "own")), shuffled(points(findings, "fve", "shuffled"))],
            mark=0.0,
        )
    ]
    for measure, title in (
        ("top1", f"vector found among {control_vectors:,}"),
        ("top1_place", "row found among those of its place"),
    ):
        chance = Series("chance", GREY, "|", points(findings, measure, "shuffled"))
        panels.append(
            Panel(title, "share (retrieval top-1)", [own(points(findings, measure, "own")), chance], SHARE)
        )
    caption = "How much of the vector the explanation carries, and how much one of another problem does."
    return Figure("scores", caption, places, panels)


def clauses_figure(by_number: Sequence[Clause], places: Mapping[str, str]) -> Figure:
    """One panel per clause, of explanations with the commonest number of clauses."""
    caption = (
        "FVE lost when one clause of an explanation is left out, or taken from another problem's explanation."
    )
    everywhere = [clause for clause in by_number if clause.place == ALL]
    if not everywhere:
        return Figure("clauses", caption, {}, [])
    common = max(everywhere, key=lambda clause: clause.rows).clause.split(" of ")[1]
    names = [clause.clause for clause in everywhere if clause.clause.endswith(f" of {common}")]
    panels = []
    for name in names:
        of = [clause for clause in by_number if clause.clause == name]
        series = [
            own({clause.place: clause.removed for clause in of}, "clause left out"),
            shuffled(
                {clause.place: clause.swapped for clause in of}, "clause of another problem in its place"
            ),
        ]
        panels.append(Panel(f"clause {name} (about {of[0].about})", "FVE lost", series, mark=0.0))
    return Figure("clauses", caption, {ALL: ALL, **places}, panels, same_scale=True)
