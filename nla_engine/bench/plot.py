"""Throughput over batch size, measured, under the line that the hardware allows. Needs matplotlib."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nla_engine.bench.limits import Hardware, ModelSize, decode_step_seconds
from nla_engine.bench.report import Line, Machine

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
        ylabel="tokens a second",
        title=f"Decode, context {context}: {machine.gpu}, commit {machine.commit}",
    )
    axes.grid(True, which="both", alpha=0.2)
    axes.legend()
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "decode.png"
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path
