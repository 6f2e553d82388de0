"""Small models and checkpoints for tests: real architectures, random weights, a byte-level tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from nla_engine.models.load import LanguageModel, wrap_model

MARKER = "㈎"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ARCHITECTURES = ("qwen2", "qwen3", "llama", "gemma3_text", "gemma3")
D = 64
#: A chat template that prints its messages, and one that also asks for the time.
PRINTS = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
DATED = "{% if strftime_now is defined %}Today: {{ strftime_now('%d %b %Y %H:%M:%S') }}\n{% endif %}" + PRINTS
#: The configuration of `language_model`; MOE and MLA: what such architectures need besides it.
SHAPE = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "use_sliding_window": True,
    "max_window_layers": 1,
}
MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 24,
    "first_k_dense_replace": 2,
}


def byte_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """One token per byte, two ChatML tokens, the marker."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in ("<|im_start|>", "<|im_end|>")])
    backend.add_tokens([AddedToken(MARKER, normalized=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    if chat:
        tokenizer.chat_template = CHATML
    return tokenizer


def tiny_config(architecture: str, layers: int = 4, vocab: int = 259) -> Any:
    shape = {
        "vocab_size": vocab,
        "hidden_size": D,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    if architecture == "qwen2":
        return Qwen2Config(**shape)
    if architecture == "qwen3":
        return Qwen3Config(**shape, head_dim=32)
    if architecture == "llama":
        return LlamaConfig(**{**shape, "num_key_value_heads": 1}, head_dim=24)
    text = Gemma3TextConfig(
        **shape,
        head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(layers)],
        query_pre_attn_scalar=16,
    )
    if architecture == "gemma3_text":
        return text
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    return Gemma3Config(
        text_config=text.to_dict(), vision_config={**vision, "image_size": 28, "patch_size": 14}
    )


def tiny_model(architecture: str, layers: int = 4, seed: int = 0) -> Any:
    """A float32 causal LM whose weights are so large that its argmax does not depend on rounding."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture, layers)).float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(4)
    return model


def language_model(config: str, **more: Any) -> LanguageModel:
    """A model of a configuration class of transformers, float32."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**SHAPE | more))
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.data.mul_(3)
    return wrap_model(model.float().eval(), byte_tokenizer(), name=config)


def save_model(directory: Path, architecture: str = "qwen2", layers: int = 4, seed: int = 0) -> Path:
    tiny_model(architecture, layers, seed).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def save_av(directory: Path, layer: int, architecture: str = "qwen2", **changes: Any) -> Path:
    """An AV checkpoint. changes: entries of the sidecar to replace."""
    save_model(directory, architecture, seed=1)
    tokenizer = byte_tokenizer()
    sidecar = {
        "kind": "nla_model",
        "role": "av",
        "d_model": D,
        "extraction": {"injection_scale": 12.0, "mse_scale": 8.0},
        "extraction_layer_index": layer,
        "tokens": {
            "injection_char": MARKER,
            "injection_token_id": tokenizer.convert_tokens_to_ids(MARKER),
            "injection_left_neighbor_id": tokenizer.encode(">")[0],
            "injection_right_neighbor_id": tokenizer.encode("<")[0],
        },
        "prompt_templates": {"av": "Say what this is: <concept>{injection_char}</concept>"},
    }
    return write_sidecar(directory, sidecar | changes)


def save_ar(directory: Path, layer: int, architecture: str = "qwen2", **changes: Any) -> Path:
    """An AR checkpoint with layer + 1 blocks."""
    save_model(directory, architecture, layers=layer + 1, seed=2)
    sidecar = {
        "kind": "nla_model",
        "role": "ar",
        "d_model": D,
        "extraction": {"injection_scale": None, "mse_scale": 8.0},
        "extraction_layer_index": layer,
        "tokens": {"critic_suffix_ids": byte_tokenizer().encode("</text> <summary>")[-4:]},
        "prompt_templates": {"ar": "Summary of <text>{explanation}</text> <summary>"},
    }
    torch.manual_seed(3)
    save_file({"weight": torch.randn(D, D) / D**0.5}, directory / "value_head.safetensors")
    return write_sidecar(directory, sidecar | changes)


def write_sidecar(directory: Path, sidecar: dict[str, Any]) -> Path:
    (directory / "nla_meta.yaml").write_text(yaml.safe_dump(sidecar, allow_unicode=True), encoding="utf-8")
    return directory


def write_prompts(path: Path, count: int = 12) -> Path:
    """Chat prompts of unequal length, each with a field of its own."""
    records = [{"prompt": "ab " * (i * 5 % 7) + f"say {i}", "n": i} for i in range(count)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_records(directory: Path, records: list[Any]) -> Path:
    path = directory / "p.jsonl"
    path.write_text(
        "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8"
    )
    return path
