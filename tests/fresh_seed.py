"""Fixtures: random numbers from a seed that is another one in each run, and that a failure shows."""

from __future__ import annotations

import os

import numpy as np
import pytest


@pytest.fixture
def seed() -> int:
    """A fresh seed each run; a failing test shows it. NLA_TEST_SEED repeats a run."""
    value = int(os.environ.get("NLA_TEST_SEED") or np.random.SeedSequence().entropy % 2**32)
    print(f"NLA_TEST_SEED={value}")
    return value


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)
