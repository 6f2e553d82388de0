"""Limits of a shape with experts in every block."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from nla_engine.bench.limits import ModelSize
from nla_engine.bench.shapes import SHAPES
from nla_engine.models.load import wrap_model


def test_limits_of_qwen3_30b_a3b() -> None:
    """By hand, from the published sizes: 30.5e9 parameters, of which a token takes 3.3e9."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SHAPES["qwen3-30b-a3b"].config(), dtype=torch.bfloat16)
    size = ModelSize.of(wrap_model(model, None, name="meta"))
    assert size.parameters + 151_936 * 2048 == pytest.approx(30.5e9, rel=2e-3)
    assert size.blocks * size.active + 2 * size.head_parameters == pytest.approx(3.35e9, rel=0.01)
    assert size.expert_parameters == 128 * 3 * 2048 * 768 and size.kv_bytes == 48 * 2 * 4 * 128 * 2
    assert size.parameters - size.read(1) == pytest.approx(48 * 120 * 3 * 2048 * 768)
