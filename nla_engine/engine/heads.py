"""The forward of attention with rotated heads in blocks that are not fused, as those with experts: one product for
queries, keys and values, and one launch from there to rotated queries and to the cache.

How such a module attends is not read from it: it is what it asked for itself, when the runner's check called it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nla_engine.engine.attention import current_pass
from nla_engine.engine.families import norm_facts, parts_of
from nla_engine.engine.fused import merge_layers
from nla_engine.ops.attention import Shape
from nla_engine.ops.linear import linear
from nla_engine.ops.rotary import HeadNorm, rotate_and_store

#: Classes of attention that rotate whole heads, in halves, and do nothing else to queries and keys but norm them.
_KNOWN = ("GptOssAttention", "MixtralAttention", "Qwen2MoeAttention", "Qwen3MoeAttention")
_LAYERS = ("q_proj", "k_proj", "v_proj")


class EngineHeads:
    """Called like the module it replaces, inside a pass of the runner: hidden states [1, T, d] -> ([1, T, d], None).

    shape: how the module attends
    """

    def __init__(self, module: Any, shape: Shape) -> None:
        self.module, self.shape, self.layer = module, shape, int(module.layer_idx)
        self.qkv, self.bias = merge_layers(*(getattr(module, name) for name in _LAYERS))
        self.norm = None
        if hasattr(module, "q_norm"):
            query, key = norm_facts(module.q_norm), norm_facts(module.k_norm)
            self.norm = HeadNorm(query.weight, key.weight, query.eps, query.offset)

    def __call__(
        self, hidden_states: torch.Tensor, *, position_embeddings: tuple[torch.Tensor, torch.Tensor], **_: Any
    ) -> tuple[torch.Tensor, None]:
        work = current_pass()
        work.enter(self.layer, self.shape)
        kv = work.cache.layer(self.layer)
        cos, sin = position_embeddings
        row = linear(hidden_states[0], self.qkv, self.bias)
        query = rotate_and_store(
            row, cos[0], sin[0], kv.keys, kv.values, kv.table, work.slot, work.place, self.norm
        )
        attended = work.attend(query, self.layer, self.shape)
        result: torch.Tensor = self.module.o_proj(attended.flatten(1)[None])
        return result, None


def known_heads(blocks: nn.ModuleList) -> list[Any]:
    """The attentions in some blocks that `EngineHeads` computes."""
    return [module for module in blocks.modules() if type(module).__name__ in _KNOWN and _matches(module)]


def _matches(module: Any) -> bool:
    """Whether a module has the parts of its class, and nothing more."""
    layers = [getattr(module, name) for name in (*_LAYERS, "o_proj")]
    return (
        parts_of(module) - {"sinks", "q_norm", "k_norm"} == {*_LAYERS, "o_proj"}
        and all(type(layer) is nn.Linear for layer in layers)
        and len({layer.bias is None for layer in layers[:3]}) == 1
        and bool(module.is_causal)
    )
