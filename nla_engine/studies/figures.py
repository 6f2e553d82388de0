"""The figures of the multiplication study, as PNG and SVG. Every point stands with its 95% interval.

Colours are of Okabe and Ito's palette and every series has a marker of its own, so that no reader depends on colour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nla_engine.studies.analysis import ALL
from nla_engine.studies.answers import PLACE_TITLES
from nla_engine.studies.intervals import Estimate
from nla_engine.studies.naming import MEASURES
from nla_engine.studies.outcome import Outcome

#: Panels beside each other, at most.
COLUMNS = 3
BLUE, VERMILLION, GREY, GREEN = "#0072B2", "#D55E00", "#7a7a7a", "#009E73"

#: A label that the legend leaves out.
_UNNAMED = "_"
_ABSENT: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7.5, "color": GREY}


@dataclass(frozen=True)
class Series:
    """One kind of point in a panel. points: place -> estimate; one without an interval (too few cases) is not drawn."""

    label: str
    colour: str
    marker: str
    points: dict[str, Estimate]


@dataclass(frozen=True)
class Panel:
    """One plot: places from top to bottom, a number to the right. limits: of the number; mark: a line drawn at it."""

    title: str
    unit: str
    series: Sequence[Series]
    limits: tuple[float, float] | None = None
    mark: float | None = None


@dataclass(frozen=True)
class Figure:
    """Panels over the same places. name: of its files. caption: one sentence. same_scale: of all the numbers."""

    name: str
    caption: str
    places: Sequence[str]
    panels: Sequence[Panel]
    same_scale: bool = False


def figures_of(outcome: Outcome) -> list[Figure]:
    """Every figure that the outcome has numbers for."""
    figures = [
        _scores(outcome),
        _naming(outcome),
        _clauses(outcome),
        _detection(outcome),
        _agreement(outcome),
    ]
    return [figure for figure in figures if figure is not None]


def draw(figure: Figure, directory: Path) -> list[Path]:
    """Write NAME.png and NAME.svg into a directory that exists; the same numbers give the same bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style: dict[Any, Any] = {
        "svg.hashsalt": "nla_engine",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    paths = [directory / f"{figure.name}.{suffix}" for suffix in ("png", "svg")]
    with pyplot.rc_context(rc=style):
        count, across = len(figure.panels), min(len(figure.panels), COLUMNS)
        down = -(-count // across)
        height = 0.9 + down * (0.7 + 0.4 * len(figure.places))
        plot, grid = pyplot.subplots(
            down,
            across,
            figsize=(1.3 + 2.8 * across, height),
            sharey=True,
            sharex=figure.same_scale,
            squeeze=False,
            layout="constrained",
        )
        every = grid.ravel().tolist()
        for axes, panel in zip(every, figure.panels, strict=False):
            _draw_panel(axes, panel, figure.places)
        for axes in every[count:]:
            axes.set_axis_off()
        every[0].set_yticks(range(len(figure.places)), [PLACE_TITLES.get(p, p) for p in figure.places])
        every[0].set_ylim(len(figure.places) - 0.5, -0.5)
        handles: dict[str, Any] = {}
        for axes in every:
            found, labels = axes.get_legend_handles_labels()
            handles |= dict(zip(labels, found, strict=True))
        place: dict[str, Any] = {"loc": "outside lower center", "ncols": across, "frameon": False}
        plot.legend(handles.values(), handles.keys(), **place)
        plot.savefig(paths[0], dpi=160, metadata={"Software": None})
        plot.savefig(paths[1], metadata={"Date": None})
        pyplot.close(plot)
    return paths


def _draw_panel(axes: Any, panel: Panel, places: Sequence[str]) -> None:
    step = 0.22 if len(panel.series) > 1 else 0.0
    for y in range(1, len(places), 2):
        axes.axhspan(y - 0.5, y + 0.5, color="black", alpha=0.04, linewidth=0)
    if panel.mark is not None:
        axes.axvline(panel.mark, color="black", linewidth=0.8, linestyle=":")
    for number, series in enumerate(panel.series):
        shift = (number - (len(panel.series) - 1) / 2) * step
        known = [
            (y, series.points[p])
            for y, p in enumerate(places)
            if p in series.points and math.isfinite(series.points[p].low)
        ]
        if not known:
            continue
        x = [estimate.value for _, estimate in known]
        # The point lies in its interval but for rounding: a bar of negative length would be refused.
        bars = [
            [max(estimate.value - estimate.low, 0.0) for _, estimate in known],
            [max(estimate.high - estimate.value, 0.0) for _, estimate in known],
        ]
        axes.errorbar(
            x,
            [y + shift for y, _ in known],
            xerr=bars,
            fmt=series.marker,
            color=series.colour,
            markersize=4.5,
            elinewidth=1.3,
            capsize=2,
            label=series.label,
        )
    defined = {p for series in panel.series for p, estimate in series.points.items() if estimate.known}
    for y, name in enumerate(places):
        if name not in defined:
            axes.text(0.5, y, "not defined", transform=axes.get_yaxis_transform(), **_ABSENT)
    axes.set_title(panel.title, fontsize=9)
    axes.set_xlabel(panel.unit)
    axes.grid(axis="x", alpha=0.25)
    axes.tick_params(axis="y", length=0)
    if panel.limits:
        axes.set_xlim(*panel.limits)


def _points(outcome: Outcome, measure: str, name: str) -> dict[str, Estimate]:
    return {f.place: getattr(f, name) for f in outcome.findings if f.measure == measure}


def _own(points: dict[str, Estimate], label: str = "explanation of the row") -> Series:
    return Series(label, BLUE, "o", points)


def _shuffled(points: dict[str, Estimate]) -> Series:
    return Series("of another problem, same place", VERMILLION, "s", points)


def _scores(outcome: Outcome) -> Figure:
    panels = [
        Panel(
            "variance explained",
            "FVE",
            [_own(_points(outcome, "fve", "own")), _shuffled(_points(outcome, "fve", "shuffled"))],
            mark=0.0,
        )
    ]
    for measure, title in (
        ("top1", f"vector found among {outcome.control_vectors:,}"),
        ("top1_place", "row found among those of its place"),
    ):
        chance = Series("chance", GREY, "|", _points(outcome, measure, "shuffled"))
        panels.append(
            Panel(
                title,
                "share (retrieval top-1)",
                [_own(_points(outcome, measure, "own")), chance],
                (-0.04, 1.04),
            )
        )
    caption = "How much of the vector the explanation carries, and how much one of another problem does."
    return Figure("scores", caption, outcome.places, panels)


def _naming(outcome: Outcome) -> Figure:
    panels = [
        Panel(
            title,
            "share of explanations",
            [
                _own(_points(outcome, measure, "own")),
                _shuffled(_points(outcome, measure, "shuffled")),
                Series("of other problems, any place", GREY, "^", _points(outcome, measure, "text_only")),
            ],
            (-0.04, 1.04),
        )
        for measure, title in MEASURES.items()
    ]
    caption = "How often an explanation names what is true of its problem, and how often one of another problem does."
    return Figure("naming", caption, outcome.places, panels)


def _clauses(outcome: Outcome) -> Figure | None:
    """The commonest number of clauses; one panel a clause."""
    everywhere = [clause for clause in outcome.by_number if clause.place == ALL]
    if not everywhere:
        return None
    common = max(everywhere, key=lambda clause: clause.rows).clause.split(" of ")[1]
    names = [clause.clause for clause in everywhere if clause.clause.endswith(f" of {common}")]
    panels = []
    for name in names:
        of = [clause for clause in outcome.by_number if clause.clause == name]
        series = [
            Series("clause left out", BLUE, "o", {clause.place: clause.removed for clause in of}),
            Series(
                "clause of another problem in its place",
                VERMILLION,
                "s",
                {clause.place: clause.swapped for clause in of},
            ),
        ]
        panels.append(Panel(f"clause {name} (about {of[0].about})", "FVE lost", series, mark=0.0))
    caption = (
        "FVE lost when one clause of an explanation is left out, or taken from another problem's explanation."
    )
    return Figure("clauses", caption, [ALL, *outcome.places], panels, same_scale=True)


def _detection(outcome: Outcome) -> Figure | None:
    if not outcome.detection:
        return None
    sound = {contrast.place: contrast.first for contrast, _ in outcome.detection}
    false = {contrast.place: contrast.second for contrast, _ in outcome.detection}
    told = {contrast.place: chance for contrast, chance in outcome.detection}
    panels = [
        Panel(
            "FVE by what is named",
            "FVE",
            [
                Series("true operands, no other number", BLUE, "o", sound),
                Series("another number", VERMILLION, "s", false),
            ],
        ),
        Panel(
            "does FVE tell them apart?",
            "AUC (0.5: not at all)",
            [Series(_UNNAMED, GREEN, "D", told)],
            (0.0, 1.04),
            mark=0.5,
        ),
    ]
    places = [ALL, *(place for place in outcome.places if place in sound)]
    return Figure("trust", "Whether a high FVE means that the numbers in the text are true.", places, panels)


def _agreement(outcome: Outcome) -> Figure | None:
    if not outcome.agreement:
        return None
    of = {entry.place: entry for entry in outcome.agreement}
    panels = [
        Panel(
            "two samples state the same operands",
            "share of pairs of samples",
            [
                _own({place: entry.same_pair for place, entry in of.items()}, "samples of one row"),
                _shuffled({place: entry.chance for place, entry in of.items()}),
            ],
            (-0.04, 1.04),
        ),
        Panel(
            "the stated operands are true",
            "share of samples",
            [
                Series(
                    "all samples agree",
                    GREEN,
                    "D",
                    {place: entry.right_unanimous for place, entry in of.items()},
                ),
                Series(
                    "samples differ", GREY, "^", {place: entry.right_divided for place, entry in of.items()}
                ),
            ],
            (-0.04, 1.04),
        ),
    ]
    return Figure(
        "agreement", "Whether samples of one explanation agree, and are then right.", list(of), panels
    )
