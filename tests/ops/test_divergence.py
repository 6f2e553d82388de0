"""The divergence of distributions against numpy in float64: the reference in torch, and the Triton kernel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from interpreted import DEVICE, LAUNCHES, run_in_the_interpreter, starts_the_interpreter

from nla_engine.ops import divergence as op

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
RUNS = [
    op.divergence_reference,
    pytest.param(op.divergence_triton, marks=LAUNCHES),
]


def truth(x: np.ndarray, y: np.ndarray, row: np.ndarray, token: np.ndarray) -> tuple[np.ndarray, ...]:
    """kl, same and change in float64."""
    before, after = (
        v - v.max(1, keepdims=True) - np.log(np.exp(v - v.max(1, keepdims=True)).sum(1, keepdims=True))
        for v in (x, y)
    )
    before = before[row]
    chance = np.exp(before)
    with np.errstate(invalid="ignore"):
        kl = np.where(chance > 0, chance * (before - after), 0).sum(1)
    at = np.arange(len(y))
    change = np.where(token < 0, np.nan, after[at, token] - before[at, token])
    return kl, x.argmax(1)[row] == y.argmax(1), change


@pytest.mark.parametrize("run", RUNS, ids=["reference", "kernel"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 5, 2048, 40_003])
def test_against_float64(run, dtype: torch.dtype, vocabulary: int, rng: np.random.Generator) -> None:
    rows, lanes = 4, 9
    x = torch.from_numpy(rng.normal(0, 3, (rows, vocabulary))).to(DEVICE, dtype)
    row = np.sort(rng.integers(0, rows, lanes))
    y = x[torch.from_numpy(row).to(DEVICE)].clone()
    moved = torch.from_numpy(rng.normal(0, 1, (lanes - 2, vocabulary))).to(DEVICE, dtype)
    y[2:] += moved  # the first two are equal to their own
    token = rng.integers(0, vocabulary, lanes)
    token[rng.integers(0, lanes)] = -1
    found = run(x, y, torch.from_numpy(row).to(DEVICE), torch.from_numpy(token).to(DEVICE))
    kl, same, change = truth(x.double().cpu().numpy(), y.double().cpu().numpy(), row, token)
    np.testing.assert_allclose(found.kl.cpu(), kl, rtol=1e-4, atol=2e-6)
    np.testing.assert_allclose(found.change.cpu(), change, rtol=1e-4, atol=1e-5)
    assert found.same.cpu().tolist() == same.astype(float).tolist()
    assert float(found.kl.min()) >= 0 and float(found.kl[:2].max()) < 1e-6


@pytest.mark.parametrize("run", RUNS, ids=["reference", "kernel"])
def test_logits_at_the_edges(run, rng: np.random.Generator) -> None:
    """Tokens that are cut off, far logits, equal maxima, and rows that are no numbers."""
    x = torch.from_numpy(rng.normal(0, 2, (5, 3000)).astype(np.float32)).to(DEVICE)
    y = x + torch.from_numpy(rng.normal(0, 1, (5, 3000)).astype(np.float32)).to(DEVICE)
    x[0, 7], y[0, 7] = -torch.inf, -torch.inf
    x[1, 2999] = y[1, 2999] = 1e4  # all others have a probability of 0
    x[2, :] = y[2, :] = 3.0
    x[3, 5] = torch.nan
    y[4, int(x[4].argmax())] = -torch.inf
    row = torch.arange(5, device=DEVICE)
    found = run(x, y, row, torch.full((5,), 11, device=DEVICE))
    kl = found.kl.cpu().tolist()
    wanted = truth(
        x.double().cpu().numpy()[:1], y.double().cpu().numpy()[:1], np.zeros(1, int), np.array([11])
    )
    assert kl[0] == pytest.approx(wanted[0][0], rel=1e-4)
    assert kl[1] == 0.0 and kl[2] == pytest.approx(0.0, abs=1e-6) and np.isnan(kl[3]) and kl[4] == np.inf
    assert found.same.cpu().tolist()[1:3] == [1.0, 1.0]


@pytest.mark.parametrize("run", RUNS, ids=["reference", "kernel"])
def test_the_first_of_equal_maxima_and_rows_that_differ_by_a_constant(run, rng: np.random.Generator) -> None:
    """Wherever in a row the maxima are, within what a program reads at once or not; and logits far from 0."""
    vocabulary, lanes = 40_003, 12
    x = torch.from_numpy(rng.normal(0, 1, (1, vocabulary)).astype(np.float32)).to(DEVICE)
    first, second, other = np.sort(rng.choice(vocabulary, 3, replace=False))
    x[0, [first, other]] = 9.0
    y = x + torch.linspace(-300, 300, lanes, device=DEVICE)[:, None]
    y[::2, second] = y[::2, first]  # no change of the first maximum
    y[1::3, first] -= 1.0
    found = run(x, y, *torch.zeros((2, lanes), dtype=torch.int64, device=DEVICE))
    kl, same, _ = truth(
        x.double().cpu().numpy(), y.double().cpu().numpy(), np.zeros(lanes, int), np.zeros(lanes, int)
    )
    np.testing.assert_allclose(found.kl.cpu(), kl, rtol=1e-3, atol=1e-4)  # at 300, float32 ends at 3e-5
    assert found.same.cpu().tolist() == same.astype(float).tolist()
    assert found.same.cpu().tolist() == [float(lane % 3 != 1) for lane in range(lanes)]


@starts_the_interpreter
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__)
