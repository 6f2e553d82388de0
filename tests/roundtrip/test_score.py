"""Scores against their formulas in float64."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from nla_engine.roundtrip import score
from nla_engine.roundtrip.score import Controls, DirectionVariance


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
    positions, sequences = np.arange(40) * 3, np.arange(40) // 4
    controls = Controls.of(sequences, positions, vectors, seed=1)
    r = vectors + 0.05 * torch.from_numpy(rng.standard_normal(vectors.shape).astype(np.float32))
    cos = score.cosine(vectors, r)
    assert (controls.rank(vectors, r) == 1).all()
    closer = (score.unit(-r) @ score.unit(vectors).T).numpy() > score.cosine(vectors, -r)[:, None]
    brute = 1 + (closer & ~np.eye(40, dtype=bool)).sum(1)
    assert controls.rank(vectors, -r).tolist() == brute.tolist()
    shuffled = controls.shuffled(sequences, positions, r)
    assert np.abs(shuffled).mean() < 0.5 < cos.mean()
    for i in range(40):  # the partner is another sequence's row, and does not depend on the batch
        partner = controls._partner(int(sequences[i]), int(positions[i]))
        assert sequences[partner] != sequences[i]
        assert controls.shuffled(sequences[i : i + 1], positions[i : i + 1], r[i : i + 1])[0] == shuffled[i]


def test_controls_of_a_sample_with_nothing_else_in_it() -> None:
    vector = torch.ones(1, 4)
    alone = Controls.of(np.array([5]), np.array([0]), vector, seed=0)
    assert np.isnan(alone.shuffled(np.array([5]), np.array([0]), vector)).all()
    assert np.isnan(alone.rank(vector, vector)).all()  # there was nothing else to find
    assert alone.rank(-vector, vector).tolist() == [2.0]
    empty = Controls.of(np.array([5]), np.array([0]), vector * torch.nan, seed=0)
    assert np.isnan(empty.shuffled(np.array([5]), np.array([0]), vector)).all()
    assert np.isnan(empty.rank(vector, vector)).all()


def dot(a: np.ndarray, b: np.ndarray) -> int:
    return sum(int(x) * int(y) for x, y in zip(a, b, strict=True))


def coincide(a: np.ndarray, b: np.ndarray) -> bool:
    """|a/|a| - b/|b||^2 <= COINCIDENCE^2, in whole numbers and fractions."""
    least = 1 - Fraction(score.COINCIDENCE).limit_denominator(1000) ** 2 / 2
    return dot(a, b) >= 0 and dot(a, b) ** 2 >= least**2 * dot(a, a) * dot(b, b)


def exact_ranks(sample: np.ndarray, vectors: np.ndarray, read: np.ndarray) -> list[float]:
    """The rule of docs/roundtrip.md on whole numbers, without rounding."""
    distinct: list[np.ndarray] = []
    for row in sample:
        if not any(coincide(row, other) for other in distinct):
            distinct.append(row)
    out = []
    for v, r in zip(vectors, read, strict=True):
        rivals = [other for other in distinct if not coincide(v, other)]
        ahead = 0
        for other in rivals:  # r.other / |other| >= r.v / |v|: by sign, then by squares
            theirs, mine = dot(r, other), dot(r, v)
            left, right = theirs * abs(theirs) * dot(v, v), mine * abs(mine) * dot(other, other)
            ahead += left >= right
        out.append(1.0 + ahead if rivals else math.nan)
    return out


@pytest.mark.parametrize("width", [4, 96])
def test_ranks_with_ties_equal_exact_arithmetic(width: int, rng) -> None:
    """Planted: one vector many times, also scaled; almost the same; mirrored; with channels swapped; orthogonal."""
    base = rng.integers(-9, 10, (12, width))
    base[:, 0] = rng.integers(1, 9, 12)
    swapped = base[:3, ::-1]
    flipped = base[:4] * rng.choice([-1, 1], (4, width))
    hair = base[:4] * 1000
    hair[np.arange(4), rng.integers(1, width, 4)] += 1
    far = base[4:8].copy()
    far[:, 1:] = 0
    parts = [base, base, base[:6] * 3, np.repeat(base[:1], 20, 0), swapped, flipped, -base[:4], hair, far]
    vectors = np.concatenate(parts)
    vectors = vectors[rng.permutation(len(vectors))]
    read = np.concatenate([vectors[:40], np.ones((20, width), int)])
    read = np.concatenate([read, rng.integers(-2, 3, (len(vectors) - len(read), width))])
    read[read.any(1) == 0] = 1
    sample = np.arange(len(vectors))[::2]
    given = [torch.from_numpy(x.astype(np.float32)) for x in (vectors[sample], vectors, read)]
    controls = Controls.of(sample, sample, given[0], seed=0)
    wanted = exact_ranks(vectors[sample], vectors, read)
    assert controls.rank(given[1], given[2]).tolist() == pytest.approx(wanted, abs=0, nan_ok=True)
    some = rng.permutation(len(vectors))[:7]  # ranks do not depend on the batch
    assert controls.rank(given[1][some], given[2][some]).tolist() == [wanted[i] for i in some]


def test_rows_of_one_vector_rank_alike(rng) -> None:
    """64 rows of one vector and 64 others: comparing float32 with float64 once ranked the former 1 or 64."""
    one = torch.from_numpy(rng.standard_normal((1, 256)).astype(np.float32))
    others = torch.from_numpy(rng.standard_normal((64, 256)).astype(np.float32))
    vectors, rows = torch.cat([one.expand(64, 256), others]), np.arange(128)
    controls = Controls.of(rows, rows, vectors, seed=0)
    assert len(controls.distinct) == 65
    noise = torch.from_numpy(rng.standard_normal((128, 256)).astype(np.float32))
    assert (controls.rank(vectors, vectors + 0.3 * noise) == 1).all()
    blind = noise[:1].expand(128, 256)  # every row has the same reconstruction
    ranks = controls.rank(vectors, blind)
    assert len(set(ranks[:64])) == 1
    assert sorted(set(ranks)) == list(range(1, 66))
    same = Controls.of(rows[:64], rows[:64], vectors[:64], seed=0)
    assert len(same.distinct) == 1
    assert np.isnan(same.rank(vectors[:64], vectors[:64])).all()


def test_vectors_that_bfloat16_blurs_are_one(rng) -> None:
    one = torch.from_numpy(rng.standard_normal((1, 512)).astype(np.float32))
    blur = torch.from_numpy(rng.standard_normal((16, 512)).astype(np.float32))
    near, clear = one + 0.01 * blur, one + 0.05 * blur
    assert len(Controls.of(np.arange(16), np.arange(16), near, seed=0).distinct) == 1
    assert len(Controls.of(np.arange(16), np.arange(16), clear, seed=0).distinct) == 16
