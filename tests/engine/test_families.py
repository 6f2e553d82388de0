"""The records of the families of blocks: they read transformers' config; blocks that differ are not fused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import ARCHITECTURES, language_model, tiny_model
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from nla_engine.engine import families
from nla_engine.engine.families import FAMILIES, NORMS, BlockFamily, NormClass, NotFused, can_fuse, facts_of
from nla_engine.engine.fused import FusedBlock
from nla_engine.engine.runner import Runner
from nla_engine.models.load import LanguageModel
from nla_engine.ops.attention import Shape
from nla_engine.ops.backends import Kernels


def blocks_of(name: str) -> tuple[Any, list[Any]]:
    """The config and the blocks of a tiny model."""
    model = tiny_model(name)
    decoder = getattr(model.model, "language_model", model.model)
    return decoder.config, list(decoder.layers)


def test_every_record_has_a_model_here() -> None:
    seen, norms = set(), set()
    for name in ARCHITECTURES:
        _, blocks = blocks_of(name)
        seen |= {type(block).__name__ for block in blocks}
        norms |= {type(block.input_layernorm).__name__ for block in blocks}
    assert seen == set(FAMILIES) and norms == set(NORMS)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_facts_are_those_of_the_config(name: str) -> None:
    config, blocks = blocks_of(name)
    gemma, qwen = name.startswith("gemma"), name.startswith("qwen")
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for layer, block in enumerate(blocks):
        facts = facts_of(block)
        sliding = (gemma or qwen) and config.layer_types[layer] == "sliding_attention"
        scale = (config.query_pre_attn_scalar if gemma else size) ** -0.5
        assert facts.layer == layer
        assert facts.shape == Shape(scale, config.sliding_window if sliding else 0)
        assert facts.activation == ("gelu" if gemma else "silu")
        assert (facts.eps, facts.offset) == (config.rms_norm_eps, float(gemma))
        attn, mlp = block.self_attn, block.mlp
        assert facts.qkv == (attn.q_proj, attn.k_proj, attn.v_proj) and facts.out is attn.o_proj
        assert [layer.out_features // size for layer in facts.qkv] == [
            config.num_attention_heads,
            *[config.num_key_value_heads] * 2,
        ]
        assert facts.gate_up == (mlp.gate_proj, mlp.up_proj) and facts.down is mlp.down_proj
        assert facts.before_attention is block.input_layernorm.weight
        behind = block.post_attention_layernorm.weight
        if gemma:
            assert facts.after_attention is behind
            assert facts.before_mlp is block.pre_feedforward_layernorm.weight
            assert facts.after_mlp is block.post_feedforward_layernorm.weight
        else:
            assert facts.after_attention is None and facts.before_mlp is behind and facts.after_mlp is None
        if gemma or name == "qwen3":
            assert facts.head_norm is not None
            assert facts.head_norm.query is attn.q_norm.weight and facts.head_norm.key is attn.k_norm.weight
            assert (facts.head_norm.eps, facts.head_norm.offset) == (config.rms_norm_eps, float(gemma))
        else:
            assert facts.head_norm is None
    assert {facts_of(block).shape.window for block in blocks} == ({8, 0} if gemma else {0})


def test_a_window_of_qwen_is_read() -> None:
    lm = language_model("Qwen2Config", use_sliding_window=True, sliding_window=16, max_window_layers=1)
    assert [facts_of(block).shape.window for block in lm.blocks] == [0, 16]


def bias(name: str) -> Callable[[Any], None]:
    """Give a linear layer of the attention or of the MLP a bias."""

    def change(block: Any) -> None:
        layer = getattr(block.self_attn, name, None) or getattr(block.mlp, name)
        layer.bias = nn.Parameter(torch.zeros(layer.out_features))

    return change


def put(path: str, make: Callable[[Any], Any]) -> Callable[[Any], None]:
    """Put make(what is there) in a place of the block."""
    *parents, name = path.split(".")

    def change(block: Any) -> None:
        for parent in parents:
            block = getattr(block, parent)
        setattr(block, name, make(getattr(block, name, None)))

    return change


class Adapted(nn.Linear):
    """A linear layer that may compute more than its weight says."""


class OtherNorm(LlamaRMSNorm):
    """A norm of an unknown class."""


ALTERED: dict[str, tuple[str, Callable[[Any], None], str]] = {
    "bias of the output": ("llama", bias("o_proj"), "other than queries, keys and values has a bias"),
    "bias of the gate": ("gemma3_text", bias("gate_proj"), "other than queries, keys and values has a bias"),
    "bias of the MLP's output": ("qwen3", bias("down_proj"), "other than queries, keys and values has a"),
    "bias of keys alone": ("llama", bias("k_proj"), "only some of queries, keys and values have a bias"),
    "no bias of values": ("qwen2", put("self_attn.v_proj.bias", lambda _: None), "some of queries, keys"),
    "activation": ("llama", put("self_attn.config.hidden_act", lambda _: "relu"), "relu is not known"),
    "activation of the module": (
        "llama",
        put("mlp.act_fn", lambda _: ACT2FN["relu"]),
        "ReLU is not the silu",
    ),
    "activation of another field": (
        "gemma3_text",
        put("self_attn.config.hidden_activation", lambda _: "gelu"),
        "activation gelu is not known",
    ),
    "unknown norm": ("llama", put("input_layernorm", lambda _: OtherNorm(64)), "OtherNorm is not a known"),
    "norm of another family": (
        "llama",
        put("post_attention_layernorm", lambda norm: Gemma3RMSNorm(64, norm.variance_epsilon)),
        "differ in epsilon or offset",
    ),
    "epsilon of one norm": ("gemma3", put("post_feedforward_layernorm.eps", lambda e: 2 * e), "in epsilon"),
    "norm of the keys": ("qwen3", put("self_attn.k_norm.variance_epsilon", lambda e: 2 * e), "in epsilon"),
    "one more norm": ("qwen2", put("self_attn.q_norm", lambda _: OtherNorm(16)), "differs in q_norm"),
    "no norm of the heads": ("qwen3", put("self_attn.q_norm", lambda _: None), "differs in q_norm"),
    "one more parameter": (
        "llama",
        put("self_attn.sinks", lambda _: nn.Parameter(torch.zeros(4))),
        "LlamaAttention differs in sinks",
    ),
    "adapter": ("llama", put("self_attn.q_proj", lambda _: Adapted(64, 96, bias=False)), "q_proj is Adapted"),
    "head layout": ("llama", put("self_attn.config.num_key_value_heads", lambda _: 2), "are not those of 4"),
    "narrow gate": ("llama", put("mlp.up_proj", lambda _: nn.Linear(64, 90, bias=False)), "not as wide as"),
    "soft cap": (
        "gemma3_text",
        put("self_attn.config.attn_logit_softcapping", lambda _: 50.0),
        "soft cap of 50",
    ),
    "window": ("llama", put("self_attn.sliding_window", lambda _: 8), "a window of 8 is not known"),
    "both directions": ("qwen2", put("self_attn.is_causal", lambda _: False), "to later tokens"),
    "no scale": ("llama", lambda block: delattr(block.self_attn, "scaling"), "no attribute 'scaling'"),
}


@pytest.mark.parametrize("fact", ALTERED)
def test_a_block_with_an_altered_fact_is_not_fused(fact: str) -> None:
    name, change, reason = ALTERED[fact]
    _, blocks = blocks_of(name)
    assert can_fuse(blocks[1])
    change(blocks[1])
    assert not can_fuse(blocks[1])
    assert "not fused, slower" in families.why_unfused(blocks)
    with pytest.raises(NotFused, match=rf"{type(blocks[1]).__name__}: .*{reason}"):
        FusedBlock(blocks[1])


@pytest.mark.parametrize("name", ["MistralConfig", "Gemma2Config"])
def test_a_class_without_a_record_is_not_fused(name: str) -> None:
    block = language_model(name).blocks[0]
    with pytest.raises(NotFused, match=rf"{name[:5]}\w+DecoderLayer is not a known block"):
        facts_of(block)
    assert not can_fuse(block) and not families.can_fuse_norm(block.input_layernorm)
    assert not families.can_fuse_norm(None)


def gemma2() -> LanguageModel:
    more = {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}
    return language_model("Gemma2Config", **more, attn_logit_softcapping=1.0)


def test_a_new_family_is_a_new_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 2 has norms around its sublayers, windows in every other block, and soft caps."""
    family = BlockFamily(
        after_attention="post_attention_layernorm",
        before_mlp="pre_feedforward_layernorm",
        after_mlp="post_feedforward_layernorm",
        activation="hidden_activation",
        windows=True,
        softcap=True,
    )
    monkeypatch.setitem(NORMS, "Gemma2RMSNorm", NormClass(offset=1.0, eps="eps"))
    monkeypatch.setitem(FAMILIES, "Gemma2DecoderLayer", family)
    lm, ids = gemma2(), list(range(3, 33))
    assert [facts_of(block).shape for block in lm.blocks] == [Shape(0.25, 8, 1.0), Shape(0.25, 0, 1.0)]
    states = {}
    for kernels in ("reference", "fused"):
        with Runner(lm, slots=1, length=60, kernels=Kernels(kernels)) as runner:
            assert isinstance(lm.blocks[0].forward, FusedBlock) == (kernels == "fused")
            states[kernels] = runner.prefill([(0, 0, ids)])
    torch.testing.assert_close(states["fused"], states["reference"], atol=2e-5, rtol=1e-4)
