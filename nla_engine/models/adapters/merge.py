"""Merge an adapter into its base on loading: W + (B @ A) * scaling, in float32, one weight at a time.

The sum starts from the base's weight as its file holds it, so a bfloat16 model is the float32 merge, rounded once.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D

from nla_engine.errors import CheckpointError
from nla_engine.models.adapters.tensors import AdapterFile, Change
from nla_engine.models.checkpoint import CONFIG, read_json, weight_paths
from nla_engine.models.cut import is_behind

#: The text model in the name of a module, whatever a class or an older library calls the models around it.
_TEXT = re.compile(
    r"(?P<before>(?:(?:model|language_model|text_model)\.)*)(?P<inside>(?:layers\.\d+|embed_tokens)(?:\..+)?)"
)
_HEAD = re.compile(r"(?:(?:model|language_model)\.)*lm_head")
_TAIL = re.compile(r".*?((?:layers\.\d+\..+)|(?:embed_tokens|lm_head)\.weight)")


def merge(
    model: Any, base: Path, file: AdapterFile, *, headless: bool, depth: int, blocks: int | None = None
) -> None:
    """Merge the adapter `file` into `model`, which holds the weights of the directory `base`.

    headless: the model has no head, so what the adapter has for one is left out
    depth: blocks of the base; the model may have fewer, and what the adapter has for the others is left out
    blocks: how many of the model's blocks run, if not all; only for these does the adapter need its tensors
    Raises CheckpointError for tensors that belong to no module or do not fit it; the model is then of no use.
    """
    places = _Places(model, headless, depth)
    found: dict[nn.Module, str] = {}
    for name in file.changes:
        module = places.find(name)
        if module is None:
            if places.is_left_out(name):
                continue
            raise CheckpointError(
                f"{file.path}: {name} is no module of {type(model).__name__} in {base}: "
                "this adapter belongs to another base: give the one that it was trained on"
            )
        if module in found:
            raise CheckpointError(f"{file.path}: {found[module]} and {name} are one module: fetch it again")
        found[module] = name
    for module, name in found.items():
        _check_shapes(file, base, name, file.changes[name], module)
    _check_targets(file, places, found, blocks)
    stored = _Stored(base)
    with torch.no_grad():
        for module, name in found.items():
            _change(file, stored, name, module, places.tied)


def _change(file: AdapterFile, stored: _Stored, name: str, module: nn.Module, tied: set[nn.Module]) -> None:
    change = file.changes[name]
    for parameter, key in change.whole.items():
        _set(module, parameter, file.read(key, module.get_parameter(parameter).device), tied)
    if change.down is None:
        return
    weight = module.get_parameter("weight")
    whole = change.whole.get("weight")
    merged = stored.exact(name, weight) if whole is None else file.read(whole, weight.device)
    delta = file.delta(name, weight.device)
    if isinstance(module, nn.Embedding | Conv1D):
        delta = delta.T
    _set(module, "weight", merged.add_(delta), tied)


def _set(module: nn.Module, parameter: str, value: torch.Tensor, tied: set[nn.Module]) -> None:
    """Give a parameter its new value, in its own dtype. A weight that another module shares is no longer shared."""
    held = module.get_parameter(parameter)
    if module in tied:
        tied.clear()
        setattr(module, parameter, nn.Parameter(value.to(held.dtype), requires_grad=False))
    else:
        held.data.copy_(value)


class _Places:
    """The modules of a model by the names that adapters use for them.

    tied: embedding and head, if they share one weight
    """

    def __init__(self, model: Any, headless: bool, depth: int) -> None:
        self.headless, self.depth = headless, depth
        self.modules = dict(model.named_modules())
        self.text = dict(model.get_decoder().named_modules())
        self.head = None if headless else model.get_output_embeddings()
        embedding = model.get_input_embeddings()
        self.tied: set[nn.Module] = set()
        if self.head is not None and self.head.weight is embedding.weight:
            self.tied = {embedding, self.head}

    def find(self, name: str) -> nn.Module | None:
        """The module of a name; None if there is none."""
        if name in self.modules:
            return self.modules[name]
        if found := _TEXT.fullmatch(name):
            return self.text.get(found["inside"])
        if _HEAD.fullmatch(name):
            return self.head
        return self.modules.get(name.removeprefix("model."))  # a class without a head has one level less

    def is_left_out(self, name: str) -> bool:
        """Whether the model lacks the module on purpose: a head, or a block behind its last one."""
        found = re.match(r"layers\.(\d+)\.", found["inside"]) if (found := _TEXT.fullmatch(name)) else None
        cut = found is not None and len(self.text["layers"]) <= int(found[1]) < self.depth
        return cut or (self.headless and _HEAD.fullmatch(name) is not None)


def _check_shapes(file: AdapterFile, base: Path, name: str, change: Change, module: nn.Module) -> None:
    """CheckpointError unless the tensors of the file have the shape of the module."""
    held = {key: tuple(value.shape) for key, value in module.named_parameters(recurse=False)}
    another = f"{base} is not the base that this adapter was trained on"
    for parameter, key in change.whole.items():
        if held.get(parameter) != file.shapes[key]:
            has = list(held[parameter]) if parameter in held else "nothing of that name"
            raise CheckpointError(
                f"{file.path}: {key} is {list(file.shapes[key])}, the base has {has}: {another}"
            )
    if change.down is None or change.up is None:
        return
    plain = isinstance(module, nn.Linear | Conv1D) and not change.embedding
    if not plain and not (type(module) is nn.Embedding and change.embedding):
        raise CheckpointError(
            f"{file.path}: {name} is a {type(module).__name__} in the base, into which a LoRA cannot be merged: "
            "merge it with the tool that trained it"
        )
    wide, high = file.shapes[change.down][1], file.shapes[change.up][0]
    wanted = (high, wide) if isinstance(module, nn.Linear) else (wide, high)
    if held["weight"] != wanted:
        raise CheckpointError(
            f"{file.path}: {name} is made for a weight {list(wanted)}, the base has {list(held['weight'])}: {another}"
        )


def _check_targets(
    file: AdapterFile, places: _Places, found: dict[nn.Module, str], blocks: int | None
) -> None:
    """CheckpointError if the configuration names a linear layer of a block for which the file has no tensors."""
    named = [match for name in found.values() if (match := _TEXT.fullmatch(name))]
    before = named[0]["before"] if named else "model."
    adapted = {module for module, name in found.items() if file.changes[name].down}
    absent = [
        before + inside
        for inside, module in places.text.items()
        if inside.startswith("layers.") and isinstance(module, nn.Linear | Conv1D) and module not in adapted
        if blocks is None or not is_behind(inside, blocks)
    ]
    if places.head is not None and places.head not in adapted and file.adapter.targets != "all-linear":
        absent.append("lm_head")
    if wanted := [name for name in absent if file.adapter.is_target(name)]:
        raise CheckpointError(
            f"{file.path}: has no tensors for {len(wanted)} modules that target_modules in {file.adapter.config.name} "
            f"names, the first is {wanted[0]}: the two files do not belong together: fetch both again"
        )
    for name in file.adapter.saved:
        known = {part for key in file.changes for part in key.split(".")} | set(file.changes)
        if name not in known and not any(key.endswith("." + name) for key in file.changes):
            raise CheckpointError(
                f"{file.path}: has no tensors for {name}, which modules_to_save in {file.adapter.config.name} names: "
                "fetch both again"
            )


class _Stored:
    """The base's weights as its files hold them, for a model whose dtype is narrower than theirs."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.files: dict[str, Path] = {}
        self.kinds: dict[str, str] = {}
        for path in weight_paths(base, read_json(base / CONFIG)):
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    self.files[key], self.kinds[key] = path, file.get_slice(key).get_dtype()

    def exact(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The weight of a module in float32, as the file holds it; `weight` is what was loaded of it.

        A file may name it otherwise than the model: the tensor is found by its name's end and by its values.
        """
        kept = {"F32", "BF16", "F16"} if weight.dtype == torch.float32 else {"BF16"}
        if set(self.kinds.values()) <= kept:
            return weight.detach().float().clone()
        tail = _tail(f"{name}.weight")
        ends = {tail, "embed_tokens.weight"} if tail == "lm_head.weight" else {tail}
        for key, path in self.files.items():
            if _tail(key) not in ends:
                continue
            with safe_open(path, framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(key).to(weight.device)
            if tensor.shape == weight.shape and torch.equal(tensor.to(weight.dtype), weight):
                return tensor.float()
        raise CheckpointError(
            f"{self.base}: holds {name} in a form that transformers changes on loading, and not in {weight.dtype}: "
            "pass --dtype float32"
        )


def _tail(key: str) -> str:
    """The part of a tensor's name that is the same in every class."""
    found = _TAIL.fullmatch(key)
    return found[1] if found else key
