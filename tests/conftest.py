"""What every test shares: the GPU skip, quiet threads, a seed that a failure shows."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import LAYER, call, capture, roundtrip
from tiny import save_ar, save_av, save_model, write_prompts

torch.set_num_threads(1)  # tests are many small tensors; threads only get in each other's way


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch sees none")
    for item in items:
        if item.get_closest_marker("gpu"):  # keywords hold the names of directories too
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


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, av, ar, prompts.jsonl, run.zarr and explained.parquet, the last two made by the commands themselves."""
    root = tmp_path_factory.mktemp("commands")
    save_model(root / "base")
    save_av(root / "av", LAYER)
    save_ar(root / "ar", LAYER)
    write_prompts(root / "prompts.jsonl", 5)
    assert call(*capture(root, root / "run.zarr")).code == 0
    assert call(*roundtrip(root, root / "explained.parquet")).code == 0
    return root
