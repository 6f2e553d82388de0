"""Models in training for tests: with LoRAs that change something, and merged by hand."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch

from nla_engine.models.load import LanguageModel, load_model
from nla_engine.train.pair import Trained

_T = TypeVar("_T", bound=Trained)


def shaken(model: _T, seed: int) -> _T:
    """The model, with random numbers added to its LoRA's zeros and to its head."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.parameters.items():
            if name.endswith(".up") or name == "value_head":
                change = torch.randn(weight.shape, generator=draw) * 0.3 / weight.shape[-1] ** 0.5
                weight.add_(change.to(weight.device))
    return model


def merged_by_hand(model: Trained, plain: torch.nn.Module) -> torch.nn.Module:
    """A plain model of transformers with W + 2 B A in every adapted layer (alpha is twice the rank)."""
    weights = dict(plain.named_parameters())
    with torch.no_grad():
        for name, lora in model.adapters.items():
            weights[f"{name}.weight"] += 2.0 * lora.up @ lora.down
    return plain.eval()


def base_of(made: Path, **more: object) -> LanguageModel:
    """The base in float32."""
    return load_model(str(made / "base"), device=torch.device("cpu"), dtype=torch.float32, **more)
