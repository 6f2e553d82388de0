"""Writes the demo checkpoints in the NLA layout: model, tokenizer, `nla_meta.yaml`, `value_head.safetensors`.

Holds the prompt templates of the demo's verbalizer (AV) and reconstructor (AR) and the sidecar's keys.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

from nla_engine.demo.tokenizer import MARKER, encode, render, save_tokenizer

LAYER = 5  # K: the output of decoder block 5 of 0..7
INJECTION_SCALE = 16.0  # sqrt(d_model): one unit per channel, well above an embedding row and below a sink

AV_TEMPLATE = (
    "This vector is one thought of a small language model: <vector>{injection_char}</vector>\n"
    "Explain what it holds."
)
AR_SUFFIX = "</text> <vector>"
AR_TEMPLATE = "Explanation of one vector: <text>\n{explanation}\n" + AR_SUFFIX


def av_prompt_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], int]:
    """Ids of the AV's rendered prompt and the index of the marker in it. ValueError unless it occurs once."""
    ids = encode(tokenizer, render(tokenizer, AV_TEMPLATE.replace("{injection_char}", MARKER)))
    (marker_id,) = encode(tokenizer, MARKER)
    if ids.count(marker_id) != 1:
        raise ValueError(f"the AV prompt holds the marker {ids.count(marker_id)} times instead of once")
    return ids, ids.index(marker_id)


def ar_prompt(explanation: str) -> str:
    """The AR's prompt text; plain replacement, since explanations may contain braces."""
    return AR_TEMPLATE.replace("{explanation}", explanation)


def sidecar(tokenizer: PreTrainedTokenizerFast, role: str, d_model: int) -> dict[str, object]:
    """The content of `nla_meta.yaml` for role "av" or "ar"."""
    ids, marker = av_prompt_ids(tokenizer)
    tokens: dict[str, object] = {
        "injection_char": MARKER,
        "injection_token_id": ids[marker],
        "injection_left_neighbor_id": ids[marker - 1],
        "injection_right_neighbor_id": ids[marker + 1],
    }
    if role == "ar":
        tokens["critic_suffix_ids"] = encode(tokenizer, AR_SUFFIX)
    return {
        "kind": "nla_model",
        "role": role,
        "d_model": d_model,
        "extraction_layer_index": LAYER,
        "extraction": {
            "injection_scale": INJECTION_SCALE if role == "av" else None,
            "mse_scale": math.sqrt(d_model),
            "min_position": 0,  # its training rows are of every position
        },
        "tokens": tokens,
        "prompt_templates": {role: AV_TEMPLATE if role == "av" else AR_TEMPLATE},
    }


def save_checkpoint(
    directory: Path,
    model: Any,  # Qwen2ForCausalLM; its `to` is annotated for another argument
    tokenizer: PreTrainedTokenizerFast,
    role: str,
    value_head: torch.Tensor | None = None,
) -> None:
    """Write `model` (bfloat16) for role "base", "av" or "ar"; the AR also gets its value head [d, d]."""
    directory.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(directory)
    save_tokenizer(tokenizer, directory)
    if role == "base":
        return
    meta = sidecar(tokenizer, role, model.config.hidden_size)
    text = yaml.safe_dump(meta, allow_unicode=True, sort_keys=False, width=110)
    (directory / "nla_meta.yaml").write_text(text, encoding="utf-8")
    if value_head is not None:
        weight = value_head.detach().to("cpu", torch.bfloat16).contiguous()
        save_file({"weight": weight}, directory / "value_head.safetensors")
