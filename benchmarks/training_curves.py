"""Draws the course of a training: `python benchmarks/training_curves.py LOG.jsonl OUT.png`. Needs matplotlib.

LOG is the log.jsonl that `nla-engine train` writes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

#: Key of a measure -> its name in the picture, and its colour.
MEASURES = {
    "fve_given": ("texts by rule, read by the AR", "#c46a1b"),
    "fve_nrm": ("the AV's greedy texts", "#0b5d7a"),
}


def main(log: Path, out: Path) -> None:
    """FVE on held-out documents over the minutes of training, with the phases."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for key, (name, colour) in MEASURES.items():
        points = [
            (each["seconds"] / 60, each["measured"][key]) for each in lines if key in each.get("measured", {})
        ]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, color=colour, label=name)
    begun: dict[str, float] = {}
    for each in lines:
        begun.setdefault(each["phase"], each["seconds"] / 60)
    for number, (phase, minute) in enumerate(begun.items()):
        if number:
            axes.axvline(minute, color="black", linewidth=0.6, alpha=0.4)
        axes.annotate(phase, (minute if number else 0, 0.02), xytext=(4, 2), textcoords="offset points")
    axes.set(xlabel="minutes of training", ylabel="FVE on held-out documents", ylim=(0, 0.8), xlim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(out, dpi=150)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
