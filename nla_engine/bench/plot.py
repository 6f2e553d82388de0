"""Plots: throughput over batch size, with the hardware's limit; error over bytes; costs over size. Needs matplotlib."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nla_engine.bench.limits import Hardware, ModelSize, decode_step_seconds
from nla_engine.bench.report import Line, Machine
from nla_engine.codec.rows import CODEC_NAMES

_STEADY = re.compile(r"steady B=(\d+) context (\d+) (.+)")
#: What a store of suite scaling has more and more of. A case in a CSV file begins with the name of a model.
_AXES = ("rows", "layers", "rows per sequence")
_GROWTH = re.compile(rf"(?:[^:]+: )?(S3 )?(.+), ([\d,]+) ({'|'.join(_AXES)}|layer)")
#: Panels beside each other.
_COLUMNS = 4


def plot_batches(
    directory: Path, machine: Machine, lines: Sequence[Line], size: ModelSize, hardware: Hardware
) -> Path | None:
    """Draw the steady decode lines into `directory`/decode.png. None if there are none."""
    series: dict[str, list[tuple[int, float]]] = {}
    context = 0
    for line in lines:
        if match := _STEADY.fullmatch(line.case):
            context = int(match[2])
            series.setdefault(match[3], []).append((int(match[1]), line.p50))
    if not series:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    largest = max(batch for points in series.values() for batch, _ in points)
    batches = np.unique(np.geomspace(1, 2 * largest, 200).round().astype(int))
    roof = [batch / decode_step_seconds(size, hardware, int(batch), context) for batch in batches]
    axes.plot(batches, roof, color="black", linewidth=1, label="limit of the hardware")
    for name, points in series.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="sequences decoded at once",
        ylabel="tokens per second",
        title=f"Decode, context {context}: {machine.gpu}, commit {machine.commit}",
    )
    axes.grid(True, which="both", alpha=0.2)
    axes.legend()
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "decode.png"
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


def plot_rates(
    directory: Path,
    machine: Machine,
    d_model: int,
    source: str,
    points: Mapping[str, tuple[float, float, float]],
) -> Path:
    """Draw relative L2 error (mean to p99) over bytes per row into `directory`/codec.png.

    points: name -> (bytes per row, mean, p99). The store's codecs are drawn filled. A scheme without
        error is only named in the legend.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.8), layout="constrained")
    for number, (name, (size, mean, p99)) in enumerate(points.items()):
        ours = name in CODEC_NAMES
        colour = f"C{number}"
        if p99 == 0:
            axes.plot(
                [], [], marker="o", linestyle="", color=colour, label=f"{name}: exact, {size:,.0f} bytes"
            )
            continue
        axes.plot([size, size], [mean, p99], color=colour, linewidth=1)
        axes.plot(
            size,
            mean,
            marker="o" if ours else "s",
            linestyle="",
            color=colour,
            fillstyle="full" if ours else "none",
            label=name + (" (store)" if ours else ""),
        )
    axes.set(
        yscale="log",
        xlabel=f"bytes per row of {d_model} channels",
        ylabel="relative L2 error: mean, line to p99",
        title=f"{source}; commit {machine.commit}",
    )
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(fontsize=8)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "codec.png"
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


def plot_growth(directory: Path, lines: Sequence[Mapping[str, Any]]) -> Path | None:
    """Draw how costs grow, a panel for each operation, into `directory`/growth.png. None if none was measured.

    lines: those of suite scaling, as `Line.to_dict` or `read_csv` gives them; the last one of a case counts
    """
    panels: dict[str, dict[str, dict[int, float]]] = {}
    units: dict[str, str] = {}
    for line in lines:
        if line["suite"] == "scaling" and (match := _GROWTH.fullmatch(line["case"])):
            there, name, size, axis = match.groups()
            axis = "layers" if axis == "layer" else axis
            series = panels.setdefault(name, {}).setdefault(f"{axis}, on S3" if there else axis, {})
            series[int(size.replace(",", ""))] = line["p50"]
            units[name] = line["unit"]
    if not panels:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    height = -(-len(panels) // _COLUMNS)
    figure, axes = pyplot.subplots(
        height, _COLUMNS, figsize=(3.1 * _COLUMNS, 2.5 * height), layout="constrained", squeeze=False
    )
    kinds = (*_AXES, f"{_AXES[0]}, on S3")
    style: dict[str, dict[str, Any]] = {
        kind: {"color": f"C{n}", "marker": "o", "markersize": 3} for n, kind in enumerate(kinds)
    }
    for place, (name, drawn) in zip(axes.flat, panels.items(), strict=False):
        for kind, points in drawn.items():
            place.plot(*zip(*sorted(points.items()), strict=True), **style[kind])
        place.set(xscale="log", yscale="log", xlim=(0.7, 2e8), title=name, ylabel=units[name])
        values = [value for points in drawn.values() for value in points.values()]
        # Two decades at least, so that what is flat looks flat.
        middle, half = math.sqrt(min(values) * max(values)), max(math.sqrt(max(values) / min(values)), 10)
        place.set_ylim(middle / half / 1.5, middle * half * 1.5)
        place.grid(True, alpha=0.3)
    for place in axes.flat[len(panels) :]:
        place.set_axis_off()
    figure.legend(
        [pyplot.Line2D([], [], **style[kind]) for kind in kinds],
        [f"by {kind}" for kind in kinds],
        loc="outside lower center",
        ncols=len(kinds),
    )
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "growth.png"
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    return path
