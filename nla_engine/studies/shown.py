"""Tables and figures that any study shows of its findings and clauses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nla_engine.referee.clauses import CHANGES, REMOVED, SWAPPED
from nla_engine.referee.intervals import Estimate
from nla_engine.referee.table import CHANGE, KL, RECOVERED, TOP1
from nla_engine.referee.variants import MEAN, RECONSTRUCTION, SHUFFLED, STORED, ZERO
from nla_engine.studies.clauses import FVE_LOST, KL_ADDED, Clause
from nla_engine.studies.figures import BLUE, GREY, SHARE, VERMILLION, Figure, Panel, Series, own, shuffled
from nla_engine.studies.findings import ALL, Finding
from nla_engine.studies.patched import Patched
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


def clauses_tables(
    clauses: Sequence[Clause], column: str, places: Mapping[str, str], name: str, by: str, note: str
) -> list[Table]:
    """FVE lost, and KL added where it was measured, with each clause. column: heading of the clause column.

    by: ends the titles, such as ", by what it is about"; note: about the intervals
    """
    out = []
    for measure, named, title, lost in (
        (FVE_LOST, name, "FVE lost without a clause", "lost"),
        (KL_ADDED, f"{name}_kl", "KL added without a clause", "added"),
    ):
        of = [clause for clause in clauses if (measure, REMOVED) in clause.costs]
        heads = (f"{lost} if left out", "other words left out", f"{lost} if swapped", "other words swapped")
        rows: list[tuple[Cell, ...]] = []
        for entry in of:
            costs = [entry.cost(change, measure) for change in CHANGES]
            values = [value for cost in costs for value in (cost.own, cost.control)]
            place = places.get(entry.place, entry.place)
            rows.append((place, entry.clause, entry.about, entry.rows, entry.whole[measure], *values))
        out.append(
            Table(
                named,
                title + by,
                "When the clause is left out; when the clause of that number of another problem's explanation stands "
                "there; when it is negated by a rule. Behind each its control: the same done to as many words at a "
                "random place; a neutral word instead of the negation. About: what most of these clauses name. "
                + note,
                (
                    "place",
                    column,
                    "about",
                    "rows",
                    f"untouched {title.split()[0]}",
                    *heads,
                    f"{lost} if negated",
                    "neutral word",
                ),
                rows,
            )
        )
    return [table for table in out if table.rows]


#: Of each vector that takes a row's place: what a reader sees.
_VECTORS = {
    RECONSTRUCTION: "from the explanation",
    SHUFFLED: "from another problem's explanation",
    MEAN: "the layer's mean",
    ZERO: "zero",
    STORED: "the row as stored",
}
_PATCH_MEASURES = {
    KL: "KL",
    RECOVERED: "loss recovered",
    TOP1: "same next token",
    CHANGE: "log-probability of the next token, change",
}


def patch_table(patched: Sequence[Patched], places: Mapping[str, str], note: str) -> Table:
    """Measures and vectors down, places across."""
    of = {(entry.place, entry.measure, entry.variant): entry.value for entry in patched}
    wide = {ALL: ALL, **places}
    return Table(
        "patch",
        "What the model makes of the vectors",
        "A vector takes the row's place, and the model goes on from there. KL: nats between its next-token "
        "distribution and the original one. Loss recovered: 1 - KL / KL of the layer's mean. " + note,
        ("measure", "vector", *wide.values()),
        [
            (label, vector, *(of.get((place, measure, variant)) for place in wide))
            for measure, label in _PATCH_MEASURES.items()
            for variant, vector in _VECTORS.items()
            if any((place, measure, variant) in of for place in wide)
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


def patch_figure(findings: Sequence[Finding], places: Mapping[str, str]) -> Figure:
    """What the model makes of reconstructions; without panels where none was measured."""
    caption = "What the model makes of the vector that the AR reads from the words, in the place of its own."
    units = {KL: "nats", RECOVERED: "1 - KL / KL of the mean vector", TOP1: "share"}
    panels = [
        Panel(
            title,
            units[measure],
            [own(points(findings, measure, "own")), shuffled(points(findings, measure, "shuffled"))],
            SHARE if measure == TOP1 else None,
            mark=0.0 if measure != TOP1 else None,
        )
        for measure, title in ((KL, "KL"), (RECOVERED, "loss recovered"), (TOP1, "same next token"))
        if points(findings, measure, "own")
    ]
    return Figure("patch", caption, places, panels)


def clauses_figure(by_number: Sequence[Clause], places: Mapping[str, str]) -> Figure:
    """One panel per clause, of explanations with the commonest number of clauses."""
    caption = (
        "FVE lost when one clause of an explanation is left out, or taken from another problem's explanation; and when "
        "the same is done to other words."
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
            Series(
                label, colour, marker, {clause.place: getattr(clause.cost(change), field) for clause in of}
            )
            for label, colour, marker, change, field in (
                ("clause left out", BLUE, "o", REMOVED, "own"),
                ("other words left out", GREY, "^", REMOVED, "control"),
                ("clause of another problem in its place", VERMILLION, "s", SWAPPED, "own"),
                ("in the place of other words", GREY, "D", SWAPPED, "control"),
            )
        ]
        panels.append(Panel(f"clause {name} (about {of[0].about})", "FVE lost", series, mark=0.0))
    return Figure("clauses", caption, {ALL: ALL, **places}, panels, same_scale=True)
