"""The head of an AR: a linear map from the last token's residual stream to the vector."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from nla_engine.errors import CheckpointError, first_line
from nla_engine.models.adapters.form import AR_WEIGHTS
from nla_engine.models.adapters.tensors import HEAD
from nla_engine.models.checkpoint import VALUE_HEAD
from nla_engine.models.hub import listed

CONVERT = "python -m nla_engine.models.convert_head"


def read_value_head(directory: Path, d_model: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """weight float32 [d, d] and bias float32 [d] or None; finite and of the right width.

    They are in `value_head.safetensors`, or with the adapter of an AR in `ar_lora_value_head.safetensors`.
    """
    if (directory / VALUE_HEAD).is_file() and (directory / AR_WEIGHTS).is_file():
        raise CheckpointError(
            f"{directory}: has {VALUE_HEAD} and {AR_WEIGHTS}: which of the two heads is meant is not known: "
            "give a directory with one of them"
        )
    with_adapter = (directory / AR_WEIGHTS).is_file()
    path, start = (directory / AR_WEIGHTS, HEAD) if with_adapter else (directory / VALUE_HEAD, "")
    try:
        with safe_open(path, framework="pt") as file:
            keys = [key for key in file.keys() if key.startswith(start)]  # noqa: SIM118
            tensors = {key.removeprefix(start): file.get_tensor(key).float() for key in keys}
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; an AR checkpoint needs it: {_instead(directory)}") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({first_line(error)}): fetch the checkpoint again"
        ) from error
    weight, bias = tensors.get("weight"), tensors.get("bias")
    if with_adapter and (others := set(tensors) - {"weight"}):
        raise CheckpointError(f"{path}: holds {HEAD}{min(others)}: the head of such an AR is a matrix alone")
    if weight is None:
        raise CheckpointError(f"{path}: holds {', '.join(sorted(tensors)) or 'nothing'}, not '{start}weight'")
    if tuple(weight.shape) != (d_model, d_model):
        raise CheckpointError(
            f"{path}: weight has shape {tuple(weight.shape)}, the sidecar says width {d_model}"
        )
    if bias is not None and tuple(bias.shape) != (d_model,):
        raise CheckpointError(f"{path}: bias has shape {tuple(bias.shape)}, the sidecar says width {d_model}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{path}: {name} holds NaN or Inf: the checkpoint is damaged, fetch it again"
            )
    return weight, bias


def _instead(directory: Path) -> str:
    """What to do where there is no head: convert the pickled one beside, if there is one."""
    repository, files = listed(directory)
    pickled = sorted(file for file in files if file.endswith((".pt", ".pth", ".bin")) and "/" not in file)
    if not pickled:
        return "fetch the checkpoint again"
    file, danger = pickled[0], "is pickled, and pickles can run code"
    if repository is not None:
        return (
            f"{file} in {repository} {danger}: fetch {repository} into a directory of your own, convert the file "
            f"with {CONVERT} {file} {VALUE_HEAD}, and give the directory"
        )
    return f"{file} {danger}: convert it with {CONVERT} {directory / file} {directory / VALUE_HEAD}"
