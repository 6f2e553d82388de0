"""Low-rank changes of linear layers (LoRA, Hu et al. 2021) in training, and the files that PEFT has of them.

    y = W x + (alpha / r) B A x        A [r, in] random, B [out, r] zero at first; W is not trained

Loading such files is `models.adapters`' work.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn
from torch.nn import functional as F

from nla_engine.errors import CheckpointError
from nla_engine.models.adapters.form import ADAPTER_WEIGHTS
from nla_engine.models.checkpoint import ADAPTER

_PREFIX = "base_model.model."


class LoraLinear(nn.Module):
    """Called like the linear layer that it holds. down: A, up: B, float32, on the layer's device."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, seed: int) -> None:
        super().__init__()
        self.linear, self.scaling = linear, alpha / rank
        size = linear.in_features**-0.5
        draw = torch.Generator().manual_seed(seed)
        down = torch.rand((rank, linear.in_features), generator=draw).mul_(2 * size).sub_(size)
        device = linear.weight.device
        self.down = nn.Parameter(down.to(device))
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """states [..., in] -> [..., out]"""
        flat = x.flatten(0, -2)
        low = F.linear(flat, self.down.to(x.dtype)) * self.scaling
        out = self.linear(flat)
        out.addmm_(low.to(out.dtype), self.up.t().to(out.dtype))  # no pass over memory of its own
        return out.unflatten(0, x.shape[:-1])

    def merged(self) -> torch.Tensor:
        """W + (alpha / r) B A, float32: what `models.adapters.merge` makes of the files."""
        delta = (self.up.detach() @ self.down.detach()).mul_(self.scaling)
        return self.linear.weight.detach().float() + delta


def add_lora(
    model: nn.Module, blocks: Iterable[nn.Module], rank: int, alpha: float, seed: int
) -> dict[str, LoraLinear]:
    """Give every linear layer of these blocks a LoRA, in place. By the names that the layers have in the model.

    CheckpointError if there is none.
    """
    inside = {module for block in blocks for module in block.modules()}
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module in inside
    }
    if not found:
        raise CheckpointError(
            f"{type(model).__name__} has no linear layers in its blocks that a LoRA could change: pass --method full"
        )
    adapters = {}
    for number, (name, linear) in enumerate(found.items()):
        parent, _, last = name.rpartition(".")
        adapters[name] = LoraLinear(linear, rank, alpha, seed + number)
        setattr(model.get_submodule(parent), last, adapters[name])
    return adapters


def write_adapter(
    directory: Path, adapters: dict[str, LoraLinear], base: str, revision: str | None, dtype: torch.dtype
) -> None:
    """PEFT's two files. base, revision: the model that the adapter is loaded over."""
    first = next(iter(adapters.values()))
    rank = first.down.shape[0]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": rank,
        "lora_alpha": first.scaling * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in adapters}),
        "inference_mode": True,
    }
    tensors = {}
    for name, lora in adapters.items():
        for part, weight in (("lora_A", lora.down), ("lora_B", lora.up)):
            tensors[f"{_PREFIX}{name}.{part}.weight"] = weight.detach().to("cpu", dtype).contiguous()
    (directory / ADAPTER).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    (directory / ADAPTER_WEIGHTS).write_bytes(
        save(tensors, {"format": "pt"})
    )  # save_file lets only its owner read it
