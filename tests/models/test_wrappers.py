"""Models that see images too: their text model is loaded from the checkpoint of the whole, and captured like others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from family_runs import alone
from small_families import shrunk
from tiny import byte_tokenizer, write_prompts

from nla_engine.capture.run import run_capture
from nla_engine.config import CaptureOptions
from nla_engine.models.load import load_model
from nla_engine.store import CaptureStore

WRAPPERS = [
    *("Qwen2_5_VLConfig", "Qwen3VLConfig", "Mistral3Config", "Mistral3Config, Ministral3Config"),
    *("Gemma3Config", "Gemma4Config", "Llama4Config"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WRAPPERS)
def test_text_of_a_vision_family_is_captured(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    wrapper, _, text = name.partition(", ")
    config = shrunk(getattr(transformers, wrapper))
    if text:
        config = type(config)(
            text_config=shrunk(getattr(transformers, text)), vision_config=config.vision_config
        )
    model = transformers.AutoModelForImageTextToText.from_config(config).float().eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.data.mul_(3)
    model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    said: list[str] = []
    options = CaptureOptions(
        model=str(tmp_path / "base"),
        prompts=write_prompts(tmp_path / "prompts.jsonl", 3),
        layer=(1, 3),
        out=tmp_path / "run.zarr",
        max_new_tokens=5,
        positions="all",
        codec="bf16",
        device="cpu",
    )
    run_capture(options, announce=said.append)
    store = CaptureStore.open(tmp_path / "run.zarr")
    lm = load_model(str(tmp_path / "base"), device=torch.device("cpu"), dtype=torch.float32)
    assert lm.config is lm.model.config.get_text_config() and len(lm.blocks) == 4
    assert not any("slower" in line for line in said), "the engine's slots run it"
    for sequence in store.iter_sequences():
        rows, logits = alone(lm, sequence.tokens.tolist())
        for layer in (1, 3):
            kept = torch.from_numpy(store.layer(layer)[sequence.rows].astype(np.float32))
            torch.testing.assert_close(kept, rows[layer], atol=1e-2, rtol=1e-2)
        reply = sequence.tokens[sequence.prompt_size :]
        best = logits[sequence.prompt_size - 1 : -1].argmax(-1)
        assert best.tolist() == reply.tolist()
