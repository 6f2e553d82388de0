"""Models whose blocks differ in what they keep or see (Gemma-4, Llama-4) in the engine, against plain transformers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import small_families
import torch
import transformers
from family_runs import alone, check_rows, drawn, in_slots, named_model, outcome

from nla_engine.engine.choose import open_generator
from nla_engine.engine.generator import Generator
from nla_engine.engine.request import Request
from nla_engine.engine.runner import Runner
from nla_engine.engine.slots import borrowed, cache_bytes, default_room, own_shapes, slot_size
from nla_engine.engine.stopping import StopAutomaton
from nla_engine.models.load import LanguageModel
from nla_engine.ops.backends import Kernels

pytestmark = pytest.mark.filterwarnings("ignore")
KINDS = ["sliding_attention", "full_attention"]
#: What to change in the small models of `small_families`, whose Gemma-4 is like the smallest of its family: embeddings
#: for each block, the last blocks borrow keys and values, and their MLPs are wider.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Gemma-4": ("Gemma4TextConfig", {}),
    "Gemma-4, dense": (
        "Gemma4TextConfig",
        {
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 0,
        },
    ),
    "Gemma-4, experts": (
        "Gemma4TextConfig",
        {
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
        },
    ),
    "Llama-4": ("Llama4TextConfig", {}),
    "Llama-4, whole": (
        "Llama4TextConfig",
        {"attention_chunk_size": None, "use_qk_norm": False, "layer_types": ["full_attention"] * 4},
    ),
}


@pytest.fixture(params=list(MODELS))
def lm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> LanguageModel:
    return made(request.param, monkeypatch)


def made(kind: str, monkeypatch: pytest.MonkeyPatch) -> LanguageModel:
    name, changes = MODELS[kind]
    monkeypatch.setitem(small_families.MORE, name, small_families.MORE[name] | changes)
    return named_model(name)


@pytest.mark.parametrize("passed", [5, 2048])
def test_a_shared_prefix_and_prompts_in_parts(
    lm: LanguageModel, passed: int, rng: np.random.Generator
) -> None:
    """The prefix ends within a chunk, and is longer than a window."""
    prefix = tuple(rng.integers(3, 250, 11).tolist())
    asked = drawn(rng, (1, 9, 3, 17, 2, 6), (12, 3, 7, 5, 9, 1))
    found, _ = in_slots(lm, asked, passed=passed, prefix=prefix)
    assert len(found) == len(asked)
    check_rows(lm, found, prefix)


def test_with_fused_norms_and_in_small_blocks(lm: LanguageModel, rng: np.random.Generator) -> None:
    """Sequences that lose their blocks to others are read again."""
    asked = drawn(rng, (9, 6, 11, 8), (12, 12, 12, 12))
    found, stepped_back = in_slots(lm, asked, slots=4, blocks=12, block=4, kernels=Kernels("fused"))
    assert stepped_back > 0 and len(found) == 4
    check_rows(lm, found)


def test_samples_of_one_prompt(lm: LanguageModel, rng: np.random.Generator) -> None:
    prompt = tuple(rng.integers(3, 250, 13).tolist())
    asked = [Request(0, prompt, 6), *(Request(i, prompt, 4 + i, again=True) for i in (1, 2, 3, 4))]
    found, _ = in_slots(lm, asked, slots=4, blocks=40, block=4)
    assert len({tuple(done.generated[:5].tolist()) for done in found}) == 1
    check_rows(lm, found)


@pytest.mark.parametrize("kind", ["Gemma-4, experts", "Llama-4, whole"])
def test_prompts_refill_and_ends(
    kind: str, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """The sweep runs the others so."""
    made(kind, monkeypatch)
    assert outcome(getattr(transformers, MODELS[kind][0]), rng) == ("fast", "")


@pytest.mark.parametrize("kernels", ["auto", "library"])
def test_vectors_enter(lm: LanguageModel, kernels: str, rng: np.random.Generator) -> None:
    """Against a hook on the embedding. Of Gemma-4's other embeddings the token at the place keeps its own."""
    prefix = tuple(rng.integers(3, 250, 7).tolist())
    asked = [
        replace(each, vectors=torch.from_numpy(rng.normal(size=(1, lm.d_model)) * 3).float(), places=(2,))
        for each in drawn(rng, (6, 6, 4, 3), (8, 4, 8, 5))
    ]
    generator = open_generator(
        lm,
        slots=3,
        length=30,
        prefix=prefix,
        kernels=Kernels(kernels),
        how={"max_new_tokens": 8, "stop": StopAutomaton([b""] * lm.vocab_size, ())},
    )
    with generator.runner:
        found = list(generator.run(iter(asked)))
    assert len(found) == len(asked) and isinstance(generator, Generator) == (kernels == "auto")
    for done in found:

        def enter(_module: Any, _inputs: Any, output: torch.Tensor, done: Any = done) -> torch.Tensor:
            output = output.clone()
            output[0, len(prefix) + 2] = done.request.vectors[0]
            return output

        hook = lm.embedding.register_forward_hook(enter)
        given = [*prefix, *done.request.token_ids]
        _, logits = alone(lm, [*given, *done.generated.tolist()])
        hook.remove()
        for at, token in enumerate(done.generated.tolist(), len(given) - 1):
            assert logits[at][token] >= logits[at].max() - 1e-3 * (1 + logits[at].abs().max())


@torch.inference_mode()
def test_cut_after_any_block(lm: LanguageModel, rng: np.random.Generator) -> None:
    """As a reconstructor is: some of Gemma-4's cuts end before blocks that borrow, and some behind one."""
    ids = rng.integers(3, 250, 21).tolist()
    for last in range(len(lm.blocks)):
        cut = lm.truncated(last)
        wanted = cut.decoder(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0]
        with Runner(cut, slots=1, length=30) as runner:
            states = runner.prefill([(0, 0, ids)])
        assert ((states - wanted).norm(dim=1) / wanted.norm(dim=1)).max() < 1e-4


def test_a_small_model_in_bfloat16_passes_its_check(lm: LanguageModel) -> None:
    """transformers' own rounding is known of every block, also of those that borrow what another has rounded."""
    lm.model.to(torch.bfloat16)
    with Runner(lm, slots=2, length=40):
        pass


def test_what_blocks_borrow_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = made("Gemma-4", monkeypatch)
    assert borrowed(lm) == {2: 0, 3: 1}
    assert own_shapes(lm) == {0: (2, 16), 1: (2, 32)}
    with Runner(lm, slots=3, length=30) as runner:
        assert [held.shape[2:] for held in runner.cache.keys] == [(2, 16), (2, 32)]
        assert runner.cache.layer(3).keys.data_ptr() == runner.cache.layer(1).keys.data_ptr()
        held = sum(each.nbytes for each in (*runner.cache.keys, *runner.cache.values))
    room = default_room(lm, 30, slots=3)
    each = slot_size(30, 0) * 2 * 4 * (2 * 16 + 2 * 32)
    assert cache_bytes(lm, room, 30) == 4 * each <= held
    monkeypatch.setattr("nla_engine.engine.slots.physical_bytes", lambda: 2 * 10 * each)
    assert default_room(lm, 30).slots == 9


def test_a_block_that_should_borrow_and_does_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = made("Gemma-4", monkeypatch)
    monkeypatch.setattr("nla_engine.engine.slots.borrowed", lambda lm: {3: 0, 2: 0})
    with pytest.raises(Exception, match="not supported"):
        Runner(lm, slots=2, length=30)


def test_attentions_scale_their_queries_again_when_a_runner_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = made("Llama-4", monkeypatch)
    scaled = [block.self_attn for block in lm.blocks if not block.self_attn.use_rope]
    assert scaled and all(each.attn_temperature_tuning for each in scaled)
    with Runner(lm, slots=2, length=30):
        assert not any(each.attn_temperature_tuning for each in scaled)
    assert all(each.attn_temperature_tuning for each in scaled)
