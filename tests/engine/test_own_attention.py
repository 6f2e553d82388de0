"""Attention modules that compute their scores themselves, in the engine, against plain transformers: biases by position
(ALiBi), merged projections of every layout, parallel blocks, windows that only a module knows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from family_runs import LENGTH, check_rows, drawn, in_slots
from tiny import byte_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.bloom.modeling_bloom import build_alibi_tensor as bloom_table
from transformers.models.falcon.modeling_falcon import build_alibi_tensor as falcon_table
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor as mpt_table

from nla_engine.engine import own_attention
from nla_engine.engine.attention import Pass
from nla_engine.engine.choose import open_runner
from nla_engine.engine.library import Library
from nla_engine.engine.runner import Runner
from nla_engine.errors import EngineError, UnsupportedModel
from nla_engine.models.implementation import attend_by
from nla_engine.models.load import LanguageModel, load_model, wrap_model
from nla_engine.ops.attention import attend_torch
from nla_engine.ops.backends import Kernels

pytestmark = pytest.mark.filterwarnings("ignore")
FALCON = {"num_attention_heads": 4, "new_decoder_architecture": False, "multi_query": True, "bias": False}
#: Configuration, and key/value heads.
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "Falcon-7B": ("FalconConfig", FALCON, 1),
    "Falcon-40B": ("FalconConfig", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}, 2),
    "Falcon2-11B": (
        "FalconConfig",
        FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
        2,
    ),
    "Falcon-RW": (
        "FalconConfig",
        FALCON | {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
        4,
    ),
    "Falcon with ALiBi and one key": ("FalconConfig", FALCON | {"alibi": True}, 1),
    "BLOOM": ("BloomConfig", {"n_head": 4}, 4),
    "BLOOM, 6 heads": (
        "BloomConfig",
        {"n_head": 6, "hidden_size": 96, "apply_residual_connection_post_layernorm": True},
        6,
    ),
    "MPT": ("MptConfig", {"n_heads": 4, "max_seq_len": 512}, 4),
    "MPT, 6 heads": (
        "MptConfig",
        {
            "n_heads": 6,
            "hidden_size": 96,
            "max_seq_len": 512,
            "attn_config": {"clip_qkv": 0.5, "softmax_scale": 0.3},
        },
        6,
    ),
    "GPT-Neo": (
        "GPTNeoConfig",
        {"num_heads": 4, "attention_types": [[["global", "local"], 2]], "window_size": 9},
        4,
    ),
    "GPT-NeoX Japanese": (
        "GPTNeoXJapaneseConfig",
        {"num_attention_heads": 4, "max_position_embeddings": 512},
        4,
    ),
    "GPT-1": ("OpenAIGPTConfig", {"n_head": 4}, 4),
    "GPT-BigCode": ("GPTBigCodeConfig", {"n_head": 4}, 1),
    "GPT-BigCode, all keys": ("GPTBigCodeConfig", {"n_head": 4, "multi_query": False}, 4),
    "BioGPT": ("BioGptConfig", {"num_attention_heads": 4}, 4),
    "StableLM": (
        "StableLmConfig",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "use_parallel_residual": True,
            "qk_layernorm": True,
        },
        2,
    ),
    "StableLM 2": (
        "StableLmConfig",
        {"num_attention_heads": 4, "num_key_value_heads": 4, "use_qkv_bias": True},
        4,
    ),
}


def model(name: str, dtype: torch.dtype = torch.float32) -> LanguageModel:
    config, more, _ = MODELS[name]
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 259, "intermediate_size": 96}
    made = getattr(transformers, config)(
        **{"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0} | sizes | more
    )
    torch.manual_seed(0)
    whole = transformers.AutoModelForCausalLM.from_config(made).eval()
    with torch.no_grad():
        for weight in whole.parameters():
            weight.mul_(3) if weight.ndim > 1 else weight.add_(torch.randn_like(weight) * 0.1)
    return wrap_model(whole.to(dtype), byte_tokenizer(), name=name)


@pytest.mark.parametrize("passed", [5, 2048])
@pytest.mark.parametrize("name", MODELS)
def test_a_shared_prefix_and_prompts_in_parts(name: str, passed: int, rng: np.random.Generator) -> None:
    lm, prefix = model(name), tuple(rng.integers(3, 250, 7).tolist())
    asked = drawn(rng, (1, 9, 3, 17, 2, 6), (12, 3, 7, 5, 9, 1))
    heads = []
    found, _ = in_slots(
        lm,
        asked,
        passed=passed,
        prefix=prefix,
        inside=lambda runner: heads.append(runner.cache.keys[0].shape[2]),
    )
    assert len(found) == len(asked) and heads == [MODELS[name][2]]
    check_rows(lm, found, prefix)


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_on_a_gpu(name: str, rng: np.random.Generator) -> None:
    """With decode steps in graphs."""
    lm, prefix = model(name), tuple(rng.integers(3, 250, 7).tolist())
    lm.move(torch.device("cuda", 0))
    graphable: list[bool] = []
    asked = drawn(rng, (1, 9, 3, 17, 2, 6), (12, 3, 7, 5, 9, 1))
    found, _ = in_slots(lm, asked, prefix=prefix, inside=lambda runner: graphable.append(runner.graphable))
    assert graphable == [True]
    check_rows(lm, found, prefix)


@pytest.mark.parametrize("name", ["Falcon-RW", "BLOOM", "MPT", "GPT-Neo"])
def test_far_from_the_beginning(name: str, rng: np.random.Generator) -> None:
    """Where Falcon's biases, which it rounds to bfloat16, are not linear."""
    lm, prefix = model(name), tuple(rng.integers(3, 250, 290).tolist())
    found, _ = in_slots(lm, drawn(rng, (3, 20), (6, 9)), prefix=prefix, length=350)
    check_rows(lm, found, prefix)


@pytest.mark.parametrize("name", ["Falcon-RW", "MPT", "GPT-Neo"])
def test_sequences_that_step_back_are_read_again(name: str, rng: np.random.Generator) -> None:
    lm = model(name)
    asked = drawn(rng, (9, 6, 11, 8), (12, 12, 12, 12))
    found, stepped_back = in_slots(lm, asked, slots=4, blocks=12, block=4, kernels=Kernels("fused"))
    assert stepped_back > 0 and len(found) == 4
    check_rows(lm, found)


@torch.inference_mode()
def test_a_checkpoint_of_falcon_adds_its_biases_once(tmp_path: Path) -> None:
    """As transformers does by default; its eager attention adds them in the mask and in the scores."""
    model("Falcon-RW").model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    ids = torch.arange(3, 43)[None]
    lm = load_model(tmp_path, device="cpu", dtype="float32")
    attend_by(lm.model, "eager")
    default, eager = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **how)(ids).logits
        for how in ({}, {"attn_implementation": "eager"})
    )
    torch.testing.assert_close(lm.model(ids).logits, default)
    assert not torch.allclose(eager, default, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [4, 6, 16])
def test_biases_are_those_that_transformers_makes(heads: int, dtype: torch.dtype) -> None:
    """Bit by bit, with what each model rounds."""
    at, ones = torch.arange(1500), torch.ones((1, 1500), dtype=torch.int64)

    def biases(config: str, **more: Any) -> torch.Tensor:
        made = getattr(transformers, config)(
            hidden_size=16 * heads, num_hidden_layers=1, vocab_size=9, **more
        )
        block = transformers.AutoModelForCausalLM.from_config(made).to(dtype).transformer
        block = (block.blocks if config == "MptConfig" else block.h)[0]
        kind = own_attention._kind(block)
        assert kind is not None
        slopes = kind(block.get_submodule(kind.place), 0).shape.slopes
        assert slopes is not None
        return slopes.biases(at, torch.float32)

    assert torch.equal(biases("BloomConfig", n_head=heads), bloom_table(ones, heads, dtype)[:, 0].float())
    falcon = biases("FalconConfig", num_attention_heads=heads, alibi=True)
    assert torch.equal(falcon, (falcon_table(ones, heads, dtype)[:, 0] / math.sqrt(16)).float())
    mpt = biases("MptConfig", n_heads=heads)
    torch.testing.assert_close(mpt - mpt[:, -1:], mpt_table(heads, 1500)[:, 0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["Falcon-7B", "Falcon-RW", "BLOOM", "MPT", "GPT-Neo", "StableLM"])
def test_bfloat16_is_as_near_as_transformers(name: str) -> None:
    """The engine compares itself with the blocks in float32 before it runs, and refuses to be further off."""
    with Runner(model(name, torch.bfloat16), slots=2, length=40) as runner:
        assert runner.lm.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["Falcon-RW", "BLOOM", "MPT"])
def test_other_slopes_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = model(name)
    kind = own_attention._kind(lm.blocks[0])
    asked = kind.asked

    def planted(own: Any) -> Any:
        shape = asked(own)
        shape.slopes.values.mul_(1.1)
        return shape

    monkeypatch.setattr(kind, "asked", planted)
    with pytest.raises(UnsupportedModel, match="differs from transformers' own"):
        Runner(lm, slots=2, length=40)
    assert not any("forward" in vars(module) for module in lm.model.modules())


def test_another_window_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window of 30 is longer than what the self-check reads: the module's own mask tells."""
    lm = wrap_model(
        transformers.AutoModelForCausalLM.from_config(
            transformers.GPTNeoConfig(
                hidden_size=64,
                num_heads=4,
                num_layers=2,
                attention_types=[[["global", "local"], 1]],
                window_size=30,
                vocab_size=259,
                max_position_embeddings=128,
            )
        ).eval(),
        byte_tokenizer(),
        name="GPT-Neo",
    )
    with Runner(lm, slots=2, length=60) as runner:
        assert runner.lm is lm
    monkeypatch.setattr(lm.config, "window_size", 31)
    with pytest.raises(
        UnsupportedModel, match="block 1 attends to 30 of 34 tokens, and asks the engine for 31"
    ):
        Runner(lm, slots=2, length=60)


def test_biases_that_are_rounded_twice_are_left_to_the_library() -> None:
    made = transformers.FalconConfig(
        hidden_size=96, num_attention_heads=4, num_hidden_layers=2, vocab_size=259, alibi=True
    )
    whole = transformers.AutoModelForCausalLM.from_config(made).eval()
    lm, said = wrap_model(whole, byte_tokenizer(), name="Falcon"), list[str]()
    with open_runner(lm, slots=2, length=40, announce=said.append) as runner:
        assert isinstance(runner, Library)
    assert said[0].startswith("FalconAttention: biases over heads of 24 channels are rounded twice")


class _ReadsNothing(TorchDispatchMode):
    """Fails where a value of a tensor is read on the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("name", MODELS)
def test_a_decode_step_reads_nothing_on_the_host(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a CUDA graph can hold it."""
    lm = model(name)
    with Runner(lm, slots=3, length=LENGTH) as runner:
        runner.prefill([(slot, 0, [5, 6, 7]) for slot in range(3)])
        monkeypatch.setattr(
            Pass,
            "_attend",
            lambda work, query, tiles, layer, shape: attend_torch(
                query,
                work.cache.layer(layer),
                tiles(query.shape[1] // work.cache.layer(layer).keys.shape[2]),
                shape,
            ),
        )
        three = torch.arange(3)
        with _ReadsNothing():
            runner.decode(three + 9, three, three * 0 + 3, 4)


def test_a_stated_length_is_kept() -> None:
    """MPT's own forward has no biases behind it; BLOOM's has them everywhere."""
    assert model("MPT").max_length == 512 and not model("BLOOM").states_length
    with pytest.raises(EngineError, match="longer than its 512 positions"):
        Runner(model("MPT"), slots=1, length=513)
