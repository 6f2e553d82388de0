"""Patched tokens against transformers' own forward with a hook: every architecture, layer, horizon and packing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import family_runs
import numpy as np
import pytest
import torch
from tiny import ARCHITECTURES, MLA, MOE, byte_tokenizer, language_model, tiny_model

from nla_engine.errors import EngineError
from nla_engine.models.load import LanguageModel, wrap_model
from nla_engine.ops.backends import Kernels
from nla_engine.referee import patcher as module
from nla_engine.referee.patcher import Patcher

FURTHER: dict[str, Callable[[], LanguageModel]] = {
    "gemma2": lambda: language_model(
        "Gemma2Config", head_dim=16, sliding_window=8, attn_logit_softcapping=3.0, query_pre_attn_scalar=16
    ),
    "gemma4": lambda: family_runs.named_model("Gemma4TextConfig"),
    "mistral": lambda: language_model("MistralConfig", sliding_window=8),
    "phi3": lambda: language_model("Phi3Config"),
    "qwen2_moe": lambda: language_model("Qwen2MoeConfig", **MOE, sliding_window=200),
    "deepseek": lambda: language_model("DeepseekV3Config", **MLA),
}


def model(name: str) -> LanguageModel:
    if name in FURTHER:
        return FURTHER[name]()
    return wrap_model(tiny_model(name), byte_tokenizer(), name=name)


def plainly(
    lm: LanguageModel, ids: np.ndarray, layer: int, position: int, vector: torch.Tensor
) -> torch.Tensor:
    """Logits [T, columns] of the whole model, by transformers alone."""

    def replace(_module: object, _inputs: object, output: object) -> object:
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[0, position] = vector
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    hook = lm.decoder.layers[layer].register_forward_hook(replace)
    try:
        with torch.inference_mode():
            return lm.model(input_ids=torch.from_numpy(ids.astype(np.int64))[None], use_cache=False).logits[0]
    finally:
        hook.remove()


def unlike(
    lm: LanguageModel, ids: np.ndarray, layer: int, p: int, vector: torch.Tensor, own: torch.Tensor
) -> bool:
    """Whether logits [1 + later, V] of the patched token p and those behind it differ from transformers' own."""
    want = plainly(lm, ids, layer, p, vector)[p : p + len(own)]
    error = (own[: len(want)] - want).norm(dim=1) / want.norm(dim=1).clamp(min=1)
    return not float(error.max()) < 1e-4


@pytest.mark.parametrize("kernels", ["auto", "fused"])
@pytest.mark.parametrize("name", [*ARCHITECTURES, *FURTHER])
def test_patched_tokens_are_those_of_transformers(
    name: str, kernels: str, rng: np.random.Generator, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_TOKENS", {"cpu": int(rng.integers(3, 40))})  # passes of every size
    monkeypatch.setattr(module, "_SCORES", {"cpu": int(rng.integers(1, 20_000))})
    lm = model(name)
    given = [rng.integers(3, 250, size).astype(np.int32) for size in (1, 13, 30, 7)]
    sequence = np.sort(rng.choice([0, 1, 2, 2, 2], 24))  # the last one has none
    position = np.array([int(rng.integers(0, len(given[s]))) for s in sequence])
    vectors = torch.randn(len(sequence), lm.d_model, generator=torch.Generator().manual_seed(seed)) * 4
    vectors[rng.integers(0, len(vectors))] = 0.0
    behind_all = 11  # more than a window of 8
    tried = ((0, behind_all), (len(lm.blocks) - 1, 2), (int(rng.integers(0, len(lm.blocks))), 0))
    for layer, later in tried:
        with Patcher(lm, layer, Kernels(kernels)) as patcher:
            patcher.check(given[2], np.arange(30), np.full(30, 5.0, np.float32), 30)
            states = patcher.run(patcher.read(given), sequence, position, vectors, later)
            logits = [lm.logits(each) for each in states]
        assert lm.config._attn_implementation == "eager"
        assert not any("forward" in vars(part) for part in lm.model.modules())
        for s, p, vector, own in zip(sequence, position, vectors, logits, strict=True):
            apart = partial(unlike, lm, given[s], layer, p, vector, own)
            assert not family_runs.wrong_by_any_rounding(lm, apart), (layer, s, p)


def test_queries_that_are_scaled_by_their_number_in_a_call_are_refused() -> None:
    with pytest.raises(
        EngineError, match=r"Llama4ForCausalLM cannot be patched: it scales queries .* supported"
    ):
        Patcher(family_runs.named_model("Llama4TextConfig"), 1)


def test_a_patched_token_leaves_the_others_alone(rng: np.random.Generator) -> None:
    """The keys and values of a sequence are the same after it was patched, and lanes do not see each other."""
    lm = model("qwen2")
    ids = rng.integers(3, 250, 20)
    with Patcher(lm, 1) as patcher:
        read = patcher.read([ids])
        held = {block: keys.clone() for block, keys in read.keys.items()}
        position = np.array([4, 9, 9, 15])
        zeros = np.zeros(4, np.int64)
        vectors = torch.randn(4, lm.d_model)
        together = patcher.run(read, zeros, position, vectors, 2)
        alone = torch.cat(
            [patcher.run(read, zeros[:1], position[i : i + 1], vectors[i : i + 1], 2) for i in range(4)]
        )
        assert all(torch.equal(held[block], read.keys[block]) for block in held) and set(held) == {2, 3}
        untouched = patcher.run(read, zeros, position, read.states[0, position], 2)
        whole = patcher.run(read, zeros, position, vectors * 1, 2)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(together, whole)
    assert float((untouched - together).norm()) > 1.0


def test_a_pass_is_as_large_as_it_may_be(rng: np.random.Generator) -> None:
    sequence = np.sort(rng.integers(0, 9, 200))
    padded, most = int(rng.integers(1, 60)), int(rng.integers(1, 30))

    def size(part: np.ndarray) -> int:
        _, counts = np.unique(part, return_counts=True)
        return len(counts) * counts.max()

    parts = list(module._pieces(sequence, padded, most))
    assert np.array_equal(np.concatenate([sequence[p] for p in parts]), sequence)
    for part in parts:
        held = sequence[part]
        assert len(held) <= most and (size(held) <= padded or len(held) == 1)
        more = sequence[part.start : part.stop + 1]
        assert part.stop == 200 or len(held) == most or size(more) > padded


def test_another_attention_than_that_of_transformers_is_refused(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, positions, norms = rng.integers(3, 250, 30), np.arange(30), np.full(30, 5.0, np.float32)
    lm = language_model("Qwen2MoeConfig", **MOE | {"sliding_window": 16})
    with Patcher(lm, 0) as patcher, pytest.raises(EngineError, match="mask of its own"):
        patcher.check(ids, positions, norms, 30)
    lm = model("llama")
    right = module.Lanes.attend

    def wrong(self: object, *args: torch.Tensor) -> torch.Tensor:
        return right(self, *args) * 1.05  # type: ignore[arg-type]

    monkeypatch.setattr(module.Lanes, "attend", wrong)
    with Patcher(lm, 0) as patcher, pytest.raises(EngineError, match="patched states differ from those of"):
        patcher.check(ids, positions, norms, 30)

    def fails(self: object, *args: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such shape")

    monkeypatch.setattr(module.Lanes, "attend", fails)
    message = r"LlamaForCausalLM cannot be patched \(RuntimeError\): this architecture is not supported"
    with Patcher(lm, 0) as patcher, pytest.raises(EngineError, match=message):
        patcher.check(ids, positions, norms, 30)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", ["BloomConfig", "GPTNeoConfig", "FalconConfig"])
def test_attention_that_a_module_computes_itself_is_refused(config: str, rng: np.random.Generator) -> None:
    """Even where no position could be compared."""
    more = {"attention_types": [[["global", "local"], 2]]} if config == "GPTNeoConfig" else {}
    lm = language_model(config, num_hidden_layers=4, **more)
    ids, none = rng.integers(3, 250, 30), np.zeros(0, np.int64)
    with (
        Patcher(lm, 0) as patcher,
        pytest.raises(EngineError, match="computes its attention itself, .* not supported$"),
    ):
        patcher.check(ids, none, np.zeros(0, np.float32), 30)
    assert lm.config._attn_implementation == "eager"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_on_a_gpu(name: str, rng: np.random.Generator, seed: int) -> None:
    """float32 as on a CPU; in bfloat16 not much further from float32 than transformers' own bfloat16 is."""
    given = [rng.integers(3, 250, size).astype(np.int32) for size in (13, 30, 7)]
    sequence = np.sort(rng.integers(0, 3, 24))
    position = np.array([int(rng.integers(0, len(given[s]))) for s in sequence])
    vectors = torch.randn(24, 64, generator=torch.Generator().manual_seed(seed)).bfloat16().float() * 4
    error = {}
    exact = model(name)
    exact.model.bfloat16().float()
    want = torch.stack(
        [plainly(exact, given[s], 1, p, v)[p] for s, p, v in zip(sequence, position, vectors, strict=True)]
    )
    for dtype in (torch.float32, torch.bfloat16):
        lm = model(name)
        lm.model.bfloat16().to("cuda", dtype)
        with Patcher(lm, 1) as patcher:
            patcher.check(given[1], np.arange(30), np.full(30, 5.0, np.float32), 30)
            states = patcher.run(patcher.read(given), sequence, position, vectors.cuda())
            own = lm.logits(states[:, 0]).float().cpu()
        error[dtype] = (own - want).norm(dim=1) / want.norm(dim=1)
    assert float(error[torch.float32].max()) < 1e-3
    lm = model(name)
    lm.model.bfloat16()
    rounded = torch.stack(
        [
            plainly(lm, given[s], 1, p, v.bfloat16())[p].float()
            for s, p, v in zip(sequence, position, vectors, strict=True)
        ]
    )
    noise = (rounded - want).norm(dim=1) / want.norm(dim=1)
    assert float(error[torch.bfloat16].median()) < 2 * float(noise.median()) + 4e-3
