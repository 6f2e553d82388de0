"""The rate of a phase in one call: over its steps, and where its seconds end it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from nla_engine.train.fit import Fitter, fit


def rates(monkeypatch: pytest.MonkeyPatch, steps: int, seconds: float, step_seconds: float) -> list[float]:
    """The rate of each step, as part of the peak, with a clock on which each step takes so long."""
    now, seen = 0.0, list[float]()
    step = Fitter.step

    def loss() -> torch.Tensor:
        nonlocal now
        now += step_seconds
        return weight.square().sum()

    def seeing(self: Fitter, *given: float) -> float:
        seen.append(step(self, *given))  # type: ignore[arg-type]
        return seen[-1]

    monkeypatch.setattr("nla_engine.train.fit.time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(Fitter, "step", seeing)
    weight = nn.Parameter(torch.ones(3))
    told = fit("phase", [weight], loss, steps, seconds, 0.5, torch.device("cpu"))
    assert told["steps"] == len(seen)
    return [rate / 0.5 for rate in seen]


@pytest.mark.parametrize(("steps", "warmup"), [(2, 1), (57, 2), (1234, 61), (6100, 300)])
def test_a_phase_that_its_steps_end(monkeypatch: pytest.MonkeyPatch, steps: int, warmup: int) -> None:
    at = np.arange(steps)
    expected = np.minimum(1, (at + 1) / warmup) * (1 - at / steps)
    np.testing.assert_array_equal(rates(monkeypatch, steps, 1e9, 0.01), expected)


@pytest.mark.parametrize("done", [40, 200])
def test_a_phase_that_its_seconds_end_reaches_its_peak(monkeypatch: pytest.MonkeyPatch, done: int) -> None:
    """The seconds are for so many steps of a hundred thousand; the first one does not count."""
    found = rates(monkeypatch, 100_000, done * 0.5, 0.5)
    assert len(found) == done + 1
    assert found[0] < 0.01 and max(found) > 0.9 and int(np.argmax(found)) <= done // 10
    assert found[-1] < 2 / done, "and falls to zero"
