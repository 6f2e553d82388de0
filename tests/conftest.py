"""What every test shares: the GPU skip, quiet threads, a seed that a failure shows."""

import os

import numpy as np
import pytest
import torch

torch.set_num_threads(1)  # tests are many small tensors; threads only get in each other's way


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch sees none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def seed() -> int:
    """A fresh seed each run; a failing test shows it. NLA_TEST_SEED repeats a run."""
    value = int(os.environ.get("NLA_TEST_SEED") or np.random.SeedSequence().entropy % 2**32)
    print(f"NLA_TEST_SEED={value}")
    return value


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)
