"""Parts of blocks whose arithmetic is known, in blocks that are not: their norms, routers and experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from nla_engine.engine.experts import EngineExperts, taken_experts
from nla_engine.engine.families import lone_norms
from nla_engine.engine.fused import FusedNorm
from nla_engine.engine.routers import EngineRouter, known_routers


def lone_parts(blocks: nn.ModuleList) -> dict[Any, Callable[..., Any]]:
    """What may take the place of the forward of modules in some blocks, by module."""
    parts: dict[Any, Callable[..., Any]] = {module: FusedNorm(module) for module in lone_norms(blocks)}
    parts |= {module: EngineRouter(module, how) for module, how in known_routers(blocks)}
    return parts | {module: EngineExperts(module, gate) for module, gate in taken_experts(blocks)}
