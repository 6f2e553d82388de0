"""What a capture does first: every check comes before a store is made or replaced."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_capture import options
from tiny import byte_tokenizer
from transformers import AutoModelForCausalLM, Qwen2MoeConfig

from nla_engine.capture.run import run_capture
from nla_engine.errors import EngineError
from nla_engine.models.load import LanguageModel, wrap_model
from nla_engine.store import CaptureStore


def windowed() -> LanguageModel:
    """Its mask alone shows a window of 16 tokens, which the engine refuses for longer sequences."""
    shape = dict.fromkeys(("num_experts", "num_attention_heads", "num_key_value_heads"), 4)
    sizes = dict.fromkeys(("hidden_size", "moe_intermediate_size", "shared_expert_intermediate_size"), 64)
    window = {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1}
    config = Qwen2MoeConfig(vocab_size=259, num_hidden_layers=2, **shape, **sizes, **window)
    return wrap_model(AutoModelForCausalLM.from_config(config).float(), byte_tokenizer(), name="windowed")


def test_what_the_length_rules_out_is_refused_before_a_store_is_made(tmp_path: Path, monkeypatch) -> None:
    """Even if the prompts alone, on which capture calibrates first, are short enough."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a short one"}\n')
    lm, given = windowed(), options(tmp_path, layer=(1,), chat=False, max_new_tokens=2)
    run_capture(given, lm=lm)
    before = CaptureStore.open(given.out).sequence(0).tokens
    with pytest.raises(EngineError, match="mask alone"):
        run_capture(replace(given, max_new_tokens=40, overwrite=True, kernels="reference"), lm=lm)
    assert np.array_equal(
        CaptureStore.open(given.out).sequence(0).tokens, before
    )  # the old store is untouched

    def no_room(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError("no room")

    monkeypatch.setattr("nla_engine.capture.setup.Setup._try", no_room)
    elsewhere = replace(given, out=str(tmp_path / "other.zarr"), batch_size=1)
    with pytest.raises(EngineError, match="does not fit the free GPU memory"):
        run_capture(elsewhere, lm=lm)
    assert not Path(elsewhere.out).exists()
