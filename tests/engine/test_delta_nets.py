"""Hybrids of gated delta nets and attention in the engine, against plain transformers, one sequence at a time: states
of slots that are refilled, shared, copied and lost, and prompts that are read in several passes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import transformers
from family_runs import check_replies, drawn, family_model, run_in_slots

from nla_engine.engine.delta import EngineDelta, of_like_length
from nla_engine.engine.request import Completion, Request
from nla_engine.engine.runner import Runner
from nla_engine.engine.slots import default_room, kv_shape, slot_size, state_shapes
from nla_engine.models.load import LanguageModel
from nla_engine.ops.backends import Kernels

FAMILIES = ["Qwen3NextConfig", "Qwen3_5TextConfig", "Qwen3_5MoeTextConfig"]
pytestmark = pytest.mark.filterwarnings("ignore")


def model(name: str) -> LanguageModel:
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return family_model(getattr(transformers, name))


def run(lm: LanguageModel, asked: list[Request], **more: Any) -> tuple[list[Completion], int]:
    """`run_in_slots`, by the engine's own delta nets."""
    return run_in_slots(lm, asked, lambda block: isinstance(block.linear_attn.forward, EngineDelta), **more)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("passed", [5, 2048])
def test_a_shared_prefix_and_prompts_in_parts(name: str, passed: int, rng: np.random.Generator) -> None:
    lm, prefix = model(name), tuple(rng.integers(3, 250, 7).tolist())
    asked = drawn(rng, (1, 9, 3, 17, 2, 6), (12, 3, 7, 5, 9, 1))
    found, _ = run(lm, asked, passed=passed, prefix=prefix)
    assert len(found) == len(asked)
    check_replies(lm, found, prefix)


@pytest.mark.parametrize("name", FAMILIES)
def test_with_fused_norms(name: str, rng: np.random.Generator) -> None:
    lm = model(name)
    found, _ = run(lm, drawn(rng, (9, 3, 5, 12), (5, 4, 8, 3)), kernels=Kernels("fused"))
    check_replies(lm, found)


@pytest.mark.parametrize("name", FAMILIES)
def test_samples_of_one_prompt_go_on_from_its_state(name: str, rng: np.random.Generator) -> None:
    lm, prompt = model(name), tuple(rng.integers(3, 250, 13).tolist())
    asked = [Request(0, prompt, 6), *(Request(i, prompt, 4 + i, again=True) for i in (1, 2, 3, 4))]
    found, _ = run(lm, asked, slots=4)
    assert len({tuple(done.generated[:5].tolist()) for done in found}) == 1
    check_replies(lm, found)


@pytest.mark.parametrize("name", FAMILIES[:2])
def test_sequences_that_step_back_are_read_again(name: str, rng: np.random.Generator) -> None:
    lm = model(name)
    asked = drawn(rng, (9, 6, 11, 8), (12, 12, 12, 12))
    found, stepped_back = run(lm, asked, slots=4, blocks=12, block=4)
    assert stepped_back > 0 and len(found) == 4
    check_replies(lm, found)


@pytest.mark.parametrize("name", FAMILIES[:1])
def test_states_count_as_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = model(name)
    shapes = state_shapes(lm)
    assert 0 < len(shapes) < len(lm.blocks)
    heads, size = kv_shape(lm.config)
    each = slot_size(100, 0) * 2 * (len(lm.blocks) - len(shapes)) * heads * size * 4
    for shape in shapes.values():
        each += 4 * (4 * 16 * 16) + 4 * 3 * (2 * 2 * 16 + 4 * 16)
        assert shape.state == (4, 16, 16) and shape.channels == 128
    monkeypatch.setattr("nla_engine.engine.slots.physical_bytes", lambda: 2 * 10 * each)
    assert default_room(lm, 100).slots == 9  # and the spare one
    with Runner(lm, slots=2, length=30) as runner:
        assert len(runner.cache.keys) == len(lm.blocks) - len(shapes)
        assert {len(states.recurrent) for states in runner.cache.states.values()} == {3}
    assert not any(
        "forward" in vars(block.linear_attn) for block in lm.blocks if hasattr(block, "linear_attn")
    )


def test_runs_are_padded_with_their_like(rng: np.random.Generator) -> None:
    runs, token = [], 0
    for slot, count in enumerate(rng.integers(1, 600, 40).tolist()):
        runs.append((token, count, slot % 30, 0))
        token += count
    groups = of_like_length(runs)
    assert sorted(run for group in groups for run in group) == runs
    for group in groups:
        counts = [-(-count // 64) for _, count, _, _ in group]
        assert max(counts) <= 2 * min(counts) and len({slot for _, _, slot, _ in group}) == len(group)
    order = [run for group in groups for run in group]
    for slot in range(10):
        assert [run[0] for run in order if run[2] == slot] == sorted(
            run[0] for run in order if run[2] == slot
        )
