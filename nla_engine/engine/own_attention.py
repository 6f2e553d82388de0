"""Attention modules that compute their scores themselves, where others call the function registered with transformers.

While the engine holds such a module, a class of OWN takes the place of its forward: it reads queries, keys and values
as the module does, and attends through the engine. To add a class of modules, add a class to OWN.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from typing import Any

import torch
from transformers.masking_utils import AttentionMaskInterface

from nla_engine.engine.attention import NAME, current_pass
from nla_engine.errors import UnsupportedModel
from nla_engine.ops.attention import Shape, Slopes

#: The name of attention where a decoder uses its mask before the modules do, so that there must be one.
_MASKED = "nla_engine_masked"

#: Queries [T, H, h], keys and values [T, KV, h].
Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class OwnAttention:
    """Called like the module it replaces, inside a pass of the runner: hidden states [1, T, d], and other arguments.

    place: where the module is in its block; implementation: what its decoder is told that it attends by
    """

    place = "self_attention"
    implementation = NAME

    def __init__(self, module: Any, layer: int) -> None:
        self.module, self.layer = module, layer
        self.shape = self.asked()

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        work = current_pass()
        query, key, value = self.heads(hidden_states[0], kwargs)
        work.enter(self.layer, self.shape)
        work.cache.write(self.layer, work.slot, work.place, key, value)
        return self.give(work.attend(query, self.layer, self.shape).flatten(1)[None], args)

    def asked(self) -> Shape:
        """How the module attends."""
        raise NotImplementedError

    def heads(self, x: torch.Tensor, given: dict[str, Any]) -> Heads:
        """Of hidden states [T, d]. given: the call's arguments by name"""
        raise NotImplementedError

    def give(self, attended: torch.Tensor, given: tuple[Any, ...]) -> Any:
        """What the module returns, of [1, T, H h]. given: the call's arguments after the hidden states"""
        return self.module.dense(attended), None

    def seen(self, length: int) -> torch.Tensor | None:
        """What the last of `length` tokens attends to by the module's own mask: bool [length]; None: it has none."""
        return None

    @property
    def code(self) -> Any:
        """The file of transformers that the module's class is in."""
        return sys.modules[type(self.module).__module__]


class _Bloom(OwnAttention):
    def asked(self) -> Shape:
        dtype = self.module.dense.weight.dtype
        rounded = None if dtype == torch.float32 else dtype
        return Shape(self.module.inv_norm_factor, slopes=Slopes(_slopes(self), rounded))

    def heads(self, x: torch.Tensor, given: dict[str, Any]) -> Heads:
        rows = self.module.query_key_value(x).view(len(x), self.module.num_heads, 3, self.module.head_dim)
        query, key, value = rows.unbind(2)
        return query, key, value

    def give(self, attended: torch.Tensor, given: tuple[Any, ...]) -> Any:
        return given[0] + self.module.dense(attended), None


class _Falcon(OwnAttention):
    def asked(self) -> Shape:
        scale = self.module.inv_norm_factor
        if not self.module.config.alibi:
            return Shape(scale)
        if math.frexp(scale)[0] != 0.5:
            raise UnsupportedModel(
                f"FalconAttention: biases over heads of {self.module.head_dim} channels are rounded twice, and the "
                "engine rounds them once: this architecture is not supported"
            )
        return Shape(scale, slopes=Slopes(_slopes(self) * scale, torch.bfloat16, coarse=True))

    def heads(self, x: torch.Tensor, given: dict[str, Any]) -> Heads:
        module, rows = self.module, self.module.query_key_value(x)
        size = module.head_dim
        if module.new_decoder_architecture:
            rows = rows.view(len(x), module.num_kv_heads, -1, size)
            query, key, value = rows[:, :, :-2].flatten(1, 2), rows[:, :, -2], rows[:, :, -1]
        elif module.multi_query:
            query, key, value = rows.view(len(x), -1, size).split([module.num_heads, 1, 1], 1)
        else:
            query, key, value = rows.view(len(x), -1, 3, size).unbind(2)
        if given["alibi"] is None:
            query, key = _rotated(self, query, key, *given["position_embeddings"])
        return query, key, value


class _Mpt(OwnAttention):
    place = "attn"
    implementation = _MASKED

    def asked(self) -> Shape:
        module = self.module
        table = self.code.build_mpt_alibi_tensor(module.n_heads, 2, device=module.Wqkv.weight.device)
        return Shape(module.softmax_scale, slopes=Slopes(-table[:, 0, 0].float().contiguous()))

    def heads(self, x: torch.Tensor, given: dict[str, Any]) -> Heads:
        module, rows = self.module, self.module.Wqkv(x)
        if module.clip_qkv:
            rows = rows.clamp(-module.clip_qkv, module.clip_qkv)
        query, key, value = rows.view(len(x), 3, module.n_heads, module.head_dim).unbind(1)
        return query, key, value

    def give(self, attended: torch.Tensor, given: tuple[Any, ...]) -> Any:
        return self.module.out_proj(attended), None


class _GPTNeo(OwnAttention):
    place = "attn.attention"

    def asked(self) -> Shape:
        return Shape(1.0, self.module.config.window_size if self.module.attention_type == "local" else 0)

    def heads(self, x: torch.Tensor, given: dict[str, Any]) -> Heads:
        module = self.module
        made = [
            layer(x).view(len(x), module.num_heads, -1)
            for layer in (module.q_proj, module.k_proj, module.v_proj)
        ]
        return made[0], made[1], made[2]

    def give(self, attended: torch.Tensor, given: tuple[Any, ...]) -> Any:
        return self.module.out_proj(attended), None

    def seen(self, length: int) -> torch.Tensor | None:
        return self.module.bias[0, 0, length - 1, :length].bool()


class _GPTNeoXJapanese(OwnAttention):
    place = "attention"

    def asked(self) -> Shape:
        return Shape(1.0 / self.module.norm_factor)

    def heads(self, x: torch.Tensor, given: dict[str, Any]) -> Heads:
        module, turned = self.module, self.module.rotary_ndims
        rows = module.query_key_value(x).view(len(x), module.num_attention_heads, 3, module.head_size)
        query, key, value = rows.unbind(2)
        rotated = _rotated(self, query[..., :turned], key[..., :turned], *given["position_embeddings"])
        query, key = (
            torch.cat([front, whole[..., turned:]], -1)
            for front, whole in zip(rotated, (query, key), strict=True)
        )
        return query, key, value

    def give(self, attended: torch.Tensor, given: tuple[Any, ...]) -> Any:
        return self.module.dense(attended), None, self.module.dense_bias


class _OpenAIGPT(OwnAttention):
    place = "attn"

    def asked(self) -> Shape:
        module = self.module
        return Shape((module.split_size // module.n_head) ** -0.5 if module.scale else 1.0)

    def heads(self, x: torch.Tensor, given: dict[str, Any]) -> Heads:
        query, key, value = self.module.c_attn(x).view(len(x), 3, self.module.n_head, -1).unbind(1)
        return query, key, value

    def give(self, attended: torch.Tensor, given: tuple[Any, ...]) -> Any:
        return [self.module.c_proj(attended)]


#: By file of transformers and class of the block.
OWN: dict[str, type[OwnAttention]] = {
    "modeling_bloom.BloomBlock": _Bloom,
    "modeling_falcon.FalconDecoderLayer": _Falcon,
    "modeling_gpt_neo.GPTNeoBlock": _GPTNeo,
    "modeling_gpt_neox_japanese.GPTNeoXJapaneseLayer": _GPTNeoXJapanese,
    "modeling_mpt.MptBlock": _Mpt,
    "modeling_openai.Block": _OpenAIGPT,
}


def _kind(block: Any) -> type[OwnAttention] | None:
    kind = type(block)
    return OWN.get(f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}")


def knows_attention(blocks: Iterable[Any]) -> bool:
    """Whether the attention of every block computes its scores itself, and is known."""
    return all(_kind(block) is not None for block in blocks)


def implementation(blocks: Iterable[Any]) -> str:
    """The name of attention for a model with these blocks while the engine holds it."""
    kinds = {_kind(block) for block in blocks}
    return next((kind.implementation for kind in kinds if kind is not None), NAME)


def take_attention(blocks: Iterable[Any]) -> list[Any]:
    """Replace the forward of what `knows_attention`, in every block. The modules: the caller restores them."""
    modules = []
    for layer, block in enumerate(blocks):
        if kind := _kind(block):
            module = block.get_submodule(kind.place)
            module.forward = kind(module, layer)
            modules.append(module)
    return modules


def own_mask(block: Any, length: int) -> torch.Tensor | None:
    """`OwnAttention.seen` of a block whose attention is replaced; None for others."""
    kind = _kind(block)
    taken = None if kind is None else block.get_submodule(kind.place).forward
    return taken.seen(length) if isinstance(taken, OwnAttention) else None


def _slopes(own: OwnAttention) -> torch.Tensor:
    """Float32 [H]: what transformers adds to the score of a key at position 1, before the scores are scaled."""
    ones = torch.ones((1, 2), dtype=torch.int64, device=own.module.dense.weight.device)
    table: torch.Tensor = own.code.build_alibi_tensor(ones, own.module.num_heads, torch.float32)
    return table[:, 0, 1].contiguous()


def _rotated(
    own: OwnAttention, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """By transformers' own function. query [T, H, r], key [T, KV, r]; cos, sin [1, T, r]."""
    query, key = own.code.apply_rotary_pos_emb(query[None], key[None], cos, sin, 2)
    return query[0], key[0]


def _no_mask(*_: object, device: Any = None, **__: object) -> torch.Tensor:
    return torch.zeros((), device=device)


AttentionMaskInterface.register(_MASKED, _no_mask)
