"""The reading of a study says what the numbers say, and only that; what is shown of it is escaped."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from unittest import mock
from xml.etree import ElementTree

import pytest
from matplotlib.axes import Axes

from nla_engine.referee.intervals import Estimate
from nla_engine.studies.clauses import Clause, Cost
from nla_engine.studies.figures import Figure, Panel, draw, own, shuffled
from nla_engine.studies.findings import ALL, Contrast, Finding
from nla_engine.studies.models import Models
from nla_engine.studies.multiplication.analysis import Origin
from nla_engine.studies.multiplication.figures import figures_of
from nla_engine.studies.multiplication.outcome import Outcome, Setup
from nla_engine.studies.multiplication.present import csv_tables, shown_tables
from nla_engine.studies.multiplication.reading import read_outcome
from nla_engine.studies.patched import PATCHES, Patched
from nla_engine.studies.writeup import TOO_FEW, section_html


def at(value: float, half: float = 0.02) -> Estimate:
    return Estimate(value, value - half, value + half, 100, 50)


def costs(control: float = 0.3, **own: float) -> dict[tuple[str, str], Cost]:
    return {
        (column, change): Cost(at(value), at(control), at(value - control))
        for column in ("fve_lost", "kl_added")
        for change, value in own.items()
    }


def outcome(**changes: object) -> Outcome:
    """An outcome in which everything works."""
    score = {"fve": (0.8, -0.5), "top1": (0.9, 0.01), "top1_place": (0.9, 0.02)}
    score |= {"kl": (0.2, 4.0), "loss_recovered": (0.95, -0.2), "top1_same": (0.9, 0.3)}
    named = {"operands": (0.9, 0.0), "product": (0.7, 0.0), "read": (0.9, 0.1), "coming": (0.8, 0.1)}
    findings = [
        Finding(place, measure, at(own), at(control), at(control), at(own - control, 0.04))
        for place in ("first", "middle", "last", "end")
        for measure, (own, control) in {**score, **named, "other": (0.2, 1.0)}.items()
    ]
    whole = {"fve_lost": at(0.8), "kl_added": at(0.1)}
    by_kind = [
        Clause(ALL, kind, kind, 90, whole, costs(removed=removed, swapped=swapped, negated=0.1))
        for kind, removed, swapped in (("numbers", 1.0, 1.0), ("tokens", 1.0, 0.2))
    ]
    by_number = [replace(entry, clause=f"{i} of 2") for i, entry in enumerate(by_kind, 1)]
    base = Outcome(
        setup=Setup(Models("m", "v", "r", 20, bundled=False), "10-99", "10-99", "any", 0, 4, 0.7),
        problems=100,
        pairs=100,
        right=60,
        unanswered=0,
        rows=500,
        early_rows=0,
        status_ok=1.0,
        variance=0.7,
        variance_rows=500,
        control_vectors=500,
        accuracy=[("all", "all problems", at(0.6))],
        tokenisation=[(4, "1+1+1+1", 100, at(1.0), at(0.0))],
        findings=findings,
        correctness=[Contrast(ALL, "operands", at(0.9), at(0.5), at(0.4))],
        detection=[(Contrast(ALL, "fve", at(0.9), at(0.2), at(0.7)), at(0.95))],
        origins=[Origin("other", 50, at(0.05), at(0.9))],
        agreement=[],
        by_number=by_number,
        by_kind=by_kind,
        patched=[
            Patched(place, "kl", variant, at(0.2)) for place in (ALL, "first") for variant in ("", "shuffled")
        ],
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def reading(**changes: object) -> str:
    return " ".join(read_outcome(outcome(**changes)))


def unbounded(estimate: Estimate) -> Estimate:
    return replace(estimate, low=math.nan, high=math.nan)


def without_bounds(cost: Cost, value: float) -> Cost:
    return Cost(unbounded(at(value)), unbounded(cost.control), unbounded(cost.margin))


def test_without_intervals_neither_a_difference_nor_its_absence_is_claimed() -> None:
    """From fewer than five operand pairs, whatever the means are."""
    base = outcome()
    findings = [
        replace(
            f, **{name: unbounded(getattr(f, name)) for name in ("own", "shuffled", "text_only", "margin")}
        )
        for f in base.findings
    ]
    for swapped in (1.2, 0.0):
        text = reading(
            findings=findings,
            by_kind=[
                replace(c, costs={key: without_bounds(cost, swapped) for key, cost in c.costs.items()})
                for c in base.by_kind
            ],
            detection=[(base.detection[0][0], unbounded(at(0.95)))],
            correctness=[],
            origins=[],
        )
        for claim in (
            "At no place",
            "Hardly",
            "do not name",
            "no rarer",
            "rarer than with explanations of other problems everywhere",
            "more often than chance",
            "hold something",
            "belongs to the problem",
            "does not tell",
            "usefully",
            "What belongs",
            "nearly as on the original",
            "was not shown",
            "a negation costs more than a neutral word.",
        ):
            assert claim not in text, claim
        assert text.count("cannot be told") >= 11


def with_margin(measure: str, value: float, places: tuple[str, ...] = ("first", "middle", "last", "end")):
    """The findings of `outcome`, with another margin of one measure."""
    return [
        replace(f, margin=at(value, 0.04)) if f.measure == measure and f.place in places else f
        for f in outcome().findings
    ]


#: What is changed in `outcome`, what the reading then says, and what it then does not say.
READINGS: dict[str, tuple[dict[str, object], str, str]] = {
    "all carry": (
        {},
        "more of their own vector than those of other problems at every place (FVE 0.80)",
        "At no place",
    ),
    "none carries": (
        {"findings": with_margin("fve", 0.01)},
        "At no place do explanations carry measurably more",
        "carry more of their own",
    ),
    "one does not": (
        {"findings": with_margin("fve", 0.01, ("end",))},
        "At “end of reply” no difference could be shown",
        "At no place",
    ),
    "operands by chance": (
        {"findings": with_margin("operands", 0.03)},
        "do not name both true operands more often",
        "Explanations name both true operands more often than",
    ),
    "others by chance": (
        {"findings": with_margin("other", 0.0)},
        "such numbers are no evidence",
        "That is rarer",
    ),
    "product of the words": ({}, "the verbalizer multiplied by itself", "Which of the two"),
    "product of the vector": (
        {"origins": [Origin("other", 50, at(0.9), at(0.05))]},
        "read from the vector",
        "multiplied by itself",
    ),
    "product of neither": (
        {"origins": [Origin("other", 50, at(0.5), at(0.49))]},
        "Which of the two is the rule",
        "multiplied by itself",
    ),
    "few wrong operands": (
        {"origins": []},
        "fewer than 10 explanations state wrong operands",
        "multiplied by itself",
    ),
    "FVE sorts": ({}, "A threshold on FVE sorts them usefully", "not closely enough"),
    "FVE hints": (
        {"detection": [(outcome().detection[0][0], at(0.7))]},
        "not closely enough to trust",
        "sorts them usefully",
    ),
    "FVE is blind": (
        {"detection": [(outcome().detection[0][0], at(0.51))]},
        "does not tell true numbers from false",
        "usefully",
    ),
    "better when right": (
        {},
        "both true operands more often where the model is right",
        "model answers right cannot",
    ),
    "too few wrong": (
        {"correctness": [], "right": 98},
        "cannot be told: 2 of 100 replies are wrong",
        "where the model is right",
    ),
    "the same when wrong": (
        {"correctness": [Contrast(ALL, "operands", at(0.9), at(0.89), at(0.01))]},
        "both true operands without a difference that could be shown",
        "where the model is right",
    ),
    "one clause carries": (
        {},
        "stands in the clauses about numbers",
        "The intervals of the first two overlap",
    ),
    "form matters": (
        {},
        "Leaving out costs more than swapping for clauses about tokens",
        "Leaving out costs more than swapping for clauses about numbers",
    ),
    "the model acts on it": (
        {},
        "at every place: loss recovered 0.95 (another problem's: −0.20). It acts nearly as on the original",
        "recovers as much",
    ),
    "the model does not act on it": (
        {"findings": with_margin("loss_recovered", 0.0)},
        "That the model acts on the reconstruction was not shown at any place",
        "nearly as on the original",
    ),
    "another problem's serves as well": (
        {
            "findings": [
                replace(f, shuffled=at(0.95), margin=at(0.001, 0.0005))
                if (f.measure, f.place) == ("loss_recovered", "end")
                else f
                for f in outcome().findings
            ]
        },
        "At “end of reply” another problem's explanation recovers as much",
        "explanation, at every place: loss recovered",
    ),
    "not patched": (
        {"findings": [f for f in outcome().findings if f.measure not in PATCHES], "patched": []},
        "FVE falls by",
        "layer's mean vector",
    ),
    "negations are not read": ({}, "reads a negation as one was not shown", "costs more than a neutral"),
    "negations are read": (
        {
            "by_kind": [
                replace(c, costs=costs(removed=1.0, swapped=0.5, negated=0.9)) for c in outcome().by_kind
            ]
        },
        "In clauses about numbers and tokens a negation costs more than a neutral word",
        "reads a negation as one was not shown",
    ),
    "early rows": ({"early_rows": 7}, "7 of the 500 rows stand at positions below 50", "At no place"),
    "texts cut": ({"status_ok": 0.5}, "Only 0.50 of the explanations were closed", "At no place"),
}


@pytest.mark.parametrize("case", READINGS)
def test_the_reading_follows_the_numbers(case: str) -> None:
    changes, says, says_not = READINGS[case]
    text = reading(**changes)
    assert says in text and says_not not in text


def test_what_is_shown_is_escaped_and_complete() -> None:
    hostile = outcome(by_number=[replace(outcome().by_number[0], clause="<script>1 of 1", about="x")])
    markup = section_html(["<script>alert(1)</script>"], shown_tables(hostile), [], None)  # type: ignore[arg-type]
    assert "<script" not in markup and "&lt;script&gt;" in markup
    names = [table.name for table in csv_tables(outcome())]
    assert names == [
        "measures",
        "accuracy",
        "tokenisation",
        "trust",
        "origin",
        "correctness",
        "patch",
        "clauses",
        "clauses_kl",
        "clause_kinds",
        "clause_kinds_kl",
    ]
    drawn = [figure.name for figure in figures_of(outcome())]
    assert drawn[:5] == ["scores", "naming", "patch", "clauses", "trust"]


def test_a_figure_without_enough_cases_says_so(tmp_path: Path) -> None:
    """Of a whole figure, and of one place in it. Letters are shapes in an SVG: what is written is caught before."""
    poor = outcome(detection=[], agreement=[], by_number=[])
    figures = {figure.name: figure for figure in figures_of(poor)}
    drawn = {name: [path.name for path in draw(figure, tmp_path)] for name, figure in figures.items()}
    assert {name for name, paths in drawn.items() if not paths} == {"clauses", "trust", "agreement"}
    markup = section_html([], [], list(figures.values()), tmp_path)
    assert markup.count(TOO_FEW) == 3 and markup.count("<img") == 3
    assert [figure.name for figure in figures_of(outcome(setup=replace(poor.setup, samples=0)))][
        -1
    ] == "trust"
    few, none = Estimate(0.5, math.nan, math.nan, 7, 3), Estimate(math.nan, math.nan, math.nan, 0, 0)
    places = {"a": "place a", "b": "place b", "c": "place c"}
    panel = Panel("x", "share", [own({"a": few, "b": none, "c": Estimate(0.5, 0.4, 0.6, 90, 40)})])
    with mock.patch.object(Axes, "text") as said:
        draw(Figure("one", "x", places, [panel]), tmp_path)
    assert [call.args[1:3] for call in said.call_args_list] == [(0, "too few cases"), (1, "not defined")]


def test_a_drawn_figure_follows_a_dark_page(tmp_path: Path) -> None:
    points = {"a": Estimate(0.5, 0.4, 0.6, 90, 40)}
    figure = Figure("one", "x", {"a": "place a"}, [Panel("x", "share", [own(points), shuffled(points)])])
    _, path = draw(figure, tmp_path)
    root = ElementTree.fromstring(path.read_text())
    (style,) = [e.text or "" for e in root.iter("{http://www.w3.org/2000/svg}style")]
    used = {
        f"{part}: {colour}"
        for element in root.iter()
        for part, colour in re.findall(r"(fill|stroke): (#[0-9a-f]{6})", element.get("style", ""))
        if colour != "#b0b0b0"  # the grid's grey suits both
    }
    assert {"fill: #ffffff", "stroke: #000000", "stroke: #0072b2", "fill: #d55e00"} <= used
    dark = style.split("(prefers-color-scheme:dark)")[1]
    assert all(f'[style*="{each}"]' in dark for each in used)
    markup = section_html([], [], [figure], tmp_path)
    assert "plate" not in markup and "data:image/svg+xml;base64," in markup


def test_readings_of_a_growing_difference_change_once() -> None:
    """As the margin grows from none to a clear one, the claim appears and stays."""
    claims = ["carry more of their own" in reading(findings=with_margin("fve", m / 100)) for m in range(12)]
    assert claims == sorted(claims) and set(claims) == {False, True}
