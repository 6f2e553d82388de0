"""Whether a CUDA graph can hold the experts of a model.

transformers computes them by torch's grouped product. On Hopper and on the Blackwell of data centres, in bfloat16, that
is one kernel, which reads on the device where each expert's tokens begin. Otherwise it is a loop over the experts whose
bounds are read on the host, and a graph cannot be captured.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nla_engine.ops.cards import card_of

#: Compute capabilities (major) on which torch has a kernel for grouped products.
_GROUPED = (9, 10)


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
    if not hasattr(module, "is_transposed") or not hasattr(module, "has_gate"):
        return False  # no experts, or some that transformers computes in one way only
    how = module.config._experts_implementation
    if how != "grouped_mm":
        return bool(how != "batched_mm")
    weight = next(module.parameters())
    kernel = weight.dtype == torch.bfloat16 and card_of(weight.device).capability[0] in _GROUPED
    return not kernel
