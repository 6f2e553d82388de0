"""Multi-head latent attention in the engine, against plain transformers, one sequence at a time: compressed keys of
slots that are refilled, shared, copied and lost, and prompts that are read in several passes."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from family_runs import check_rows, drawn, in_slots
from small_families import small_model
from tiny import byte_tokenizer

from nla_engine.bench.limits import ModelSize
from nla_engine.engine.latent import EngineLatent
from nla_engine.engine.request import Request
from nla_engine.engine.runner import Runner
from nla_engine.engine.slots import default_room, slot_size
from nla_engine.errors import UnsupportedModel
from nla_engine.models.load import LanguageModel, wrap_model
from nla_engine.ops.backends import Kernels

#: Stretched positions, whose scale of the scores is another.
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 32.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 16,
}
GROUPS = {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}
#: Configuration, and what differs from a small one of its class.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "v2": ("DeepseekV2Config", {"topk_method": "group_limited_greedy", **GROUPS}),
    "v2-lite": ("DeepseekV2Config", {"q_lora_rank": None, "v_head_dim": 24, "rope_parameters": YARN}),
    "v3": ("DeepseekV3Config", {"rope_parameters": YARN, "routed_scaling_factor": 2.5, **GROUPS}),
    "v3-halves": (
        "DeepseekV3Config",
        {"q_lora_rank": None, "rope_interleave": False, "attention_bias": True},
    ),
    "glm": ("Glm4MoeLiteConfig", {"num_attention_heads": 5, "num_key_value_heads": 5}),
    "minicpm": ("MiniCPM3Config", {}),
    "longcat": ("LongcatFlashConfig", {}),  # two attentions a block
}
pytestmark = pytest.mark.filterwarnings("ignore")


def model(kind: str) -> LanguageModel:
    name, changes = KINDS[kind]
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    made = small_model(getattr(transformers, name), **changes)
    for key, weight in [*made.named_parameters(), *made.named_buffers()]:
        if weight.ndim == 1 and ("norm" in key or "bias" in key):
            weight.data.uniform_(0.3, 1.5)
    return wrap_model(made, byte_tokenizer(), name=name)


def taken_over(runner: Runner) -> None:
    for block in runner.lm.blocks:
        found: Any = block.self_attn
        for attention in found if isinstance(found, torch.nn.ModuleList) else [found]:
            assert isinstance(attention.forward, EngineLatent)


run = partial(in_slots, inside=taken_over)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("passed", [5, 2048])
def test_a_shared_prefix_and_prompts_in_parts(kind: str, passed: int, rng: np.random.Generator) -> None:
    lm, prefix = model(kind), tuple(rng.integers(3, 250, 7).tolist())
    asked = drawn(rng, (1, 9, 3, 17, 2, 6), (12, 3, 7, 5, 9, 1))
    found, _ = run(lm, asked, passed=passed, prefix=prefix)
    assert len(found) == len(asked)
    check_rows(lm, found, prefix)


@pytest.mark.parametrize("kind", ["v2-lite", "v3"])
def test_long_prompts_in_chunks(kind: str, rng: np.random.Generator) -> None:
    lm, prefix = model(kind), tuple(rng.integers(3, 250, 20).tolist())
    found, _ = run(lm, drawn(rng, (450, 3, 301), (6, 9, 4)), slots=2, passed=130, length=500, prefix=prefix)
    check_rows(lm, found, prefix)


@pytest.mark.parametrize("kind", KINDS)
def test_with_fused_norms(kind: str, rng: np.random.Generator) -> None:
    lm = model(kind)
    found, _ = run(lm, drawn(rng, (9, 3, 5, 12), (5, 4, 8, 3)), kernels=Kernels("fused"))
    check_rows(lm, found)


@pytest.mark.parametrize("kind", ["v2-lite", "v3"])
def test_samples_of_one_prompt_share_blocks(kind: str, rng: np.random.Generator) -> None:
    lm, prompt = model(kind), tuple(rng.integers(3, 250, 13).tolist())
    asked = [Request(0, prompt, 6), *(Request(i, prompt, 4 + i, again=True) for i in (1, 2, 3, 4))]
    found, _ = run(lm, asked, slots=4, blocks=40, block=4)
    assert len({tuple(done.generated[:5].tolist()) for done in found}) == 1
    check_rows(lm, found)


@pytest.mark.parametrize("kind", ["v2-lite", "longcat"])
def test_sequences_that_step_back_are_read_again(kind: str, rng: np.random.Generator) -> None:
    lm = model(kind)
    asked = drawn(rng, (9, 6, 11, 8), (12, 12, 12, 12))
    found, stepped_back = run(lm, asked, slots=4, blocks=12, block=4)
    assert stepped_back > 0 and len(found) == 4
    check_rows(lm, found)


@pytest.mark.parametrize("kind", ["v2-lite", "longcat"])
def test_one_row_a_token_counts_as_memory(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = model(kind)
    layers = len(lm.blocks) * (1 + (kind == "longcat"))
    each = slot_size(100, 0) * layers * (16 + 8) * 4
    monkeypatch.setattr("nla_engine.engine.slots.physical_bytes", lambda: 2 * 10 * each)
    assert default_room(lm, 100).slots == 9  # and the spare one
    with Runner(lm, slots=2, length=30, prefix=(5, 6, 7)) as runner:
        cache = runner.cache
        assert len(cache.keys) == layers == cache.layers and cache.prefix_size == 3
        for keys, values in ((cache.keys, cache.values), (cache.prefix_keys, cache.prefix_values)):
            assert {held.shape[-2:] for held in keys} == {(1, 24)}
            assert {held.shape[-2:] for held in values} == {(1, 16)}
            assert [held.data_ptr() for held in values] == [held.data_ptr() for held in keys]
    read = ModelSize.of(lm)
    assert read.kv_bytes == layers * (16 + 8) * 4 and read.windowed_bytes == 0
    assert not any("forward" in vars(module) for module in lm.blocks.modules())


@pytest.mark.parametrize("change", ["an extra module", "another attention in one block", "not causal"])
def test_what_is_not_known_is_refused(change: str) -> None:
    lm = model("v3")
    attention: Any = lm.blocks[1].self_attn
    if change == "an extra module":
        attention.indexer = torch.nn.Linear(3, 3)
    elif change == "another attention in one block":
        attention.__class__ = type("OtherAttention", (type(attention),), {})
    else:
        attention.is_causal = False
    with pytest.raises(UnsupportedModel, match="this architecture is not supported"):
        Runner(lm, slots=2, length=30)


def test_a_planted_fault_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runner's own check compares with transformers: here, other pairs of channels are rotated."""
    built = EngineLatent.__init__

    def wrong(self: Any, module: Any) -> None:
        built(self, module)
        self.interleaved = not self.interleaved

    monkeypatch.setattr(EngineLatent, "__init__", wrong)
    with pytest.raises(UnsupportedModel, match="differs from transformers' own"):
        Runner(model("v3"), slots=2, length=30)
