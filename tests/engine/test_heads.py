"""Attention of blocks with experts: one product and one launch, against transformers, one sequence at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from family_runs import check_rows, drawn, in_slots, named_model
from torch import nn

from nla_engine.engine.heads import EngineHeads, known_heads
from nla_engine.engine.runner import Runner
from nla_engine.ops.backends import Kernels

pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = ["GptOssConfig", "MixtralConfig", "Qwen2MoeConfig", "Qwen3MoeConfig"]


@pytest.mark.parametrize("prefix", [(), (5, 6, 7, 8)])
@pytest.mark.parametrize("name", NAMES)
def test_rows_and_tokens_are_those_of_transformers(name: str, prefix: tuple[int, ...], rng) -> None:
    lm = named_model(name)
    modules = known_heads(lm.blocks)
    assert len(modules) == len(lm.blocks)
    for module in modules:  # weights that matter
        for key, weight in module.named_parameters():
            if weight.ndim == 1:
                weight.data += torch.from_numpy(rng.normal(0, 0.2, len(weight))).float()
            assert weight.ndim < 3, key

    def taken(runner: Runner) -> None:
        assert all(isinstance(module.forward, EngineHeads) for module in modules)
        assert {module.forward.shape.sunk for module in modules} == {name == "GptOssConfig"}
        windows = {module.forward.shape.window for module in modules}
        assert windows == ({0, 8} if name == "GptOssConfig" else {0})

    asked = drawn(rng, (9, 3, 14, 5, 30), (6, 2, 4, 7, 3))
    found, _ = in_slots(lm, asked, inside=taken, prefix=prefix, kernels=Kernels("fused"))
    check_rows(lm, found, prefix)
    assert not any("forward" in vars(module) for module in modules)
    with Runner(lm, slots=2, length=20, kernels=Kernels("reference")):
        assert not any("forward" in vars(module) for module in modules)


def no_bias(module: Any) -> None:
    module.k_proj.bias = None


def more(module: Any) -> None:
    module.scaler = nn.Parameter(torch.ones(1))


def another_layer(module: Any) -> None:
    module.v_proj = type("Adapted", (nn.Linear,), {})(64, 32)


def both_ways(module: Any) -> None:
    module.is_causal = False


@pytest.mark.parametrize("change", [no_bias, more, another_layer, both_ways])
def test_a_module_with_other_parts_is_left_to_transformers(change: Callable[[Any], None]) -> None:
    lm = named_model("GptOssConfig")
    change(known_heads(lm.blocks)[1])
    assert len(known_heads(lm.blocks)) == len(lm.blocks) - 1
