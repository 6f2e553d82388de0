"""What the fused block must know of an architecture: one record per family of blocks, checked against each block.

To add a family, add a record to FAMILIES; to add a class of norms, add one to NORMS. A block is fused only if it
matches its record exactly. One with another module, bias, activation, norm or soft cap is left to transformers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from nla_engine.engine.slots import kv_shape
from nla_engine.errors import EngineError
from nla_engine.ops.attention import Shape
from nla_engine.ops.gate import ACTIVATIONS
from nla_engine.ops.rotary import HeadNorm


@dataclass(frozen=True)
class NormClass:
    """A class of RMSNorm. offset: what it adds to its weight. eps: name of the attribute that holds its epsilon."""

    offset: float = 0.0
    eps: str = "variance_epsilon"


@dataclass(frozen=True)
class BlockFamily:
    """How the blocks of a family compute. A string names a module of the block, of its `self_attn` or of its `mlp`.

    before_attention, before_mlp: the norm of the sublayer's input. after_attention, after_mlp: the norm of its output,
    before the sum with the residual stream; None if there is none. head_norms: the norms of each query head and each
    key head; None if there are none. qkv: linear layers whose outputs, in order, are all query, key and value heads.
    gate_up: linear layers for the gate, then for what it multiplies. activation: the config field that names the
    gate's function. windows: whether the attention may have a sliding window. softcap: whether it caps its scores as
    the config says (`softcap_of`).
    """

    before_attention: str = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str = "post_attention_layernorm"
    after_mlp: str | None = None
    head_norms: tuple[str, str] | None = None
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    out: str = "o_proj"
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    down: str = "down_proj"
    activation: str = "hidden_act"
    windows: bool = False
    softcap: bool = False


#: By class name of the norm.
NORMS = {
    "LlamaRMSNorm": NormClass(),
    "Qwen2RMSNorm": NormClass(),
    "Qwen3RMSNorm": NormClass(),
    "Gemma3RMSNorm": NormClass(offset=1.0, eps="eps"),
}
#: The same of norms that stand in blocks without a record.
LONE_NORMS = {
    **dict.fromkeys(("Gemma4RMSNorm", "Gemma4UnifiedRMSNorm", "Llama4TextRMSNorm"), NormClass(eps="eps")),
    **dict.fromkeys(
        (
            "GptOssRMSNorm",
            "DeepseekV2RMSNorm",
            "DeepseekV3RMSNorm",
            "Glm4MoeLiteRMSNorm",
            "YoutuRMSNorm",
            "AXK1RMSNorm",
            "MiniCPM3RMSNorm",
            "LongcatFlashRMSNorm",
            "MixtralRMSNorm",
            "OlmoeRMSNorm",
            "Qwen2MoeRMSNorm",
            "Qwen3MoeRMSNorm",
        ),
        NormClass(),
    ),
    **dict.fromkeys(
        ("Qwen3NextRMSNorm", "Qwen3_5RMSNorm", "Qwen3_5MoeRMSNorm"), NormClass(offset=1.0, eps="eps")
    ),
}
#: By class name of the block.
FAMILIES = {
    "LlamaDecoderLayer": BlockFamily(),
    "Qwen2DecoderLayer": BlockFamily(windows=True),
    "Qwen3DecoderLayer": BlockFamily(head_norms=("q_norm", "k_norm"), windows=True),
    "Gemma3DecoderLayer": BlockFamily(
        after_attention="post_attention_layernorm",
        before_mlp="pre_feedforward_layernorm",
        after_mlp="post_feedforward_layernorm",
        head_norms=("q_norm", "k_norm"),
        activation="hidden_activation",
        windows=True,
    ),
}


class NotFused(EngineError):
    """A module does not compute what the fused block would. The message says what differs."""


@dataclass(frozen=True)
class NormFacts:
    """y = x / sqrt(mean(x^2) + eps) * (weight + offset), weight [d]."""

    weight: torch.Tensor
    eps: float
    offset: float


@dataclass(frozen=True)
class BlockFacts:
    """A block as read by its record. eps, offset: shared by all its norms except those of the heads.

    The norms' weights are [d]. activation: as `ops.gate` names it.
    """

    layer: int
    shape: Shape
    qkv: tuple[nn.Linear, ...]
    out: nn.Linear
    gate_up: tuple[nn.Linear, ...]
    down: nn.Linear
    activation: str
    eps: float
    offset: float
    before_attention: torch.Tensor
    after_attention: torch.Tensor | None
    before_mlp: torch.Tensor
    after_mlp: torch.Tensor | None
    head_norm: HeadNorm | None


def can_fuse(block: Any) -> bool:
    """Whether the fused block computes the same as this block."""
    try:
        facts_of(block)
    except NotFused:
        return False
    return True


def why_unfused(blocks: Iterable[Any]) -> str:
    """Why blocks of a known family are not fused; empty if they are, or if their family has no record."""
    for block in blocks:
        try:
            facts_of(block)
        except NotFused as error:
            return f"{error}: not fused, slower" if type(block).__name__ in FAMILIES else ""
    return ""


def can_fuse_norm(norm: Any) -> bool:
    """Whether the arithmetic of the norm after the last block is known."""
    return type(norm).__name__ in NORMS


def lone_norms(blocks: nn.Module) -> list[Any]:
    """The norms in some blocks whose class is in LONE_NORMS, and that have a weight."""
    known = (module for module in blocks.modules() if type(module).__name__ in LONE_NORMS)
    return [module for module in known if hasattr(module, "weight")]


def norm_facts(norm: Any) -> NormFacts:
    """NotFused if its class is not known."""
    kind = (NORMS | LONE_NORMS).get(type(norm).__name__)
    if kind is None:
        raise NotFused(f"{type(norm).__name__} is not a known norm")
    return NormFacts(norm.weight, float(getattr(norm, kind.eps)), kind.offset)


def softcap_of(config: Any) -> float:
    """The soft cap of attention scores in a config; 0: none."""
    return float(getattr(config, "attn_logit_softcapping", None) or 0.0)


def facts_of(block: Any) -> BlockFacts:
    """Read a block and its config by the record of its class. NotFused if they do not match the record."""
    name = type(block).__name__
    family = FAMILIES.get(name)
    if family is None:
        raise NotFused(f"{name} is not a known block")
    try:
        return _read(block, family)
    except (NotFused, AttributeError) as error:
        raise NotFused(f"{name}: {error}") from error


def _read(block: Any, family: BlockFamily) -> BlockFacts:
    attn, mlp = block.self_attn, block.mlp
    config = attn.config
    places = (family.before_attention, family.after_attention, family.before_mlp, family.after_mlp)
    _check_parts(block, {"self_attn", "mlp", *filter(None, places)})
    _check_parts(attn, {*family.qkv, family.out, *(family.head_norms or ())})
    _check_parts(mlp, {*family.gate_up, family.down, "act_fn"})
    qkv, gate_up = _linear(attn, family.qkv), _linear(mlp, family.gate_up)
    (out,), (down,) = _linear(attn, (family.out,)), _linear(mlp, (family.down,))
    _check_products(config, qkv, out, gate_up, down)
    norms = {place: norm_facts(getattr(block, place)) for place in places if place}
    eps, offset = _in_common(list(norms.values()))
    return BlockFacts(
        layer=int(attn.layer_idx),
        shape=_attention_shape(attn, family),
        qkv=qkv,
        out=out,
        gate_up=gate_up,
        down=down,
        activation=_activation(mlp, str(getattr(config, family.activation))),
        eps=eps,
        offset=offset,
        before_attention=norms[family.before_attention].weight,
        after_attention=norms[family.after_attention].weight if family.after_attention else None,
        before_mlp=norms[family.before_mlp].weight,
        after_mlp=norms[family.after_mlp].weight if family.after_mlp else None,
        head_norm=_head_norm(attn, family),
    )


def parts_of(module: nn.Module) -> set[str]:
    """The names of a module's submodules, and of the parameters of its own."""
    return {name for name, _ in [*module.named_children(), *module.named_parameters(recurse=False)]}


def _check_parts(module: nn.Module, expected: set[str]) -> None:
    """NotFused unless a module has exactly these submodules and no parameters of its own."""
    found = parts_of(module)
    if found != expected:
        raise NotFused(f"{type(module).__name__} differs in {', '.join(sorted(found ^ expected))}")


def _linear(module: nn.Module, names: tuple[str, ...]) -> tuple[nn.Linear, ...]:
    layers = [(name, getattr(module, name)) for name in names]
    for name, layer in layers:
        if type(layer) is not nn.Linear:
            raise NotFused(f"{name} is {type(layer).__name__}")
    return tuple(layer for _, layer in layers)


def _check_products(
    config: Any,
    qkv: tuple[nn.Linear, ...],
    out: nn.Linear,
    gate_up: tuple[nn.Linear, ...],
    down: nn.Linear,
) -> None:
    """NotFused unless queries, keys and values all have a bias or none does, the others have none, and widths fit."""
    if len({layer.bias is None for layer in qkv}) > 1:
        raise NotFused("only some of queries, keys and values have a bias")
    if any(layer.bias is not None for layer in (out, *gate_up, down)):
        raise NotFused("a product other than queries, keys and values has a bias")
    groups, size = kv_shape(config)
    heads = int(config.num_attention_heads)
    row, read = sum(layer.out_features for layer in qkv), out.in_features
    if (row, read) != ((heads + 2 * groups) * size, heads * size):
        raise NotFused(f"rows of {row} and {read} are not those of {heads} and {groups} heads of {size}")
    if sum(layer.out_features for layer in gate_up) != 2 * down.in_features:
        raise NotFused("its gate is not as wide as what it multiplies")


def _attention_shape(attn: Any, family: BlockFamily) -> Shape:
    window = getattr(attn, "sliding_window", None)
    cap = softcap_of(attn.config)
    if not attn.is_causal:
        raise NotFused("it attends to later tokens")
    if window and not family.windows:
        raise NotFused(f"a window of {window} is not known for its family")
    if cap and not family.softcap:
        raise NotFused(f"a soft cap of {cap} is not known for its family")
    return Shape(float(attn.scaling), int(window or 0), cap)


def _activation(mlp: Any, name: str) -> str:
    if name not in ACTIVATIONS:
        raise NotFused(f"activation {name} is not known")
    if type(mlp.act_fn) is not type(ACT2FN[name]):
        raise NotFused(f"its activation {type(mlp.act_fn).__name__} is not the {name} of its config")
    return ACTIVATIONS[name]


def _in_common(norms: list[NormFacts]) -> tuple[float, float]:
    """The epsilon and offset that all norms share."""
    found = {(norm.eps, norm.offset) for norm in norms}
    if len(found) > 1:
        raise NotFused("its norms differ in epsilon or offset")
    return found.pop()


def _head_norm(attn: Any, family: BlockFamily) -> HeadNorm | None:
    if family.head_norms is None:
        return None
    query, key = (norm_facts(getattr(attn, name)) for name in family.head_norms)
    return HeadNorm(query.weight, key.weight, *_in_common([query, key]))
