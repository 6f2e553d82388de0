"""The head of an AR: a linear map from the last token's residual stream to the vector. Some have one for each layer."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from nla_engine.errors import CheckpointError, first_line
from nla_engine.models.adapters.form import AR_TAPS, AR_WEIGHTS
from nla_engine.models.adapters.tensors import HEAD, HEADS
from nla_engine.models.checkpoint import VALUE_HEAD, VALUE_HEADS
from nla_engine.models.hub import listed

CONVERT = "python -m nla_engine.models.convert_head"
HEAD_FILES = (VALUE_HEAD, VALUE_HEADS, AR_WEIGHTS, AR_TAPS)
#: What tensors of heads begin with, in a file that holds an AR's LoRA too.
_STARTS = {AR_WEIGHTS: HEAD, AR_TAPS: HEADS}
#: Endings of files that are converted before they can be read.
_CONVERTIBLE = (".pt", ".pth", ".bin", ".npz")
#: A tensor of the head of a layer: 20.weight, value_head.20.weight, value_heads.20.bias. A plain 20 is its weight.
_PER_LAYER = re.compile(r"(?:value_heads?\.|heads\.)?(?P<layer>\d+)(?:\.(?P<part>weight|bias))?")


def read_value_head(
    directory: Path, d_model: int, layer: int | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """weight float32 [d, d] and bias float32 [d] or None; finite and of the right width.

    d_model: width of the AR's residual stream; layer: whose head is read, where each layer has one
    They are in `value_head.safetensors`, for each layer in `value_heads.safetensors`, or with the adapter of an AR in
    `ar_lora_value_head.safetensors`, or `ar_multitap.safetensors` for each of its layers.
    """
    found = [file for file in HEAD_FILES if (directory / file).is_file()]
    if len(found) > 1:
        raise CheckpointError(
            f"{directory}: has {found[0]} and {found[1]}: which of the two heads is meant is not known: "
            "give a directory with one of them"
        )
    path = directory / (found[0] if found else VALUE_HEAD)
    start = _STARTS.get(path.name, "")
    try:
        with safe_open(path, framework="pt") as file:
            keys = {key: key.removeprefix(start) for key in file.keys() if key.startswith(start)}  # noqa: SIM118
            if path.name in (VALUE_HEADS, AR_TAPS):
                keys = _of_layer(path, keys, layer)
            tensors = {name: file.get_tensor(key).float() for key, name in keys.items()}
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; an AR checkpoint needs it: {_instead(directory)}") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({first_line(error)}): fetch the checkpoint again"
        ) from error
    weight, bias = tensors.get("weight"), tensors.get("bias")
    if path.name in _STARTS and (others := set(tensors) - {"weight"}):
        raise CheckpointError(f"{path}: holds {start}{min(others)}: the head of such an AR is a matrix alone")
    if weight is None:
        raise CheckpointError(f"{path}: holds {', '.join(sorted(tensors)) or 'nothing'}, not '{start}weight'")
    if tuple(weight.shape) != (d_model, d_model):
        raise CheckpointError(
            f"{path}: weight has shape {tuple(weight.shape)}, this AR needs width {d_model}: give its own head"
        )
    if bias is not None and tuple(bias.shape) != (d_model,):
        raise CheckpointError(
            f"{path}: bias has shape {tuple(bias.shape)}, this AR needs width {d_model}: give its own head"
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{path}: {name} holds NaN or Inf: the checkpoint is damaged, fetch it again"
            )
    return weight, bias


def heads_by_layer(keys: Iterable[str]) -> dict[int, dict[str, str]]:
    """Of each layer that has a head, the names of its tensors by "weight" and "bias". ValueError names another tensor,
    or one that is there twice."""
    heads: dict[int, dict[str, str]] = {}
    for key in sorted(keys):
        named = _PER_LAYER.fullmatch(key)
        if named is None:
            raise ValueError(f"holds {key}, which is the head of no layer")
        parts, part = heads.setdefault(int(named["layer"]), {}), named["part"] or "weight"
        if part in parts:
            raise ValueError(f"holds {parts[part]} and {key}, two heads of one layer")
        parts[part] = key
    return heads


def _of_layer(path: Path, keys: Iterable[str], layer: int | None) -> dict[str, str]:
    """The names of the tensors of a layer's head, with what each is. CheckpointError if it has none."""
    try:
        heads = heads_by_layer(keys)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}: fetch the checkpoint again") from None
    held = ", ".join(str(layer) for layer in sorted(heads) if "weight" in heads[layer])
    if layer is None:
        raise CheckpointError(f"{path}: holds heads of layers {held}: pass --layer with the one to read")
    if "weight" not in heads.get(layer, {}):
        raise CheckpointError(f"{path}: has no head for layer {layer}, it has those of {held or 'none'}")
    return {key: part for part, key in heads[layer].items()}


def convertible(files: Iterable[str]) -> list[str]:
    """Those of these files that only the conversion command reads."""
    return sorted(file for file in files if file.endswith(_CONVERTIBLE) and "/" not in file)


def _instead(directory: Path) -> str:
    """What to do where there is no head: convert the pickled one beside, if there is one."""
    repository, files = listed(directory)
    pickled = convertible(files)
    if not pickled:
        return "fetch the checkpoint again"
    file, danger = pickled[0], "is pickled, and pickles can run code"
    if repository is not None:
        return (
            f"{file} in {repository} {danger}: fetch {repository} into a directory of your own, convert the file "
            f"with {CONVERT} {file} {VALUE_HEAD}, and give the directory"
        )
    return f"{file} {danger}: convert it with {CONVERT} {directory / file} {directory / VALUE_HEAD}"
