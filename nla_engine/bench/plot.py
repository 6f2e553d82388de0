"""Plots: throughput over batch size, with the hardware's limit; error over bytes. Needs matplotlib."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from nla_engine.bench.limits import Hardware, ModelSize, decode_step_seconds
from nla_engine.bench.report import Line, Machine
from nla_engine.codec.rows import CODEC_NAMES

_STEADY = re.compile(r"steady B=(\d+) context (\d+) (.+)")


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
