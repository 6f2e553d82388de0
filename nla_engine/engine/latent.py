"""The forward of multi-head latent attention (DeepSeek-V2 and V3, GLM-4.7-Flash) while the engine runs it: queries meet
the compressed keys as they are kept, in prompts and in decode steps.

`ops.latent` says why that gives the same. In bfloat16 it rounds at other places than transformers does: a query times
the weight of the keys and a sum of latents, where transformers rounds the keys and values of every head.
"""

from __future__ import annotations

from typing import Any

import torch

from nla_engine.engine.attention import current_pass
from nla_engine.engine.compressed import FAMILIES
from nla_engine.engine.families import norm_facts
from nla_engine.ops.attention import Shape
from nla_engine.ops.latent import Angles, LatentNorm, store_latent, store_latent_reference


class EngineLatent:
    """Called like the module it replaces, inside a pass of the runner: hidden states [1, T, d] -> ([1, T, d], None).

    keys, values: the parts [H, n, L] and [H, v, L] of the module's weight that makes them of latents
    """

    def __init__(self, module: Any) -> None:
        self.module, self.layer = module, int(module.layer_idx)
        facts, family = norm_facts(module.kv_a_layernorm), FAMILIES[type(module).__name__]
        factors = (module.mla_scale_q_lora, module.mla_scale_kv_lora) if family.scaled else (1.0, 1.0)
        self.shape = Shape(float(module.scaling) * float(factors[0]))
        self.norm = LatentNorm(facts.weight, facts.eps, float(factors[1]))
        own = family.interleaved
        self.interleaved = bool(module.config.rope_interleave) if own is None else own
        self.heads, self.latent = int(module.num_heads), int(module.kv_lora_rank)
        sizes = [int(module.qk_nope_head_dim), int(module.v_head_dim)]
        self.sizes = [sizes[0], int(module.qk_rope_head_dim)]
        expand = module.kv_b_proj.weight.detach().view(self.heads, sum(sizes), self.latent)
        self.keys, self.values = expand.split(sizes, 1)

    def __call__(
        self, hidden_states: torch.Tensor, *, position_embeddings: Any, **_: Any
    ) -> tuple[torch.Tensor, None]:
        work = current_pass()
        work.enter(self.layer, self.shape)
        kv = work.cache.layer(self.layer)
        row = self.module.kv_a_proj_with_mqa(hidden_states)[0]
        own, turned = self._queries(hidden_states).view(len(row), self.heads, -1).split(self.sizes, -1)
        query = row.new_empty((len(row), self.heads, self.latent + self.sizes[1]))
        torch.bmm(own.transpose(0, 1), self.keys, out=query[..., : self.latent].transpose(0, 1))
        store = store_latent_reference if work.reference else store_latent
        angles = self._angles(position_embeddings)
        store(row, self.norm, angles, turned, query, kv.keys, kv.table, work.slot, work.place)
        attended = work.attend(query, self.layer, self.shape)
        values = row.new_empty((len(row), self.heads, self.values.shape[1]))
        torch.bmm(attended.transpose(0, 1), self.values.transpose(1, 2), out=values.transpose(0, 1))
        result: torch.Tensor = self.module.o_proj(values.flatten(1)[None])
        return result, None

    def _queries(self, hidden: torch.Tensor) -> torch.Tensor:
        """[1, T, H (n + R)]."""
        module = self.module
        compressed = module.q_lora_rank is not None
        queries: torch.Tensor = (
            module.q_b_proj(module.q_a_layernorm(module.q_a_proj(hidden)))
            if compressed
            else module.q_proj(hidden)
        )
        return queries

    def _angles(self, given: Any) -> Angles:
        """From complex numbers [1, T, R / 2], or from cos and sin [1, T, R], each half of which is the same."""
        half = self.sizes[1] // 2
        if isinstance(given, torch.Tensor):
            return Angles(given.real[0], given.imag[0], self.interleaved)
        cos, sin = given
        return Angles(cos[0, :, :half], sin[0, :, :half], self.interleaved)
