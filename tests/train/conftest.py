"""A small model's store with next tokens, and a pair that is being trained on it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commands import LAYER, call, capture
from tiny import save_model, write_prompts
from train_models import shaken

from nla_engine.models.load import LanguageModel, load_model
from nla_engine.train.output import write_sidecars
from nla_engine.train.pair import TrainedAR, TrainedAV


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, prompts.jsonl and rows.zarr."""
    root = tmp_path_factory.mktemp("train")
    save_model(root / "base")
    write_prompts(root / "prompts.jsonl", 16)
    ran = call(*capture(root, root / "rows.zarr", max_new_tokens=6, next_token=3))
    assert ran.code == 0, ran.err
    return root


def base_of(made: Path, **more: object) -> LanguageModel:
    """The base in float32."""
    return load_model(str(made / "base"), device=torch.device("cpu"), dtype=torch.float32, **more)


@pytest.fixture
def av(made: Path, tmp_path: Path) -> TrainedAV:
    """An AV with a LoRA that changes something already."""
    lm = base_of(made)
    write_sidecars(tmp_path / "sidecars", lm.tokenizer, lm.d_model, LAYER, "12", 0)
    trained = TrainedAV(lm, tmp_path / "sidecars" / "av", 4, 1)
    return shaken(trained, 2)


@pytest.fixture
def ar(made: Path, av: TrainedAV, tmp_path: Path) -> TrainedAR:
    """An AR of the same kind."""
    lm = base_of(made, headless=True, blocks=LAYER + 1)
    return shaken(TrainedAR(lm, tmp_path / "sidecars" / "ar", 4, 3), 4)
