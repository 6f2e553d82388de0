"""Limits of a model whose blocks differ, and borrow keys and values from one another."""

from __future__ import annotations

import pytest
from family_runs import named_model
from small_families import MORE

from nla_engine.bench.limits import ModelSize


@pytest.mark.filterwarnings("ignore")
def test_limits_count_what_blocks_borrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: two blocks see a window, and two everything; each reads keys and values, its own or another's."""
    size = ModelSize.of(named_model("Gemma4TextConfig"))
    sliding, full = 2 * 2 * 2 * 16 * 4, 2 * 2 * 2 * 32 * 4
    assert size.kv_bytes == sliding + full and size.windowed_bytes == sliding and size.window == 8
    assert size.kept_bytes(3, 50, 0) == 3 * (8 * sliding + 50 * full)
    experts = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
    monkeypatch.setitem(MORE, "Gemma4TextConfig", MORE["Gemma4TextConfig"] | experts)
    size = ModelSize.of(named_model("Gemma4TextConfig"))
    assert size.chosen == 0.5 and size.expert_parameters == 4 * 3 * 64 * 32
    assert size.parameters - size.read(1) == 4 * 0.5 * size.expert_parameters
