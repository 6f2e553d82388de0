"""The clip of an int4 group: what it costs beside searches that quantise a group in float64 at every candidate."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pytest
from encoded import raw_codes

from nla_engine.codec.rows import INT4_DIVISORS, INT4_TOP, Codec, decode_reference, hadamard_matrix

#: The candidates of an earlier version, of which it took the one of least squared error.
EARLIER = (1.0, 0.92, 0.84, 0.76, 0.68, 0.6)
OWN = tuple(INT4_DIVISORS[0] / divisor for divisor in INT4_DIVISORS)


def sampled(kind: str, rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    rows = {
        "normal": rng.normal(size=(n, d)),
        "uniform": rng.uniform(-1, 1, (n, d)),
        "heavy tails": rng.standard_t(3, (n, d)),
        "massive channels": rng.normal(size=(n, d)),
        "a mean": rng.normal(size=(n, d)) + 1.0,
        "sparse": rng.normal(size=(n, d)) * (rng.random((n, d)) < 0.1),
    }[kind]
    if kind == "massive channels":
        rows[:, rng.integers(0, d, 2)] *= 60.0
    rows[:, 0] += 1e-3  # no row is zero
    return rows.astype(np.float32)


def rotated(codec: Codec, rows: np.ndarray) -> np.ndarray:
    """y of codec/rows.py, float64 [groups, group]."""
    wide = rows.astype(np.float64)
    rms = np.linalg.norm(wide, axis=1) / math.sqrt(codec.d_model)
    blocks = (wide / rms[:, None]).reshape(-1, codec.block)
    return (blocks @ hadamard_matrix(codec.block)).reshape(-1, codec.group)


def searched(y: np.ndarray, clips: Iterable[float]) -> np.ndarray:
    """The least squared error of each group over all `clips`."""
    errors = []
    for clip in clips:
        scale = (clip * np.abs(y).max(axis=1, keepdims=True) / INT4_TOP).astype(np.float16).astype(np.float64)
        code = np.clip(
            np.rint(np.divide(y, scale, out=np.zeros_like(y), where=scale > 0)), -INT4_TOP, INT4_TOP
        )
        errors.append(((y - code * scale) ** 2).sum(axis=1))
    return np.min(errors, axis=0)


@pytest.mark.parametrize("d", [3584, 576, 48, 24, 12, 6])
@pytest.mark.parametrize("kind", ["normal", "uniform", "heavy tails", "massive channels", "a mean", "sparse"])
def test_no_search_gives_a_lower_mean_error(rng: np.random.Generator, d: int, kind: str) -> None:
    """Neither over the earlier candidates nor over its own: the mean relative error is within 0.1%."""
    codec = Codec.named("int4", d)
    rows = sampled(kind, rng, 400_000 // d, d)
    size = np.linalg.norm(rows.astype(np.float64), axis=1)
    mean = (np.linalg.norm(decode_reference(codec, codec.encode(rows)) - rows, axis=1) / size).mean()
    y = rotated(codec, rows)
    for clips in (EARLIER, OWN):
        limit = np.sqrt(searched(y, clips).reshape(len(rows), -1).sum(axis=1) / d).mean()
        assert mean <= 1.001 * limit, clips


def test_distances_are_from_the_nearest_code() -> None:
    """Every fine code that a group can have: `distance` is y / scale less the nearest whole number, to 1 / 512."""
    fine = np.arange(-989, 990)
    for divisor in INT4_DIVISORS:
        steps = fine * divisor / 4096  # y / scale
        distance = ((16 * divisor * fine + 128) >> 8).astype(np.int8) / 256
        apart = steps - distance
        assert np.abs(apart - np.rint(apart)).max() <= 1 / 512
        assert np.abs(np.rint(steps)).max() == INT4_TOP


def test_codes_reach_the_top_and_need_no_clamp(rng: np.random.Generator) -> None:
    codec = Codec.named("int4", 3584)
    rows = rng.normal(size=(300, 3584)).astype(np.float32)
    encoded = codec.encode(rows)
    y, scale = rotated(codec, rows), encoded.scales.reshape(-1, 1).astype(np.float64)
    codes = raw_codes(codec, encoded.codes).reshape(y.shape)
    assert (np.abs(codes).max(axis=1) == INT4_TOP).all()
    assert (np.abs(y).max(axis=1) < 7.5 * scale[:, 0]).all()
    assert (np.abs(codes - y / scale) < 0.5 + 1e-4).all()
    clips = np.unique(np.round(7 * scale[:, 0] / np.abs(y).max(axis=1), 2))
    assert set(clips) == {round(clip, 2) for clip in OWN}
