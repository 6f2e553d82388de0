"""Tiny adapters for tests, in the layouts that their trainers write, and the merged weights by plain transformers."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from commands import LAYER, call, capture
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer, save_ar, save_av, save_model, write_prompts
from torch import nn
from transformers import AutoModelForCausalLM

PREFIX = "base_model.model."
TARGETS = ["q_proj", "v_proj", "down_proj"]


def whole_model(base: Path) -> Any:
    """The base as transformers loads it, float32."""
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def linear_names(base: Path, pattern: str) -> dict[str, tuple[int, int]]:
    """[out, in] of every linear layer whose name the pattern matches from its start to its end."""
    modules = whole_model(base).named_modules()
    return {
        name: (module.out_features, module.in_features)
        for name, module in modules
        if isinstance(module, nn.Linear) and re.fullmatch(pattern, name)
    }


def low_rank(shapes: dict[str, tuple[int, int]], rank: Callable[[str], int]) -> dict[str, torch.Tensor]:
    """Random A and B of each module, as large as the weights of the tiny models."""
    tensors = {}
    for name, (out, width) in shapes.items():
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank(name), width) * 0.2
        tensors[f"{name}.lora_B.weight"] = torch.randn(out, rank(name)) * 0.2
    return tensors


def peft_config(base: Path | str | None, **changes: Any) -> dict[str, Any]:
    """adapter_config.json as PEFT writes it: a key of every kind that must not matter, too."""
    return {
        "auto_mapping": None,
        "base_model_name_or_path": None if base is None else str(base),
        "bias": "none",
        "corda_config": None,
        "eva_config": None,
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": 6,
        "lora_bias": False,
        "lora_dropout": 0.05,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 4,
        "rank_pattern": {},
        "alpha_pattern": {},
        "revision": None,
        "target_modules": TARGETS,
        "target_parameters": None,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    } | changes


def save_adapter(
    directory: Path,
    base: Path,
    pattern: str = rf".*layers\.\d+\..*({'|'.join(TARGETS)})",
    rank: Callable[[str], int] = lambda name: 4,
    more: dict[str, torch.Tensor] | None = None,
    **changes: Any,
) -> dict[str, torch.Tensor]:
    """A PEFT directory over `base`; the tensors by the names that modules have in the base. changes: of its config."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = low_rank(linear_names(base, pattern), rank) | (more or {})
    save_file(
        {PREFIX + key: tensor for key, tensor in tensors.items()}, directory / "adapter_model.safetensors"
    )
    (directory / "adapter_config.json").write_text(json.dumps(peft_config(base, **changes)))
    return tensors


def merged(
    base: Path, tensors: dict[str, torch.Tensor], scaling: Callable[[str], float] = lambda name: 6 / 4
) -> Any:
    """The base with the products added by hand in float64, then rounded to float32."""
    model = whole_model(base).double()
    for name, module in model.named_modules():
        if f"{name}.lora_A.weight" in tensors:
            down, up = (tensors[f"{name}.lora_{part}.weight"].double() for part in "AB")
            module.weight.data += up @ down * scaling(name)
    return model.float()


def save_merged(directory: Path, model: Any, beside: Path) -> Path:
    """A merged model as transformers saves it, with the sidecar and the head of the adapter."""
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    for name in ("nla_meta.yaml", "value_head.safetensors"):
        if (beside / name).is_file():
            (directory / name).write_bytes((beside / name).read_bytes())
    return directory


def save_ar_adapter(directory: Path, base: Path, blocks: int, **changes: Any) -> dict[str, torch.Tensor]:
    """An AR's adapter with its head, as EasyNLA writes it; the LoRA's tensors by their names in the base."""
    directory.mkdir(parents=True, exist_ok=True)
    names = linear_names(base, rf"model\.(language_model\.)?layers\.[0-{blocks - 1}]\..*(q_proj|up_proj)")
    tensors = low_rank(names, lambda name: 4)
    saved = {
        "backbone." + key.replace("language_model.", "").replace(".weight", ".default.weight"): value
        for key, value in tensors.items()
    }
    width = whole_model(base).get_input_embeddings().weight.shape[1]
    saved["value_head.weight"] = torch.eye(width) + torch.randn(width, width) * 0.1
    save_file(saved, directory / "ar_lora_value_head.safetensors")
    meta = {
        "ar_num_layers": blocks,
        "lora_r": 4,
        "lora_alpha": 6,
        "quant": "none",
        "target_modules": r".*\.self_attn\.(q_proj)|.*\.mlp\.(up_proj)",
        "final_norm_stripped": True,
    } | changes
    (directory / "ar_meta.json").write_text(json.dumps(meta))
    return tensors


def save_tap_adapter(directory: Path, base: Path, taps: list[int], **changes: Any) -> dict[str, torch.Tensor]:
    """An AR's adapter with a head for each of several layers, as the trainer of multi-layer NLAs writes it."""
    directory.mkdir(parents=True, exist_ok=True)
    names = linear_names(base, rf"model\.layers\.[0-{max(taps)}]\..*(q_proj|up_proj)")
    tensors = low_rank(names, lambda name: 4)
    saved = {"backbone." + key.replace(".weight", ".default.weight"): value for key, value in tensors.items()}
    width = whole_model(base).get_input_embeddings().weight.shape[1]
    saved |= {f"heads.{tap}.weight": torch.eye(width) + torch.randn(width, width) * 0.1 for tap in taps}
    save_file(saved, directory / "ar_multitap.safetensors")
    meta = {
        "tap_layers": taps,
        "target_cols": ["activation_prev", "activation_centre", "activation_next"],
        "lora_r": 4,
        "lora_alpha": 6,
        "quant": "none",
        "strip_final_norm": True,
        "mse_scale": width**0.5,
        "d_model": width,
        "target_modules": r".*\.self_attn\.(q_proj)|.*\.mlp\.(up_proj)",
    } | changes
    (directory / "ar_meta.json").write_text(json.dumps(meta))
    return tensors


def edit(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of an adapter's file."""
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def configure(directory: Path, **entries: Any) -> None:
    """Change entries of adapter_config.json, or of ar_meta.json if that is the adapter's."""
    path = next(
        path for path in (directory / "adapter_config.json", directory / "ar_meta.json") if path.exists()
    )
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def save_adapted(root: Path) -> Path:
    """base, adapter (of the base), merged (both), av and ar (adapters), their merged forms, a store of the base."""
    base = save_model(root / "base")
    tensors = save_adapter(root / "adapter", base)
    save_merged(root / "merged", merged(base, tensors), root / "adapter")
    tensors = save_adapter(root / "av", base)
    shutil.copy(save_av(root / "released av", LAYER) / "nla_meta.yaml", root / "av")
    save_merged(root / "merged av", merged(base, tensors), root / "av")
    tensors = save_ar_adapter(root / "ar", base, LAYER + 1)
    shutil.copy(save_ar(root / "released ar", LAYER) / "nla_meta.yaml", root / "ar")
    model = merged(base, tensors, lambda name: 6 / 2)
    model.config.num_hidden_layers = LAYER + 1
    model.config.layer_types = model.config.layer_types[: LAYER + 1]
    model.model.layers = model.model.layers[: LAYER + 1]
    head = load_file(root / "ar" / "ar_lora_value_head.safetensors")["value_head.weight"]
    save_merged(root / "merged ar", model, root / "ar")
    save_file({"weight": head}, root / "merged ar" / "value_head.safetensors")
    shutil.copy(root / "ar" / "ar_meta.json", root / "merged ar")  # as the trainer's own tool leaves it
    write_prompts(root / "prompts.jsonl", 3)
    ran = call(*capture(root, root / "run.zarr", codec="bf16"))
    assert ran.code == 0, ran.err
    return root
