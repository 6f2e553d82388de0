"""The phases of a training, and how they share its time."""

from __future__ import annotations

from collections.abc import Mapping

#: In their order, with the part of the budget of each. Those without steps leave theirs to the others.
PHASES = {"ar": 0.25, "av": 0.35, "rl": 0.4}


def ends_at(phase: str, steps: Mapping[str, int]) -> float:
    """The part of the budget by which a phase ends, 0 to 1. steps: of each phase; this one has some"""
    parts = {name: part for name, part in PHASES.items() if steps[name]}
    names = list(parts)
    return sum(parts[name] for name in names[: names.index(phase) + 1]) / sum(parts.values())
