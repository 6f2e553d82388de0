"""CUDA graphs played on a CPU: the same work, launched anew each time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nla_engine.engine import generator, pass_graphs
from nla_engine.engine.runner import Runner


class Stepped:
    """Stands for a graph of decode steps: the same steps, on the spare slot too."""

    def __init__(self, step: Any, size: int, spare: int, device: torch.device, pool: Any) -> None:
        self.step, self.size, self.spare = step, size, spare

    def run(self, slots: list[int], steps: int) -> None:
        for _ in range(steps):
            self.step(torch.tensor(slots + [self.spare] * (self.size - len(slots))))


class Called:
    """Stands for a graph: the same work, tried twice before it has anything to do. used: how often it was replayed."""

    used = 0

    def __init__(self, work: Any, device: torch.device, pool: Any) -> None:
        self._work = work
        work()
        work()

    def replay(self) -> None:
        Called.used += 1
        self._work()


def play_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several steps between two looks, and padded prompt passes, once the model has been checked."""
    monkeypatch.setattr(Runner, "graphable", property(lambda runner: runner._tapped and not runner.reference))
    monkeypatch.setattr(generator, "DecodeGraph", Stepped)
    monkeypatch.setattr(pass_graphs, "Graph", Called)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(Called, "used", 0)
