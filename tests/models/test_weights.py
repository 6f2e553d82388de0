"""Weights are those of the configuration or refused by name; they reach a device one at a time."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer, save_ar, save_model

from nla_engine.errors import CheckpointError, EngineError
from nla_engine.models import weights
from nla_engine.models.load import load_model
from nla_engine.roundtrip.reconstruct import Reconstructor

CPU: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}


def edit(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def configure(directory: Path, **entries: Any) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def to_fp8(tensors: dict[str, torch.Tensor]) -> None:
    """As fp8 checkpoints are: a byte an element, and a scale beside."""
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.ones(1, 1)


def add(name: str, *shape: int) -> Callable[[Path], None]:
    return lambda directory: edit(directory, lambda tensors: tensors.update({name: torch.ones(shape)}))


def rename(directory: Path, old: str, new: str) -> None:
    (directory / old).rename(directory / new)


def shard(directory: Path) -> None:
    """Three files and an index, of which the second file is missing."""
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    index = {name: names[i % 3] for i, name in enumerate(tensors)}
    for file in names:
        save_file({key: value for key, value in tensors.items() if index[key] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (directory / names[1]).unlink()


Q = "model.layers.0.self_attn.q_proj"
FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "fp8 without its configuration": (
        lambda d: edit(d, to_fp8),
        r"28 tensors have no place in Qwen2ForCausalLM, the first is model\.layers\.0\.mlp\.down_proj\."
        r"weight_scale_inv: the weights look quantised, .* unquantised checkpoint",
    ),
    "stray adapter": (add(f"{Q}.lora_A.weight", 8, 64), r"lora_A\.weight: they belong to an adapter"),
    "a tensor more": (
        add("model.layers.0.self_attn.q_norm.weight", 16),
        r"1 tensors have no place .*q_norm\.weight: config\.json is not that of these weights",
    ),
    "a block more": (lambda d: configure(d, num_hidden_layers=3, layer_types=None), "no place .*layers.3"),
    "a block less": (
        lambda d: configure(d, num_hidden_layers=5, layer_types=None),
        r"weights are missing, the first is model\.layers\.4\.",
    ),
    "another width": (
        lambda d: configure(d, intermediate_size=80),
        r"12 weights have the wrong shape, the first is .*down_proj\.weight \(\[64, 96\], not \[64, 80\]\)",
    ),
    "adapter beside": (
        lambda d: (d / "adapter_config.json").write_text(
            '{"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": "x"}'
        ),
        r"has adapter_config\.json beside other weights \(model\.safetensors\): which of them is meant",
    ),
    "fp8": (lambda d: configure(d, quantization_config={"quant_method": "fp8"}), r"quantised \(fp8\)"),
    "gptq": (
        lambda d: configure(d, quantization_config={"quant_method": "gptq", "bits": 4}),
        r"quantised \(gptq, 4 bits\), which the engine does not run: give the unquantised checkpoint",
    ),
    "bitsandbytes": (
        lambda d: configure(d, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
        r"quantised \(bitsandbytes, 8 bits\)",
    ),
    "of its text model": (
        lambda d: configure(d, text_config={"quantization_config": {"quant_method": "awq", "bits": 4}}),
        r"quantised \(awq, 4 bits\)",
    ),
    "older entry": (lambda d: configure(d, compression_config={"format": "int-quantized"}), "int-quantized"),
    "pickled": (
        lambda d: rename(d, "model.safetensors", "pytorch_model.bin"),
        r"its weights are pytorch_model\.bin; only model\.safetensors.* are read: save the model as safetensors",
    ),
    "another name": (
        lambda d: rename(d, "model.safetensors", "consolidated.safetensors"),
        r"its weights are consolidated\.safetensors; only model\.safetensors",
    ),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "it holds no weights; .*: fetch it again"),
    "a shard is missing": (
        shard,
        r"1 of its 3 weight files are missing, the first is model-00002-of-00003\.safetensors: fetch it again",
    ),
    "a type that nobody knows": (
        lambda d: configure(d, model_type="qwen99"),
        r"is of type 'qwen99', which transformers [\d.]+ does not know: upgrade transformers",
    ),
    "no type": (lambda d: configure(d, model_type=None), r"config\.json: has no model_type"),
    "no language model": (
        lambda d: configure(d, model_type="vit"),
        r"is of type 'vit', of which transformers [\d.]+ has no decoder-only language model",
    ),
    "code of its own": (
        lambda d: configure(d, model_type="own", auto_map={"AutoModelForCausalLM": "own.Own"}),
        "brings code of its own, which is not run: read it, then pass --trust-remote-code",
    ),
    "weights under a name of their own, which are not there": (
        lambda d: configure(d, transformers_weights="other.safetensors"),
        r"1 of its 1 weight files are missing, the first is other\.safetensors: fetch it again",
    ),
    "weights that are named and pickled": (
        lambda d: configure(d, transformers_weights="pytorch_model.bin"),
        r"transformers_weights in config\.json is 'pytorch_model\.bin': it must be a \.safetensors file",
    ),
    "weights of another directory": (
        lambda d: configure(d, transformers_weights="../model.safetensors"),
        r"transformers_weights in config\.json is '\.\./model\.safetensors'",
    ),
    "an index of nothing": (
        lambda d: (
            rename(d, "model.safetensors", "x.safetensors"),
            (d / "model.safetensors.index.json").write_text('{"weight_map": {}}'),
        ),
        r"model\.safetensors\.index\.json has no weight_map",
    ),
    "no configuration": (
        lambda d: (d / "config.json").write_text("[1]"),
        "config.json: is not a JSON object",
    ),
    "a width that is a word": (
        lambda d: configure(d, hidden_size="wide"),
        r"config\.json: cannot be used .*'hidden_size'",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_with_a_checkpoint_is_said_in_one_line(tmp_path: Path, fault: str) -> None:
    directory = save_model(tmp_path / "model")
    damage, message = FAULTS[fault]
    damage(directory)
    with pytest.raises(CheckpointError, match=message) as error:
        load_model(str(directory), **CPU)
    assert str(directory) in str(error.value) and "\n" not in str(error.value)
    assert "whole?" not in str(error.value)


@pytest.mark.parametrize("headless", [False, True])
def test_weights_are_those_that_the_configuration_names(tmp_path: Path, headless: bool) -> None:
    """A single file or an index, whatever else lies beside."""
    directory = save_model(tmp_path)
    wanted = load_model(str(directory), **CPU).blocks.state_dict()
    shutil.copy(directory / "model.safetensors", directory / "own.safetensors")
    edit(directory, lambda tensors: [tensor.zero_() for tensor in tensors.values()])
    index = {"weight_map": dict.fromkeys(load_file(directory / "own.safetensors"), "own.safetensors")}
    (directory / "own.safetensors.index.json").write_text(json.dumps(index | {"metadata": {}}))
    for name in ("own.safetensors", "own.safetensors.index.json"):
        configure(directory, transformers_weights=name)
        found = load_model(str(directory), **CPU, headless=headless).blocks.state_dict()
        assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())


def test_names_that_transformers_leaves_out_on_purpose_are_no_fault(tmp_path: Path) -> None:
    """Old checkpoints hold buffers that models make themselves today."""
    directory = save_model(tmp_path)
    add("model.layers.0.self_attn.rotary_emb.inv_freq", 8)(directory)
    assert len(load_model(str(directory), **CPU).blocks) == 4


@pytest.mark.parametrize("package", ["peft", "no peft"])
def test_an_adapter_is_refused_whether_or_not_its_package_is_there(
    tmp_path: Path, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers goes by that: it merges nothing and says nothing where the package is absent."""
    monkeypatch.setattr(transformers.utils.import_utils, "is_peft_available", lambda: package == "peft")
    directory = save_ar(tmp_path, 2)
    (directory / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has adapter_config.json beside other weights"):
        Reconstructor.load(str(directory), **CPU)


def reconstructor(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Reconstructor:
    edit(directory, change)
    return Reconstructor.load(str(directory), **CPU)


def drop(part: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if part in name]:
            del tensors[name]

    return change


def test_an_ar_may_lack_what_stands_behind_its_last_block_and_nothing_else(tmp_path: Path) -> None:
    whole = Reconstructor.load(str(save_ar(tmp_path / "whole", 2)), **CPU)
    without = reconstructor(save_ar(tmp_path / "without", 2), drop("model.norm.weight"))
    assert torch.equal(without.reconstruct(["a text"]), whole.reconstruct(["a text"]))
    assert without.fingerprint() == whole.fingerprint()  # what a missing norm is filled with is not noise
    for part in ("embed_tokens", "layers.1.input_layernorm", "layers.2.mlp.down_proj"):
        with pytest.raises(CheckpointError, match=f"1 weights are missing, the first is .*{part}"):
            reconstructor(save_ar(tmp_path / part, 2), drop(part))


def test_a_missing_norm_that_the_blocks_read_is_no_final_norm(tmp_path: Path) -> None:
    """By its name it could be one."""
    config = transformers.GPTNeoXConfig(
        vocab_size=259, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    edit(tmp_path, drop("final_layer_norm"))
    assert len(load_model(str(tmp_path), **CPU, headless=True).blocks) == 2
    edit(tmp_path, drop("layers.1.post_attention_layernorm"))
    with pytest.raises(CheckpointError, match="2 weights are missing, the first is .*post_attention"):
        load_model(str(tmp_path), **CPU, headless=True)


def test_an_ar_may_hold_a_head_and_nothing_else_too_many(tmp_path: Path) -> None:
    directory = save_ar(tmp_path, 2)
    assert "lm_head.weight" in load_file(directory / "model.safetensors")
    assert load_model(str(directory), **CPU, headless=True).head is None
    add("model.layers.3.mlp.up_proj.weight", 96, 64)(directory)
    with pytest.raises(CheckpointError, match=r"1 tensors have no place in Qwen2Model, .*layers\.3"):
        load_model(str(directory), **CPU, headless=True)


def test_a_package_that_is_missing_and_memory_that_is_short_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = str(save_model(tmp_path))

    def fail(error: Exception) -> None:
        def load(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)

    fail(ImportError("\nThing requires the mamba_ssm library but it was not found\nSee the page"))
    with pytest.raises(
        CheckpointError, match=r"needs a package that is missing \(Thing requires .*\): install"
    ):
        load_model(directory, **CPU)
    for error in (torch.cuda.OutOfMemoryError("tried to allocate"), MemoryError()):
        fail(error)
        with pytest.raises(EngineError, match="does not fit the free memory of cpu") as raised:
            load_model(directory, **CPU)
        assert raised.value.exit_code == 1


def test_a_gpu_is_reached_without_accelerate_one_weight_at_a_time(tmp_path: Path) -> None:
    directories = [str(save_model(tmp_path / name, name)) for name in ("qwen2", "gemma3_text")]
    run = [sys.executable, str(Path(__file__).parents[1] / "landing.py"), *directories]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [load_model(each, **CPU).fingerprint() for each in directories]


def test_weights_land_as_a_model_gets_them_and_on_no_other_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(weights._ONE_BY_ONE, "given")
    landed: list[tuple[int, ...]] = []
    monkeypatch.setattr(torch.Tensor, "to", lambda weight, _: landed.append(tuple(weight.shape)) or weight)
    with weights._onto(torch.device("cuda")):
        assert os.environ[weights._ONE_BY_ONE] == "1"
        torch.nn.Linear(2, 3)
        torch.nn.Linear(2, 3, device="meta")  # not loaded yet
        other = threading.Thread(target=lambda: torch.nn.Linear(4, 5))
        other.start()
        other.join()
    torch.nn.Linear(6, 7)
    assert landed == [(3, 2), (3,)] and os.environ[weights._ONE_BY_ONE] == "given"
