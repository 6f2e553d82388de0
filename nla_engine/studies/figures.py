"""Figures of a study, as PNG and SVG. Every point has its 95% interval.

Colours are from Okabe and Ito's palette, and every series has its own marker, so that no reader depends on colour.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nla_engine.referee.intervals import Estimate

#: Most panels side by side.
COLUMNS = 3
BLUE, VERMILLION, GREY, GREEN = "#0072B2", "#D55E00", "#7a7a7a", "#009E73"
#: Axis limits of a share, with room for the points at 0 and 1.
SHARE = (-0.04, 1.04)
#: A label that the legend leaves out.
UNNAMED = "_"
#: In a dark place the figure turns dark: paper, ink, and the colours that would be hard to see on dark paper.
_DARK = {
    "#ffffff": "#15171a",
    "#000000": "#eae8e3",
    GREY: "#a29f98",
    BLUE: "#5aa6dc",
    VERMILLION: "#eb9a45",
    GREEN: "#3dbf97",
}
_ABSENT: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7.5, "color": GREY}


@dataclass(frozen=True)
class Series:
    """One kind of point in a panel. points: place -> estimate; without an interval the panel says "too few cases"."""

    label: str
    colour: str
    marker: str
    points: dict[str, Estimate]


@dataclass(frozen=True)
class Panel:
    """One plot: places from top to bottom, values to the right. limits: of the values; mark: where a line is drawn."""

    title: str
    unit: str
    series: Sequence[Series]
    limits: tuple[float, float] | None = None
    mark: float | None = None


@dataclass(frozen=True)
class Figure:
    """Panels over the same places; without one there were too few cases, and it is not drawn.

    name: of its files. caption: one sentence. same_scale: one scale for all panels.
    places: place -> its label, from top to bottom.
    """

    name: str
    caption: str
    places: Mapping[str, str]
    panels: Sequence[Panel]
    same_scale: bool = False


def draw(figure: Figure, directory: Path) -> list[Path]:
    """Write NAME.png and NAME.svg into a directory that exists; the same numbers give the same bytes."""
    if not figure.panels:
        return []
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
            _draw_panel(axes, panel, list(figure.places))
        for axes in every[count:]:
            axes.set_axis_off()
        every[0].set_yticks(range(len(figure.places)), list(figure.places.values()))
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
    svg = paths[1].read_text(encoding="utf-8")
    paths[1].write_text(svg.replace("</style>", _dark_style() + "</style>", 1), encoding="utf-8")
    return paths


def _dark_style() -> str:
    """Rules of an SVG's style sheet that change its colours where the reader prefers dark pages."""
    rules = ["svg{fill:" + _DARK["#000000"] + "}"]  # letters have no colour of their own
    rules += [
        f'[style*="{part}: {light.lower()}"]{{{part}:{dark} !important}}'
        for light, dark in _DARK.items()
        for part in ("fill", "stroke")
    ]
    return ":root{color-scheme:light dark}@media (prefers-color-scheme:dark){" + "".join(rules) + "}"


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
        # Rounding may put a point just outside its interval, and matplotlib refuses bars of negative length.
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
    for y, name in enumerate(places):
        found = [series.points[name] for series in panel.series if name in series.points]
        if not any(math.isfinite(estimate.low) for estimate in found):
            why = (
                "too few cases"
                if any(estimate.known or estimate.rows for estimate in found)
                else "not defined"
            )
            axes.text(0.5, y, why, transform=axes.get_yaxis_transform(), **_ABSENT)
    axes.set_title(panel.title, fontsize=9)
    axes.set_xlabel(panel.unit)
    axes.grid(axis="x", alpha=0.25)
    axes.tick_params(axis="y", length=0)
    if panel.limits:
        axes.set_xlim(*panel.limits)


def own(points: dict[str, Estimate], label: str = "explanation of the row") -> Series:
    """The measured points, in the same colour in every figure."""
    return Series(label, BLUE, "o", points)


def shuffled(points: dict[str, Estimate], label: str = "of another problem, same place") -> Series:
    """Their control, in the same colour in every figure."""
    return Series(label, VERMILLION, "s", points)
