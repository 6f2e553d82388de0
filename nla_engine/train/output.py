"""What training writes: sidecars at first, and the trained weights at the end, as adapters or as whole checkpoints."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from safetensors.torch import save

from nla_engine.errors import CheckpointError, RequestError
from nla_engine.models.checkpoint import VALUE_HEAD
from nla_engine.models.decoder import values
from nla_engine.models.injection import norm_named
from nla_engine.models.sidecar import SIDECAR
from nla_engine.models.source import Source
from nla_engine.store.shards import replacing
from nla_engine.train.lora import write_adapter
from nla_engine.train.pair import TrainedAR, TrainedAV

AV_TEMPLATE = "Put this vector into words: <vector>{injection_char}</vector>"
AR_SUFFIX = "</text> <vector>"
AR_TEMPLATE = "The words for a vector: <text>{explanation}" + AR_SUFFIX
#: Letters that may mark the vector's place: the first that is one token of its own between the tags is taken.
MARKERS = "㈎§†‡λжΩ◊¤★"
#: Texts that end otherwise: a tokenizer may merge an ending with what follows it.
_ENDINGS = (
    "a",
    "1",
    " ",
    "\n",
    ".",
    ",",
    ":",
    "!",
    "?",
    '"',
    "'",
    ")",
    "(",
    ">",
    "<",
    "/",
    "_",
    "é",
    "…",
    "”",
)
_LEFT, _RIGHT = "<vector>", "</vector>"


def write_sidecars(
    out: Path, tokenizer: Any, d_model: int, layer: int, scale: str, min_position: int
) -> None:
    """`nla_meta.yaml` of av/ and ar/ in `out`. scale: of the injection, as `--injection-scale` says it

    CheckpointError if the tokenizer has no marker; nothing is written then.
    """
    tokens = _marker(tokenizer)
    norm = norm_named(scale, d_model)
    for role, template in (("av", AV_TEMPLATE), ("ar", AR_TEMPLATE)):
        own = tokens | ({"critic_suffix_ids": _suffix(tokenizer)} if role == "ar" else {})
        said = {
            "kind": "nla_model",
            "role": role,
            "d_model": d_model,
            "extraction_layer_index": layer,
            "extraction": {
                "injection_scale": ("raw" if norm is None else norm) if role == "av" else None,
                "mse_scale": math.sqrt(d_model),
                "min_position": min_position,
            },
            "tokens": own,
            "prompt_templates": {role: template},
        }
        text = yaml.safe_dump(said, allow_unicode=True, sort_keys=False, width=110)
        (out / role).mkdir(parents=True, exist_ok=True)
        (out / role / SIDECAR).write_text(text, encoding="utf-8")


def _marker(tokenizer: Any) -> dict[str, Any]:
    special = set(tokenizer.all_special_ids)
    for letter in (*MARKERS, *sorted(tokenizer.get_added_vocab())):
        alone = tokenizer.encode(letter, add_special_tokens=False)
        inside = tokenizer.encode(_LEFT + letter + _RIGHT, add_special_tokens=False)
        if len(alone) == 1 and alone[0] not in special and inside.count(alone[0]) == 1:
            at = inside.index(alone[0])
            return {
                "injection_char": letter,
                "injection_token_id": alone[0],
                "injection_left_neighbor_id": inside[at - 1],
                "injection_right_neighbor_id": inside[at + 1],
            }
    raise CheckpointError(
        f"the tokenizer has no single token for any of {' '.join(MARKERS)}: add one to its vocabulary to mark where a "
        "vector enters"
    )


def _suffix(tokenizer: Any) -> list[int]:
    """The tokens that every prompt of the AR ends with: those that do not depend on the text before."""
    ends = [
        tokenizer.encode(AR_TEMPLATE.replace("{explanation}", text), add_special_tokens=False)
        for text in ("", *_ENDINGS)
    ]
    size = 0
    while all(len(ids) > size and ids[-1 - size] == ends[0][-1 - size] for ids in ends):
        size += 1
    alone = tokenizer.encode(AR_SUFFIX, add_special_tokens=False)
    size = min(size, len(alone))
    found: list[int] = ends[0][len(ends[0]) - size :]
    return found


def write_pair(out: Path, av: TrainedAV, ar: TrainedAR, base: str, revision: str | None) -> None:
    """av/ and ar/ with their sidecars: adapters of the base, or checkpoints of their own, in bfloat16.

    Each appears whole or not at all.
    """
    transformers.logging.disable_progress_bar()
    for role, model in (("av", av), ("ar", ar)):
        if (out / role).exists():  # of a run that ended here
            shutil.rmtree(out / role)
        with replacing(out / role) as directory:
            directory.mkdir()
            shutil.copy(model.sidecar.path, directory / SIDECAR)
            if model.adapters:
                write_adapter(directory, model.adapters, base, revision, torch.bfloat16)
            else:
                model.lm.model.to(torch.bfloat16).save_pretrained(directory)
                model.lm.tokenizer.save_pretrained(directory)
            if isinstance(model, TrainedAR):
                weight = model.head.detach().to("cpu", torch.bfloat16).contiguous()
                (directory / VALUE_HEAD).write_bytes(save({"weight": weight}))


def check_whole(ar: TrainedAR) -> None:
    """RequestError if the AR's blocks cannot be saved without those behind them."""
    if not ar.adapters and len(ar.lm.blocks) != (ar.sidecar.layer or 0) + 1:
        raise RequestError("the blocks of this architecture cannot be cut: pass --method lora")


def check_base(source: Source, d_model: int, layer: int) -> None:
    """RequestError unless the model has vectors of this width, and this layer."""
    config = transformers.AutoConfig.from_pretrained(source.weights).get_text_config(decoder=True)
    width, blocks = values(config, "hidden_size")[0], values(config, "num_hidden_layers")[0]
    if width != d_model:
        raise RequestError(
            f"--model {source.name}: is of width {width}, the store's vectors are of width {d_model}: "
            "give the captured model"
        )
    if layer >= blocks:
        raise RequestError(f"--model {source.name}: has {blocks} blocks, layer {layer} is not one of them")
