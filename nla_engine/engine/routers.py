"""The forward of routers, the modules that choose a token's experts: their product, and one launch for what follows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from nla_engine.engine.families import parts_of
from nla_engine.ops.routing import Routing, route


def _softmax(module: Any) -> Routing:
    """As in Qwen's mixtures, some of which always renorm."""
    return Routing(module.top_k, bool(getattr(module, "norm_topk_prob", True)))


def _mixtral(module: Any) -> Routing:
    return Routing(module.top_k, renormed=True, dtype=torch.float32)


def _deepseek(module: Any) -> Routing | None:
    if module.topk_method != "greedy":
        return None
    return Routing(module.top_k, renormed=False, scale=float(module.routed_scaling_factor))


#: By class name: how such a module routes; None: not in a known way.
_KNOWN: dict[str, Callable[[Any], Routing | None]] = {
    **dict.fromkeys(
        (
            "GptOssTopKRouter",
            "Qwen2MoeTopKRouter",
            "Qwen3MoeTopKRouter",
            "Qwen3NextTopKRouter",
            "Qwen3_5MoeTopKRouter",
            "OlmoeTopKRouter",
        ),
        _softmax,
    ),
    "MixtralTopKRouter": _mixtral,
    "DeepseekV2TopkRouter": _deepseek,
}
#: Those whose product is in float32.
_WIDE = ("DeepseekV2TopkRouter",)


class EngineRouter:
    """Called like the module it replaces: states [..., d] -> logits [T, E], weights [T, k], chosen experts [T, k]."""

    def __init__(self, module: Any, how: Routing) -> None:
        self.module, self.how = module, how
        self.wide = type(module).__name__ in _WIDE

    def __call__(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        states = hidden_states.reshape(-1, hidden_states.shape[-1])
        weight, bias = self.module.weight, getattr(self.module, "bias", None)
        if self.wide:
            states, weight = states.float(), weight.float()
        logits = nn.functional.linear(states, weight, bias)
        return logits, *route(logits, self.how)


def known_routers(blocks: nn.ModuleList) -> list[tuple[Any, Routing]]:
    """The modules in some blocks that `EngineRouter` computes, each with how it routes."""
    found = ((module, _routing(module)) for module in blocks.modules())
    return [(module, how) for module, how in found if how is not None]


def _routing(module: Any) -> Routing | None:
    read = _KNOWN.get(type(module).__name__)
    return read(module) if read and parts_of(module) - {"bias"} == {"weight"} else None
