"""Adapters in the commands: the same results as with merged weights, folders of a Hub repository, and refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from adapters import configure, edit, whole_model
from commands import LAYER, call, capture, check_refused, contents, roundtrip
from safetensors.torch import load_file
from tiny import D, byte_tokenizer, save_ar

from nla_engine.roundtrip.results import read_metadata
from nla_engine.store import CaptureStore


def explained(ran: Any, path: Path) -> dict[str, list[Any]]:
    assert ran.code == 0, ran.err
    return pq.read_table(path).to_pydict()


def test_a_round_trip_of_adapters_is_that_of_their_merged_weights(adapted: Path, tmp_path: Path) -> None:
    ran = call(*roundtrip(adapted, tmp_path / "x.parquet", ar_base=adapted / "base"))
    found = explained(ran, tmp_path / "x.parquet")
    ran = call(
        *roundtrip(adapted, tmp_path / "y.parquet", av=adapted / "merged av", ar=adapted / "merged ar")
    )
    wanted = explained(ran, tmp_path / "y.parquet")
    assert found["explanation"] == wanted["explanation"] and len(set(found["explanation"])) > 3
    np.testing.assert_allclose(found["cos"], wanted["cos"], atol=1e-5)
    metadata = read_metadata(tmp_path / "x.parquet")
    assert metadata["av_base"] == metadata["ar_base"] == str(adapted / "base")
    assert metadata["av_adapter"] != metadata["ar_adapter"]
    assert "av_base" not in read_metadata(tmp_path / "y.parquet")


def test_a_capture_of_an_adapter_is_that_of_its_merged_weights(adapted: Path, tmp_path: Path) -> None:
    for name in ("adapter", "merged"):
        command = capture(adapted, tmp_path / f"{name}.zarr", codec="bf16")
        command[1] = adapted / name
        ran = call(*command)
        assert ran.code == 0, ran.err
    found, wanted = (CaptureStore.open(tmp_path / f"{name}.zarr") for name in ("adapter", "merged"))
    assert (found.column("token_id")[:] == wanted.column("token_id")[:]).all()
    np.testing.assert_allclose(found.layer(LAYER)[:], wanted.layer(LAYER)[:], rtol=0.02, atol=0.02)
    assert found.provenance["base"] == str(adapted / "base") and "base" not in wanted.provenance
    ran = call("verify", tmp_path / "adapter.zarr", "--model", adapted / "adapter", "--device", "cpu")
    assert ran.code == 0, ran.out + ran.err
    ran = call("verify", tmp_path / "adapter.zarr", "--model", adapted / "base", "--device", "cpu")
    assert ran.code == 1


def test_a_base_that_is_given_is_used_and_verified(adapted: Path, tmp_path: Path) -> None:
    shutil.copytree(adapted / "adapter", tmp_path / "moved")
    configure(tmp_path / "moved", base_model_name_or_path="/there/is/none")
    command = capture(adapted, tmp_path / "run.zarr")
    command[1] = tmp_path / "moved"
    check_refused(
        call(*command), r"moved: is an adapter, and the base .*'?/there/is/none: no such .*; pass --base"
    )
    assert not (tmp_path / "run.zarr").exists()
    ran = call(*command, "--base", adapted / "base")
    assert ran.code == 0, ran.err
    ran = call("verify", tmp_path / "run.zarr", "--model", tmp_path / "moved", "--device", "cpu")
    assert ran.code == 0, ran.out + ran.err


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    return lambda root: edit(root / "av", change)


def config(**entries: Any) -> Callable[[Path], None]:
    return lambda root: configure(root / "av", **entries)


def cut_rank(held: dict[str, torch.Tensor]) -> None:
    for key, tensor in held.items():
        held[key] = (tensor[:2] if "lora_A" in key else tensor[:, :2]).contiguous()


def move(old: str, new: str) -> Callable[[Path], None]:
    def change(held: dict[str, torch.Tensor]) -> None:
        for key in [key for key in held if old in key]:
            held[key.replace(old, new)] = held.pop(key)

    return tensors(change)


def another_base(**changes: Any) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        model = whole_model(root / "base")
        other = type(model)(type(model.config)(**model.config.to_dict() | changes))
        other.save_pretrained(root / "other")
        byte_tokenizer().save_pretrained(root / "other")
        configure(root / "av", base_model_name_or_path=str(root / "other"))

    return change


def another_vocabulary(root: Path) -> None:
    """Of the same width and size."""
    shutil.copytree(root / "base", root / "other")
    byte_tokenizer().save_pretrained(root / "av")
    path = root / "other" / "tokenizer.json"
    held = json.loads(path.read_text())
    vocabulary = held["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(held))
    configure(root / "av", base_model_name_or_path=str(root / "other"))


def pickled(root: Path) -> None:
    held = load_file(root / "av" / "adapter_model.safetensors")
    torch.save(held, root / "av" / "adapter_model.bin")
    (root / "av" / "adapter_model.safetensors").unlink()


def pickled_head(root: Path) -> None:
    """An AR as a whole model whose head is pickled."""
    shutil.rmtree(root / "ar")
    save_ar(root / "ar", LAYER)
    torch.save(load_file(root / "ar" / "value_head.safetensors"), root / "ar" / "value_head.pt")
    (root / "ar" / "value_head.safetensors").unlink()


def adapter_on_adapter(root: Path) -> None:
    shutil.copytree(root / "av", root / "other")
    configure(root / "av", base_model_name_or_path=str(root / "other"))


def merged_ar(**changes: Any) -> Callable[[Path], None]:
    """An AR as a whole model that kept its ar_meta.json."""

    def change(root: Path) -> None:
        configure(root / "ar", **changes)
        shutil.copy(root / "ar" / "ar_meta.json", root / "merged")

    return change


Q = "model.layers.0.self_attn.q_proj"
FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no base named": (config(base_model_name_or_path=None), "does not name the base .*: pass --av-base with"),
    "another width": (
        another_base(hidden_size=32),
        r"is made for a weight \[.*64.*\], the base has \[.*32.*\]: .*other is not the base",
    ),
    "fewer blocks": (
        another_base(num_hidden_layers=3, layer_types=None),
        "layers.3.* is no module of Qwen2For",
    ),
    "another vocabulary": (
        another_vocabulary,
        "its tokenizer differs from that of its base .* in 2 tokens, 'a'",
    ),
    "an adapter as base": (adapter_on_adapter, "its base .* is an adapter itself"),
    "rank": (tensors(cut_rank), r"has tensors \[2, 96\] and \[64, 2\], adapter_config.json says rank 4"),
    "rank pattern": (config(rank_pattern={"q_proj": 8}), r"q_proj has tensors \[4, 64\] .* says rank 8"),
    "targets too few": (
        config(target_modules=["q_proj"]),
        "has a LoRA, and target_modules .* does not name it",
    ),
    "targets too many": (
        config(target_modules=["q_proj", "v_proj", "down_proj", "up_proj"]),
        "no tensors for 4 modules .* the first is model.layers.0.mlp.up_proj",
    ),
    "a module that is none": (move("q_proj", "query_proj"), "query_proj has a LoRA, and target_modules"),
    "of another model": (
        lambda root: (
            move("q_proj", "query_proj")(root),
            config(target_modules=r".*(query|v|down)_proj")(root),
        ),
        "query_proj is no module of Qwen2ForCausalLM in .*belongs to another base",
    ),
    "half": (
        tensors(lambda held: held.pop(f"base_model.model.{Q}.lora_A.weight")),
        "q_proj has one half of its LoRA",
    ),
    "stray tensor": (
        tensors(lambda held: held.update({"base_model.model.lm_head.weight": torch.ones(259, D)})),
        "lm_head.weight is a whole tensor, and modules_to_save .* does not name its module",
    ),
    "modules to save that are absent": (
        config(modules_to_save=["lm_head"]),
        "no tensors for lm_head, which modules",
    ),
    "whole module of another vocabulary": (
        lambda root: (
            edit(
                root / "av", lambda held: held.update({"base_model.model.lm_head.weight": torch.ones(9, D)})
            ),
            configure(root / "av", modules_to_save=["lm_head"]),
        ),
        r"lm_head.weight is \[9, 64\], the base has \[259, 64\]",
    ),
    "NaN": (
        tensors(lambda held: held[f"base_model.model.{Q}.lora_B.weight"].fill_(torch.nan)),
        "holds NaN or Inf",
    ),
    "DoRA": (config(use_dora=True), "use_dora is True, which plain LoRA does not have"),
    "DoRA's tensors": (
        tensors(lambda held: held.update({f"base_model.model.{Q}.lora_magnitude_vector": torch.ones(64)})),
        "lora_magnitude_vector is no tensor of a plain LoRA",
    ),
    "bias of the LoRA": (config(lora_bias=True), "lora_bias is True"),
    "biases": (config(bias="all"), "bias is 'all': trained biases are not merged"),
    "AdaLoRA": (config(peft_type="ADALORA"), "peft_type is ADALORA: only LORA is merged"),
    "replicated layers": (config(layer_replication=[[0, 4], [2, 4]]), "layer_replication is"),
    "a start that changes the base": (
        config(init_lora_weights="pissa"),
        "init_lora_weights is 'pissa', which",
    ),
    "a key that nobody knows": (config(use_zeta={"a": 1}), "use_zeta is .* may change the weights"),
    "a rank that is a word": (config(r="four"), "r is 'four', not a whole number"),
    "a pattern that is none": (config(target_modules="(q_proj"), "target_modules is .*not a pattern"),
    "pickled": (
        pickled,
        r"no adapter_model.safetensors .*adapter_model.bin, which is pickled.*: save the adapter as",
    ),
    "damaged": (
        lambda root: (root / "av" / "adapter_model.safetensors").write_bytes(b"\x08\x00"),
        "adapter_model.safetensors: cannot be read",
    ),
    "a pickled head": (
        pickled_head,
        r"value_head.pt is pickled.*: convert it with python -m nla_engine.models.convert_head .*\.pt .*tensors$",
    ),
    "final norm": (
        lambda root: configure(root / "ar", final_norm_stripped=False),
        "final_norm_stripped is not true: this AR applies its base's final norm, which is not supported",
    ),
    "blocks of another layer": (
        lambda root: configure(root / "ar", ar_num_layers=4),
        r"no tensors for 2 modules .* the first is model\.layers\.3\.self_attn\.q_proj",
    ),
    "more blocks than the base": (
        lambda root: configure(root / "ar", ar_num_layers=9),
        "has 4 blocks, 9 are needed: give the base of that depth",
    ),
    "two adapters in one directory": (
        lambda root: shutil.copy(root / "ar" / "ar_lora_value_head.safetensors", root / "av"),
        r"av: has adapter_config.json beside other weights \(ar_lora_value_head.safetensors\): which of them",
    ),
    "a head without its description": (
        lambda root: (root / "ar" / "ar_meta.json").unlink(),
        "ar: has ar_lora_value_head.safetensors without ar_meta.json",
    ),
    "a merged AR with the final norm": (
        merged_ar(final_norm_stripped=False),
        "merged: ar_meta.json: final_norm_str",
    ),
    "a merged AR of other blocks": (merged_ar(ar_num_layers=4), "says 4 blocks, the model has 3"),
    "an AR's key that nobody knows": (lambda root: configure(root / "ar", zeta=1), "zeta is not known"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_with_an_adapter_is_said_in_one_line(adapted: Path, tmp_path: Path, fault: str) -> None:
    for name in ("av", "ar", "base"):
        shutil.copytree(adapted / name, tmp_path / name)
    shutil.copytree(adapted / "merged ar", tmp_path / "merged")
    damage, message = FAULTS[fault]
    damage(tmp_path)
    before = contents(tmp_path)
    ar = tmp_path / ("merged" if "merged" in fault else "ar")
    ar_base = None if (ar / "config.json").exists() else adapted / "base"
    command = roundtrip(tmp_path, tmp_path / "x.parquet", adapted / "run.zarr", ar=ar, ar_base=ar_base)
    check_refused(call(*command), message)
    assert contents(tmp_path) == before


def test_bases_beside_whole_weights_and_missing_ones_are_refused(adapted: Path, tmp_path: Path) -> None:
    command = roundtrip(adapted, tmp_path / "x.parquet")
    check_refused(call(*command), "ar_meta.json does not name the base of this adapter: pass --ar-base")
    command = roundtrip(adapted, tmp_path / "x.parquet", av=adapted / "merged av", av_base=adapted / "base")
    check_refused(
        call(*command), "--av-base .*merged av is no adapter, it has weights of its own: leave --av-base"
    )
    command = capture(adapted, tmp_path / "run.zarr")
    command[1] = adapted
    check_refused(call(*command), "has no config.json: .*, such as its folder adapter$")
    assert not list(tmp_path.iterdir())
