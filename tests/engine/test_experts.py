"""Where a CUDA graph can hold the experts of a model. On a GPU `test_gpu_families` holds this against torch itself."""

from __future__ import annotations

import pytest
import torch
from family_runs import family_model
from transformers import LlamaConfig, MixtralConfig

from nla_engine.engine import experts
from nla_engine.engine.experts import host_experts, why_no_graph
from nla_engine.ops.cards import Card

pytestmark = pytest.mark.filterwarnings("ignore")


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
    lm = family_model(MixtralConfig)
    lm.model.to(dtype)
    lm.config._experts_implementation = how
    assert host_experts(lm.blocks) is read
    assert why_no_graph(lm.blocks) == ""  # there is none on a CPU
    monkeypatch.setattr(experts, "_device_type", lambda blocks: "cuda")
    assert ("slower" in why_no_graph(lm.blocks)) is read


def test_a_model_without_experts_reads_nothing() -> None:
    assert not host_experts(family_model(LlamaConfig).blocks)
