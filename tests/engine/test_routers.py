"""Routers by the engine against transformers' own: the logits, the chosen experts and their weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_runs import check_rows, drawn, in_slots, named_model
from torch import nn

from nla_engine.engine import routers
from nla_engine.engine.routers import EngineRouter, known_routers
from nla_engine.engine.runner import Runner
from nla_engine.ops.backends import Kernels

pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = [
    *("GptOssConfig", "Qwen2MoeConfig", "Qwen3MoeConfig", "Qwen3NextConfig", "Qwen3_5MoeTextConfig"),
    *("OlmoeConfig", "MixtralConfig", "DeepseekV2Config"),
]


def router(name: str) -> Any:
    module, _ = known_routers(named_model(name).blocks)[0]
    torch.manual_seed(0)
    for weight in module.parameters():
        weight.data.normal_(0, 0.3)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_each_class_routes_as_its_record_says(name: str, dtype: torch.dtype) -> None:
    module = router(name).to(dtype)
    for renormed in (False, True):
        if hasattr(module, "norm_topk_prob"):
            module.norm_topk_prob = renormed
        how = routers._routing(module)
        assert how is not None
        states = torch.randn(40, module.weight.shape[1]).to(dtype)
        found, own = EngineRouter(module, how)(states), module(states)
        assert [each.dtype for each in found] == [each.dtype for each in own]
        assert torch.equal(found[0], own[0])
        # Equal logits may come in any order, and of equal ones at the end any may be left out.
        values = [logits.gather(1, chosen).sort(1).values for logits, _, chosen in (found, own)]
        assert torch.equal(*values)
        limit = 1e-5 if found[1].dtype == torch.float32 else 1e-2
        torch.testing.assert_close(found[1].sort(1).values, own[1].sort(1).values, rtol=limit, atol=limit)


def test_every_record_has_a_model_here() -> None:
    seen = {type(module).__name__ for name in NAMES for module, _ in known_routers(named_model(name).blocks)}
    assert seen == set(routers._KNOWN)


def test_others_are_left_to_transformers() -> None:
    module = router("DeepseekV2Config")
    module.topk_method = "group_limited_greedy"
    assert routers._routing(module) is None
    module = router("Qwen3MoeConfig")
    module.extra = nn.Parameter(torch.zeros(1))
    assert routers._routing(module) is None
    assert not known_routers(named_model("DeepseekV3Config").blocks)


@pytest.mark.parametrize("name", ["GptOssConfig", "DeepseekV2Config", "Qwen3_5MoeTextConfig"])
def test_a_runner_takes_the_routers_and_gives_them_back(name: str, rng) -> None:
    lm = named_model(name)
    modules = [module for module, _ in known_routers(lm.blocks)]
    assert modules

    def taken(runner: Runner) -> None:
        assert all(isinstance(module.forward, EngineRouter) for module in modules)

    found, _ = in_slots(lm, drawn(rng, (9, 3, 14), (6, 2, 4)), inside=taken, kernels=Kernels("fused"))
    check_rows(lm, found)
    assert not any("forward" in vars(module) for module in modules)
