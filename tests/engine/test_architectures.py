"""Architectures that the engine does not know by name: it gives the states of transformers, or refuses."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from family_runs import wrong_by_any_rounding
from tiny import MLA, MOE, language_model

from nla_engine.engine import selfcheck
from nla_engine.engine.runner import Runner
from nla_engine.errors import CheckpointError, EngineError, UnsupportedModel
from nla_engine.models.decoder import values
from nla_engine.models.load import LanguageModel

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
}


def phi3() -> LanguageModel:
    rope = {**LONGROPE, "original_max_position_embeddings": 64}
    return language_model("Phi3Config", original_max_position_embeddings=64, rope_parameters=rope)


def states(lm: LanguageModel, ids: list[int]) -> torch.Tensor:
    """Final states of one sequence, by transformers alone."""
    lm.model.set_attn_implementation("eager")
    with torch.inference_mode():
        return lm.decoder(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0]


@pytest.mark.parametrize(
    ("make", "longest"),
    [
        (lambda: language_model("MistralConfig", sliding_window=16), 100),
        (lambda: language_model("Qwen2MoeConfig", **MOE, sliding_window=200), 100),
        (lambda: language_model("PhimoeConfig", num_local_experts=4, sliding_window=200), 100),
        (phi3, 60),
    ],
)
def test_every_sequence_of_a_pass_has_the_states_it_has_alone(
    make, longest: int, rng: np.random.Generator
) -> None:
    lm = make()
    given = [rng.integers(3, 250, size).tolist() for size in (20, longest, 1, 35)]
    with Runner(lm, slots=4, length=longest + 1) as runner:
        got = runner.prefill([(slot, 0, ids) for slot, ids in enumerate(given)])
    for own, ids in zip(got.split([len(ids) for ids in given]), given, strict=True):

        def apart(own=own, ids=ids) -> bool:
            want = states(lm, ids)
            return not float((own - want).norm() / want.norm()) < 1e-4

        assert not wrong_by_any_rounding(lm, apart)


def test_rotations_that_depend_on_the_longest_of_a_batch_are_refused() -> None:
    with pytest.raises(EngineError, match=r"Phi3Config: sequences of 64 tokens reach 64.*longrope"):
        Runner(phi3(), slots=2, length=64)  # a finished sequence may stay at position 64 for some steps
    lm = phi3()
    lm.config.rope_parameters = {"full_attention": lm.config.rope_parameters}
    with pytest.raises(EngineError, match="longrope"):
        Runner(lm, slots=2, length=64)
    for make, graphable in ((phi3, False), (lambda: language_model("MistralConfig"), True)):
        with Runner(make(), slots=2, length=63) as runner:
            runner.device, runner.reference = torch.device("cuda", 0), False
            assert runner.graphable == graphable


def test_a_window_that_no_sequence_fills_is_none() -> None:
    """Whatever the shared prefix: a slot has room for it, but its sequences may be short."""
    prefix = tuple(range(3, 43))
    lm = language_model("Qwen2MoeConfig", **MOE, sliding_window=60)
    with Runner(lm, slots=2, length=60, prefix=prefix) as runner:
        assert runner.cache.prefix_size == 40
    with pytest.raises(EngineError, match="mask alone"):
        Runner(lm, slots=2, length=61, prefix=prefix[:8])


@pytest.mark.parametrize(
    ("config", "more", "reason"),
    [
        ("Qwen2MoeConfig", {**MOE, "sliding_window": 16}, "block 0 attends to a part .* mask alone"),
        (
            "PhimoeConfig",
            {"num_local_experts": 4, "sliding_window": 16},
            "block 0 attends to a part .* mask alone",
        ),
    ],
)
def test_architectures_that_would_give_other_states_are_refused(config: str, more: dict, reason: str) -> None:
    lm = language_model(config, **more)
    own = states(lm, [5, 6, 7])
    with pytest.raises(EngineError, match=reason):
        Runner(lm, slots=2, length=100)
    assert torch.equal(states(lm, [5, 6, 7]), own)  # and the model is restored


def test_keys_of_another_size_than_the_configuration_names_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nla_engine.engine.compressed.FAMILIES", {})  # as if this attention were not known
    with pytest.raises(UnsupportedModel, match="are not the .* of its configuration"):
        Runner(language_model("DeepseekV3Config", **MLA), slots=2, length=100)


def test_blocks_that_differ_in_shape_are_refused_before_they_run() -> None:
    lm = language_model("LlamaConfig", head_dim=16)
    lm.config.per_layer_config = {1: {"num_attention_heads": 2}}
    with pytest.raises(
        UnsupportedModel, match="LlamaForCausalLM has blocks that differ in num_attention_heads"
    ):
        Runner(lm, slots=2, length=60)


def test_values_of_a_configuration_are_read_for_every_block() -> None:
    given = SimpleNamespace(hidden_size=64, num_key_value_heads=[4, 2, 4], head_dim=None)
    assert values(given, "hidden_size") == [64] and values(given, "num_key_value_heads") == [2, 4]
    assert values(given, "head_dim") == values(given, "num_attention_heads") == [None]


def test_a_forward_that_fails_is_an_architecture_that_is_not_supported() -> None:
    """In one line of our own: the library's advice is meant for authors of models."""
    lm = language_model("DeepseekV3Config", **MLA, head_dim=16)
    message = (
        r"DeepseekV3ForCausalLM cannot be run by the engine \(RuntimeError\): this arch\w+ is not supported$"
    )
    with pytest.raises(EngineError, match=message):
        Runner(lm, slots=2, length=60)
    with pytest.raises(
        CheckpointError, match=r"does not run on text alone \(RuntimeError\): .* not supported$"
    ):
        lm.truncated(0)


def test_memory_that_is_short_is_no_fault_of_the_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    lm = language_model("LlamaConfig")
    monkeypatch.setattr(selfcheck, "take_sample", fail)
    with pytest.raises(torch.OutOfMemoryError):
        Runner(lm, slots=2, length=60)
