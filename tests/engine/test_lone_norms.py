"""Norms in blocks that are not fused: each class that has a record computes what its record says."""

from __future__ import annotations

import pytest
import torch
import transformers
from family_runs import family_model

from nla_engine.engine.families import LONE_NORMS, lone_norms
from nla_engine.engine.fused import FusedNorm

FAMILIES = [
    *("GptOssConfig", "Qwen3NextConfig", "Qwen3_5TextConfig", "Qwen3_5MoeTextConfig", "Gemma4TextConfig"),
    *("Gemma4UnifiedTextConfig", "Llama4TextConfig", "DeepseekV2Config", "DeepseekV3Config"),
    *("MixtralConfig", "OlmoeConfig", "Qwen2MoeConfig", "Qwen3MoeConfig"),
    *("Glm4MoeLiteConfig", "YoutuConfig", "AXK1Config", "MiniCPM3Config", "LongcatFlashConfig"),
]


@pytest.mark.filterwarnings("ignore")
def test_each_class_computes_what_its_record_says(rng) -> None:
    seen = set()
    for name in FAMILIES:
        if not hasattr(transformers, name):
            pytest.skip(f"transformers {transformers.__version__} has no {name}")
        for module in lone_norms(family_model(getattr(transformers, name)).blocks):
            width = module.weight.shape[0]
            module.weight.data += torch.from_numpy(rng.normal(size=width)).float()
            states = torch.from_numpy(rng.normal(size=(1, 3, 2, 2 * width)) * 1e-3).float()[..., :width]
            torch.testing.assert_close(FusedNorm(module)(states), module(states))
            seen.add(type(module).__name__)
    assert seen == set(LONE_NORMS)
