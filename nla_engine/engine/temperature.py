"""Queries that are scaled by their position, where transformers counts positions in a way that packed passes break.

    q = q (1 + a log(1 + floor((p + 1) / s)))    in the layers of Llama-4 without rotation, if its configuration says so

Its modules number the tokens of a call, so they leave the scale to the engine while it holds them. Nakanishi,
arXiv:2501.19399.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

#: Classes of attention whose scale is known.
_KNOWN = ("Llama4TextAttention",)


def scales(blocks: nn.ModuleList) -> bool:
    """Whether an attention of these blocks scales its queries so."""
    return any(_scales(module) for module in blocks.modules())


def untemper(blocks: nn.ModuleList) -> list[Any]:
    """The attentions of these blocks that scale their queries. From now on they do not."""
    found: list[Any] = [module for module in blocks.modules() if _scales(module)]
    for module in found:
        module.attn_temperature_tuning = False
    return found


def temper(modules: Iterable[Any]) -> None:
    """Undo `untemper`, given what it returned."""
    for module in modules:
        module.attn_temperature_tuning = module.config.attn_temperature_tuning


def tempered(module: Any, query: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """The queries [1, H, T, h] of an attention that `untemper` has found, scaled; of another, as they are. position:
    int64 [T]."""
    if not _scales(module):
        return query
    scale = 1 + module.attn_scale * torch.log1p(torch.floor((position.float() + 1) / module.floor_scale))
    return (query * scale[:, None]).to(query.dtype)


def _scales(module: Any) -> bool:
    """Whether a module is an attention that scales its queries, itself or by the engine."""
    if type(module).__name__ not in _KNOWN or module.use_rope:
        return False
    return bool(module.config.attn_temperature_tuning)
