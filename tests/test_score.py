"""Scores against their formulas in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nla_engine import score
from nla_engine.score import Controls, DirectionVariance


def test_scores_equal_their_formulas(rng) -> None:
    v = (rng.standard_normal((50, 33)) * rng.lognormal(0, 4, (50, 1))).astype(np.float32)
    r = (v + rng.standard_normal(v.shape) * 0.3 * np.abs(v).mean(1, keepdims=True)).astype(np.float32) * 7
    vu = v.astype(np.float64) / np.linalg.norm(v.astype(np.float64), axis=1, keepdims=True)
    ru = r.astype(np.float64) / np.linalg.norm(r.astype(np.float64), axis=1, keepdims=True)
    cos = score.cosine(torch.from_numpy(v), torch.from_numpy(r))
    assert np.allclose(cos, (vu * ru).sum(1), atol=1e-6)
    mse = score.mse_nrm(cos)
    assert np.allclose(mse, ((vu - ru) ** 2).sum(1), atol=2e-6)
    variance = DirectionVariance()
    variance.add(torch.from_numpy(v[:20]))
    variance.add(torch.from_numpy(v[20:]))
    expected = ((vu - vu.mean(0)) ** 2).sum(1).mean()
    assert variance.value == pytest.approx(expected, abs=1e-6) and variance.rows == 50
    mean = vu.mean(0)
    baseline = ((vu - mean / np.linalg.norm(mean)) ** 2).sum(1).mean()
    assert np.allclose(score.fve_nrm(mse, expected), 1 - mse / expected)
    assert np.allclose(score.fve_meannorm(mse, expected), 1 - mse / baseline)


def test_huge_tiny_zero_and_nonfinite_vectors() -> None:
    x = np.array([[3e38, 3e38], [1e-40, 0], [0, 0], [np.nan, 1], [np.inf, 1]], np.float32)
    x = torch.from_numpy(x)
    cos = score.cosine(x, torch.ones_like(x))
    assert cos[:2] == pytest.approx([1.0, math.sqrt(0.5)], abs=1e-5)
    assert np.isnan(cos[2:]).all()
    variance = DirectionVariance()
    assert math.isnan(variance.value)
    variance.add(x)
    assert variance.rows == 2


def test_one_direction_has_no_variance_to_explain() -> None:
    variance = DirectionVariance()
    variance.add(torch.ones(4, 8))
    assert variance.value == pytest.approx(0.0, abs=1e-6)
    assert (
        np.isnan(score.fve_nrm(np.zeros(2), 0.0)).all()
        and np.isnan(score.fve_meannorm(np.zeros(2), 0.0)).all()
    )


def test_controls(rng) -> None:
    vectors = torch.from_numpy(rng.standard_normal((40, 16)).astype(np.float32))
    rows, sequences = np.arange(40) * 3, np.arange(40) // 4
    controls = Controls.of(rows, sequences, vectors, seed=1)
    r = vectors + 0.05 * torch.from_numpy(rng.standard_normal(vectors.shape).astype(np.float32))
    cos = score.cosine(vectors, r)
    assert (controls.rank(rows, cos, r) == 1).all()
    closer = (score.unit(-r) @ score.unit(vectors).T).numpy() > score.cosine(vectors, -r)[:, None]
    brute = 1 + (closer & ~np.eye(40, dtype=bool)).sum(1)
    assert controls.rank(rows, score.cosine(vectors, -r), -r).tolist() == brute.tolist()
    shuffled = controls.shuffled(rows, sequences, r)
    assert np.abs(shuffled).mean() < 0.5 < cos.mean()
    for i in range(40):  # the partner is another sequence's row, and does not depend on the batch
        partner = controls._partner(int(rows[i]), int(sequences[i]))
        assert sequences[partner] != sequences[i]
        assert controls.shuffled(rows[i : i + 1], sequences[i : i + 1], r[i : i + 1])[0] == shuffled[i]


def test_controls_of_a_sample_with_nothing_else_in_it() -> None:
    vector = torch.ones(1, 4)
    alone = Controls.of(np.array([5]), np.array([0]), vector, seed=0)
    assert np.isnan(alone.shuffled(np.array([5]), np.array([0]), vector)).all()
    assert alone.rank(np.array([5]), np.array([1.0]), vector).tolist() == [1.0]
    empty = Controls.of(np.array([5]), np.array([0]), vector * torch.nan, seed=0)
    assert np.isnan(empty.shuffled(np.array([5]), np.array([0]), vector)).all()
