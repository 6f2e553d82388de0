"""Experts in few launches: their order, two products with gate and biases, and the weighted sum of each token's.

Replaces the forward of the module that holds the experts of a block, where transformers computes it in its common way
and the gate is known. Other experts run in transformers' way, by torch's grouped product. On Hopper and on the
Blackwell of data centres, in bfloat16, that is one kernel, which reads on the device where each expert's tokens begin.
Otherwise, and where a model has experts of a kind of its own, it is a loop over the experts whose bounds are read on
the host, and a CUDA graph cannot be captured.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations import moe

from nla_engine.ops.backends import has_triton
from nla_engine.ops.cards import card_of
from nla_engine.ops.expert_order import order_by_expert, weighted_sum
from nla_engine.ops.expert_products import ExpertGate, expert_product, height_for
from nla_engine.ops.gate import ACTIVATIONS

#: Compute capabilities (major) on which torch has a kernel for grouped products.
_GROUPED = (9, 10)
#: What the kernel multiplies: two bytes a number.
_DTYPES = (torch.bfloat16, torch.float16)
#: Classes whose gate is gpt-oss's: clamped, with gate and up as neighbours.
_CLAMPED = ("GptOssExperts",)
#: Experts of a kind of their own that read nothing on the host: all of them multiply every token.
_DENSE = ("Llama4TextExperts",)


class EngineExperts:
    """Called like the experts it replaces: states [T, d], chosen experts and their weights [T, k] -> [T, d]."""

    def __init__(self, module: Any, gate: ExpertGate) -> None:
        self.module, self.gate = module, gate

    def __call__(self, states: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        experts = self.module
        up, down = experts.gate_up_proj, experts.down_proj
        if not experts.is_transposed:
            up, down = up.transpose(1, 2), down.transpose(1, 2)
        up_bias, down_bias = (
            (experts.gate_up_proj_bias, experts.down_proj_bias) if experts.has_bias else (None, None)
        )
        order = order_by_expert(chosen.contiguous(), len(up), height_for(chosen.numel(), len(up)))
        inner = expert_product(states.contiguous(), up, up_bias, order, self.gate)
        rows = expert_product(inner, down, down_bias, order)
        return weighted_sum(rows, order.place, weights.contiguous())


def taken_experts(blocks: nn.ModuleList) -> list[tuple[Any, ExpertGate]]:
    """The modules in some blocks that `EngineExperts` computes where Triton runs, each with its gate."""
    found = ((module, _gate_of(module)) for module in blocks.modules())
    return [(module, gate) for module, gate in found if gate is not None]


def host_experts(blocks: nn.ModuleList) -> bool:
    """Whether some experts of these blocks, on a GPU, read on the host how many tokens each has."""
    return any(_reads_on_host(module) for module in blocks.modules())


def why_no_graph(blocks: nn.ModuleList) -> str:
    """Why a decode step of a model with these experts is not captured; empty if they are not why."""
    if _device_type(blocks) != "cuda" or not host_experts(blocks):
        return ""
    return "its experts run in a loop here, so decode steps are no CUDA graph: slower"


def _device_type(blocks: nn.ModuleList) -> str:
    return next(blocks.parameters()).device.type


def _reads_on_host(module: Any) -> bool:
    if not _common(module):
        name = type(module).__name__
        return name.endswith("Experts") and name not in _DENSE
    how = module.config._experts_implementation
    if how != "grouped_mm":
        return bool(how != "batched_mm")
    weight = next(module.parameters())
    if has_triton(weight.device) and _gate_of(module) is not None:
        return False
    kernel = weight.dtype == torch.bfloat16 and card_of(weight.device).capability[0] in _GROUPED
    return not kernel


def _common(module: Any) -> bool:
    """Whether transformers computes these experts in any of its common ways."""
    return hasattr(module, "is_transposed") and hasattr(module, "has_gate")


def _gate_of(module: Any) -> ExpertGate | None:
    """The gate of experts that `EngineExperts` computes; None for other modules.

    Those have a gate beside what it multiplies, in one weight of two bytes per number, and nothing that transformers'
    common way adds: norms, or experts on other devices.
    """
    if not _common(module) or module.config._experts_implementation != "grouped_mm":
        return None
    names = {"gate_up_proj", "down_proj"}
    if module.has_bias:
        names |= {"gate_up_proj_bias", "down_proj_bias"}
    tensors = dict(module.named_parameters(recurse=False))
    if (
        not module.has_gate
        or getattr(module, "has_post_expert_norm", False)
        or getattr(module, "_is_expert_parallel", False)
        or tensors.keys() != names
        or any(each.dtype not in _DTYPES or not each.is_contiguous() for each in tensors.values())
    ):
        return None
    if type(module).__name__ in _CLAMPED and not module.is_concatenated:
        return ExpertGate("clamped", float(module.alpha), float(module.limit))
    if type(module)._apply_gate is not moe._default_apply_gate or not module.is_concatenated:
        return None
    return _known(getattr(module, "act_fn", None))


def _known(activation: Any) -> ExpertGate | None:
    """The gate of this activation, a module or a function of torch; None if it is not known."""
    if activation is torch.nn.functional.silu:
        return ExpertGate("silu")
    kinds = (kind for name, kind in ACTIVATIONS.items() if type(activation) is type(ACT2FN[name]))
    return next(map(ExpertGate, kinds), None)
