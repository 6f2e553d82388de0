"""Families with sinks, gated delta nets, compressed keys, chunks, experts, and blocks that differ, on a GPU: kernels
and CUDA graphs against plain transformers there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from family_runs import check_rows, drawn, fault, in_slots, misplaced, natural_ends, requests, run
from small_families import small_model
from tiny import byte_tokenizer

from nla_engine.engine import experts
from nla_engine.engine.experts import host_experts
from nla_engine.engine.latent import EngineLatent
from nla_engine.engine.runner import Runner
from nla_engine.models.load import LanguageModel, wrap_model

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]


def model(name: str, dtype: torch.dtype) -> LanguageModel:
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    made: Any = small_model(getattr(transformers, name)).to("cuda", dtype)
    return wrap_model(made, byte_tokenizer(), name=name)


@pytest.mark.parametrize(
    "name",
    [
        *("GraniteSWAConfig", "Qwen3_5TextConfig", "Gemma4TextConfig", "Llama4TextConfig", "MixtralConfig"),
        *("DeepseekV2Config", "MiniCPM3Config"),
    ],
)
def test_rows_and_tokens_in_float32(name: str, rng: np.random.Generator) -> None:
    lm = model(name, torch.float32)
    asked = requests(rng)
    found, way = run(lm, asked)
    assert way == "fast" and len(found) == len(asked)
    eos = natural_ends(found)
    ended, _ = run(lm, asked, eos=eos)
    for completions, ends in ((found, ()), (ended, eos)):
        for done in completions.values():
            assert not (wrong := misplaced(done, ends) or fault(lm, done)), (
                f"request {done.request.id}: {wrong}"
            )


@pytest.mark.parametrize(
    "name",
    [
        *("GptOssConfig", "GraniteMoeSWAConfig", "Qwen3NextConfig", "Qwen3_5TextConfig"),
        *("Qwen3_5MoeTextConfig", "Gemma4TextConfig", "Llama4TextConfig"),
        *("DeepseekV2Config", "DeepseekV3Config", "Glm4MoeLiteConfig"),
        *("MixtralConfig", "Qwen2MoeConfig", "Qwen3MoeConfig", "OlmoeConfig", "AriaTextConfig"),
        *("DbrxConfig", "LongcatFlashConfig"),
    ],
)
def test_in_bfloat16_the_engine_is_as_right_as_transformers(name: str, rng: np.random.Generator) -> None:
    """The runner's own check holds every block in prompts, decode steps and a graph against transformers."""
    lm = model(name, torch.bfloat16)
    with Runner(lm, slots=3, length=43, prefix=(5, 6, 7)) as runner:
        assert runner.graphable is not host_experts(lm.blocks) and not runner.reference
    asked = requests(rng)
    found, way = run(lm, asked)
    again, _ = run(lm, asked)
    assert way == "fast" and len(found) == len(asked)
    for id_, done in found.items():
        assert done.generated.tolist() == again[id_].generated.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_graph_holds_experts_where_their_product_is_a_kernel(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine's own kernel in bfloat16. By torch itself it depends on the card, and what is no kernel reads on the
    host where each expert's tokens end, so nothing can be captured."""
    lm = model("MixtralConfig", dtype)
    rows, weight = (
        torch.randn(8, 64, device="cuda", dtype=dtype),
        torch.randn(4, 64, 32, device="cuda").to(dtype),
    )
    ends = torch.tensor([2, 2, 7, 8], dtype=torch.int32, device="cuda")
    torch.nn.functional.grouped_mm(rows, weight, offs=ends)
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            torch.nn.functional.grouped_mm(rows, weight, offs=ends)
        captured = True
    except RuntimeError:
        captured = False
    own = dtype == torch.bfloat16
    with Runner(lm, slots=2, length=20) as runner:
        assert runner.graphable is (captured or own)
    assert host_experts(lm.blocks) is not (captured or own)
    monkeypatch.setattr(experts, "has_triton", lambda device: False)
    assert host_experts(lm.blocks) is not captured


def taken_over(runner: Runner) -> None:
    assert all(isinstance(block.self_attn.forward, EngineLatent) for block in runner.lm.blocks)


@pytest.mark.parametrize("heads", [4, 20, 64])
@pytest.mark.parametrize("passed", [512, 8192])
def test_compressed_keys_of_long_sequences(heads: int, passed: int, rng: np.random.Generator) -> None:
    """More places than one program reads in a decode step, of latents as wide as DeepSeek's, beside a short one."""
    sizes = {
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "head_dim": 64,
        "qk_nope_head_dim": 32,
        "qk_head_dim": 96,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "hidden_size": 8 * heads,
        "max_position_embeddings": 8192,
        "num_hidden_layers": 2,
    }
    made: Any = small_model(transformers.DeepseekV3Config, **sizes).to("cuda")
    lm = wrap_model(made, byte_tokenizer(), name="long")
    prefix = tuple(rng.integers(3, 250, 70).tolist())
    asked = drawn(rng, (4300, 9, 5200), (12, 12, 7))
    more = {"passed": passed, "length": 5400, "prefix": prefix}
    found, _ = in_slots(lm, asked, inside=taken_over, **more)
    check_rows(lm, found, prefix)
