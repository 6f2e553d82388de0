"""Experts by the engine against transformers' own; where a CUDA graph can hold them. On a GPU `test_gpu_families` holds
the latter against torch itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from family_runs import check_rows, drawn, family_model, in_slots, named_model
from interpreted import DEVICE, run_in_the_interpreter, runs_kernels, starts_the_interpreter
from kernel_checks import close
from small_families import MORE
from transformers import LlamaConfig, MixtralConfig

from nla_engine.engine import experts
from nla_engine.engine.experts import EngineExperts, host_experts, taken_experts, why_no_graph
from nla_engine.engine.runner import Runner
from nla_engine.ops import expert_order, expert_products
from nla_engine.ops.backends import Kernels
from nla_engine.ops.cards import Card

pytestmark = pytest.mark.filterwarnings("ignore")
#: By configuration, whether its small model's experts are computed by the engine, and their gate.
TAKEN = {
    "MixtralConfig": "silu",
    "GptOssConfig": "clamped",
    "Qwen3MoeConfig": "silu",
    "DeepseekV2Config": "silu",
    "DeepseekV3Config": "silu",
    "OlmoeConfig": "silu",
    "Lfm2MoeConfig": "silu",  # its activation is a function
    "AriaTextConfig": "silu",  # transposed, without biases
    "Gemma4TextConfig": "gelu",
}
TWO_BYTES = experts._DTYPES
LEFT = ["NemotronHConfig", "DeepseekV4Config"]  # no gate; a gate of its own


@pytest.fixture(autouse=True)
def any_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine leaves float32 to transformers, which is no reason not to test in it."""
    monkeypatch.setattr(experts, "_DTYPES", (torch.float32, torch.bfloat16))


def holder(name: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype = torch.float32) -> Any:
    """The experts of a block of a small model, with weights that make gates clamp."""
    if name == "Gemma4TextConfig":
        sized = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
        monkeypatch.setitem(MORE, name, MORE[name] | sized)
    modules = [module for module in named_model(name).blocks.modules() if experts._common(module)]
    if not modules:
        pytest.skip(
            f"transformers {transformers.__version__} computes the experts of {name} in a way of its own"
        )
    torch.manual_seed(0)
    for weight in modules[0].parameters():
        weight.data.normal_(0, 0.5)
    modules[0].config._experts_implementation = "grouped_mm"
    return modules[0].to(DEVICE, dtype)


def routed(module: Any, tokens: int, top: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States, chosen experts and their weights. The last expert is nobody's, the first one everybody's if top > 1."""
    count, d = module.down_proj.shape[0], module.down_proj.shape[2 if module.is_transposed else 1]
    chosen = torch.stack([torch.randperm(count - 1)[:top] for _ in range(tokens)])
    if top > 1:
        chosen = torch.stack(
            [torch.cat([torch.tensor([0]), 1 + torch.randperm(count - 2)[: top - 1]]) for _ in chosen]
        )
    weights = torch.rand(tokens, top) + 0.1
    return torch.randn(tokens, d).to(DEVICE), chosen.to(DEVICE), weights.to(DEVICE)


def truth_of(module: Any, *given: torch.Tensor) -> torch.Tensor:
    """By transformers' own loop over experts, in float64."""
    wide = copy.deepcopy(module).double()
    wide.config._experts_implementation = "eager"
    return wide(given[0].double(), given[1], given[2].double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "top"), [(1, 1), (300, 2), (37, 3)])
@pytest.mark.parametrize("name", TAKEN)
@torch.inference_mode()
def test_the_engine_computes_what_transformers_does(
    name: str, tokens: int, top: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = holder(name, monkeypatch, dtype)
    gate = experts._gate_of(module)
    assert gate is not None and gate.kind == TAKEN[name]
    states, chosen, weights = routed(module, tokens, top)
    states = states.to(dtype)
    found = EngineExperts(module, gate)(states, chosen, weights)
    own = module(states, chosen, weights)
    assert found.dtype == dtype and found.shape == own.shape
    close(found, own, truth_of(module, states, chosen, weights))


@runs_kernels
@pytest.mark.parametrize(("tokens", "top"), [(1, 1), (37, 3)])
@pytest.mark.parametrize("name", ["MixtralConfig", "GptOssConfig"])
@torch.inference_mode()
def test_kernels_compute_what_transformers_does(
    name: str, tokens: int, top: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (expert_order, expert_products):
        monkeypatch.setattr(module, "has_triton", lambda device: True)
    empty = torch.Tensor.new_empty

    def poisoned(self: torch.Tensor, *size: Any, **how: Any) -> torch.Tensor:
        made = empty(self, *size, **how)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    held = holder(name, monkeypatch)
    given = routed(held, tokens, top)
    found = EngineExperts(held, experts._gate_of(held))(*given)  # type: ignore[arg-type]
    close(found, held(*given), truth_of(held, *given))


@starts_the_interpreter
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__)


@pytest.mark.parametrize("name", LEFT)
def test_experts_of_another_kind_are_left_to_transformers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert experts._gate_of(holder(name, monkeypatch)) is None


def test_what_differs_from_the_common_way_is_left_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    module = holder("MixtralConfig", monkeypatch)
    assert experts._gate_of(module) is not None
    for name, value in (
        ("has_gate", False),
        ("has_post_expert_norm", True),
        ("_is_expert_parallel", True),
        ("has_bias", True),
        ("is_concatenated", False),
    ):
        with monkeypatch.context() as changed:
            changed.setattr(module, name, value, raising=False)
            assert experts._gate_of(module) is None, name
    module.config._experts_implementation = "eager"
    assert experts._gate_of(module) is None
    module.config._experts_implementation = "grouped_mm"
    monkeypatch.setattr(experts, "_DTYPES", TWO_BYTES)
    assert experts._gate_of(module) is None  # float32
    assert experts._gate_of(module.half()) is not None
    module.act_fn = torch.nn.ReLU()
    assert experts._gate_of(module) is None


@pytest.mark.parametrize("name", ["MixtralConfig", "GptOssConfig"])
def test_a_runner_takes_the_experts_and_gives_them_back(name: str, rng) -> None:
    lm = named_model(name)
    modules = [module for module, _ in taken_experts(lm.blocks)]
    assert len(modules) == len(lm.blocks)

    def taken(runner: Runner) -> None:
        assert all(isinstance(module.forward, EngineExperts) for module in modules)

    asked = drawn(rng, (9, 3, 14, 5), (6, 2, 4, 7))
    found, _ = in_slots(lm, asked, inside=taken, kernels=Kernels("fused"))
    check_rows(lm, found)
    assert not any("forward" in vars(module) for module in modules)
    with Runner(lm, slots=2, length=20, kernels=Kernels("reference")):
        assert not any("forward" in vars(module) for module in modules)


@pytest.mark.parametrize(
    ("dtype", "capability", "how", "read"),
    [
        (torch.bfloat16, (9, 0), "grouped_mm", False),
        (torch.bfloat16, (10, 0), "grouped_mm", False),
        (torch.bfloat16, (8, 0), "grouped_mm", True),
        (torch.bfloat16, (12, 0), "grouped_mm", True),
        (torch.float32, (9, 0), "grouped_mm", True),
        (torch.float32, (9, 0), "batched_mm", False),
        (torch.bfloat16, (9, 0), "eager", True),
    ],
    ids=str,
)
def test_a_loop_over_experts_reads_on_the_host(
    dtype: torch.dtype, capability: tuple[int, int], how: str, read: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts, "card_of", lambda device: Card(0, "a card", capability, 1 << 17))
    monkeypatch.setattr(experts, "_DTYPES", TWO_BYTES)
    lm = family_model(MixtralConfig)
    lm.model.to(dtype)
    lm.config._experts_implementation = how
    assert host_experts(lm.blocks) is read
    monkeypatch.setattr(experts, "has_triton", lambda device: True)
    assert host_experts(lm.blocks) is (read and (how == "eager" or dtype == torch.float32))
    monkeypatch.setattr(experts, "has_triton", lambda device: False)
    assert why_no_graph(lm.blocks) == ""  # there is none on a CPU
    monkeypatch.setattr(experts, "_device_type", lambda blocks: "cuda")
    assert ("slower" in why_no_graph(lm.blocks)) is read


def test_a_model_without_experts_reads_nothing() -> None:
    assert not host_experts(family_model(LlamaConfig).blocks)


@pytest.mark.parametrize("name", ["DbrxConfig", "LongcatFlashConfig", "Llama4TextConfig"])
def test_experts_of_a_kind_of_their_own_loop_on_the_host_unless_known_otherwise(name: str) -> None:
    lm = named_model(name)
    assert not any(experts._common(module) for module in lm.blocks.modules())
    assert host_experts(lm.blocks) is (name != "Llama4TextConfig")
