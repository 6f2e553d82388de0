"""NLA sidecars (`nla_meta.yaml`): read every dialect into one form, and check it against its tokenizer."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from nla_engine.errors import CheckpointError

SIDECAR = "nla_meta.yaml"
VALUE_HEAD = "value_head.safetensors"
_ROLES = {"av": "av", "actor": "av", "verbalizer": "av", "ar": "ar", "critic": "ar", "reconstructor": "ar"}
_TEMPLATE_NAMES = {"av": ("av", "actor", "verbalizer"), "ar": ("ar", "critic", "reconstructor")}
_LAYER_KEYS = (
    "extraction_layer_index",
    "extraction.layer_index",
    "critic.extraction_layer_index",
    "ar.extraction_layer_index",
    "critic.num_hidden_layers",
    "ar.num_hidden_layers",
)


@dataclass(frozen=True)
class Sidecar:
    """What an NLA checkpoint says of itself.

    role: "av" or "ar"; d_model: width; layer: K, or None if not stated
    injection_scale: L2 norm to which a vector is scaled before injection; None: inject it as it is
    template: the AV's user message with {injection_char}, or the AR's text with {explanation}
    marker, marker_id, left_id, right_id: the injection character, its id and its neighbours' (AV; None if not stated)
    suffix_ids: the last token ids of every AR prompt (empty if not stated)
    """

    path: Path
    role: str
    d_model: int
    layer: int | None
    injection_scale: float | None
    template: str
    marker: str | None
    marker_id: int | None
    left_id: int | None
    right_id: int | None
    suffix_ids: tuple[int, ...]

    def fingerprint(self) -> str:
        """sha256 over everything but the path."""
        return hashlib.sha256(repr(replace(self, path=Path())).encode()).hexdigest()[:16]


def read_sidecar(directory: Path, role: str) -> Sidecar:
    """Read `directory`/nla_meta.yaml as the sidecar of an "av" or "ar". CheckpointError names file and fault."""
    path = directory / SIDECAR
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: missing; {directory} is not an NLA checkpoint: give the directory of an AV or AR"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{path}: cannot be read as YAML ({reason}): mend it or fetch the checkpoint again"
        ) from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: not a mapping of keys to values")
    found = _ROLES.get(str(_get(data, "role")).lower())
    if found is None:
        raise CheckpointError(f"{path}: role {_get(data, 'role')!r} is none of {', '.join(_ROLES)}")
    if found != role:
        raise CheckpointError(
            f"{directory}: is an {found.upper()} checkpoint, but was given as the {role.upper()}; swap --av and --ar?"
        )
    d_model = _integer(path, data, "d_model", "extraction.d_model")
    if d_model is None or d_model < 1:
        raise CheckpointError(f"{path}: d_model is missing or not a positive integer")
    marker = _get(data, "tokens.injection_char")
    suffix = _get(data, "tokens.critic_suffix_ids") or _get(data, "tokens.ar_suffix_ids") or []
    if not isinstance(suffix, list) or not all(_is_int(id_) for id_ in suffix):
        raise CheckpointError(f"{path}: tokens.critic_suffix_ids is not a list of token ids")
    sidecar = Sidecar(
        path=path,
        role=role,
        d_model=d_model,
        layer=_layer(path, data),
        injection_scale=_injection_scale(path, data, d_model),
        template=_template(path, data, role),
        marker=None if marker is None else str(marker),
        marker_id=_integer(path, data, "tokens.injection_token_id"),
        left_id=_integer(path, data, "tokens.injection_left_neighbor_id"),
        right_id=_integer(path, data, "tokens.injection_right_neighbor_id"),
        suffix_ids=tuple(suffix),
    )
    if role == "av" and (sidecar.marker is None or sidecar.marker_id is None):
        raise CheckpointError(f"{path}: tokens.injection_char or tokens.injection_token_id is missing")
    return sidecar


def verbalizer_prompt(sidecar: Sidecar, tokenizer: Any) -> tuple[list[int], int]:
    """The AV's prompt as token ids, and the index of the marker in it. Checks the whole contract."""
    assert sidecar.marker is not None
    alone = tokenizer.encode(sidecar.marker, add_special_tokens=False)
    if alone != [sidecar.marker_id]:
        raise CheckpointError(
            f"{sidecar.path}: the marker {sidecar.marker!r} must encode to the one id {sidecar.marker_id}, "
            f"but this tokenizer gives {alone}; the tokenizer and the sidecar do not belong together"
        )
    message = sidecar.template.replace("{injection_char}", sidecar.marker)
    text = message
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True
        )
    ids = tokenizer.encode(text, add_special_tokens=False)
    places = [i for i, id_ in enumerate(ids) if id_ == sidecar.marker_id]
    if len(places) != 1:
        raise CheckpointError(
            f"{sidecar.path}: the marker {sidecar.marker!r} must stand once in the prompt, "
            f"it stands {len(places)} times"
        )
    place = places[0]
    for name, offset, expected in (("left", -1, sidecar.left_id), ("right", 1, sidecar.right_id)):
        at = place + offset
        actual = ids[at] if 0 <= at < len(ids) else None
        if expected is not None and actual != expected:
            raise CheckpointError(
                f"{sidecar.path}: the marker's {name} neighbour is token {actual}, the sidecar says {expected}"
            )
    return ids, place


def reconstructor_prompts(sidecar: Sidecar, tokenizer: Any, explanations: Sequence[str]) -> list[list[int]]:
    """The AR's prompt around each explanation, as token ids. CheckpointError if one does not end with the suffix ids.

    A tokenizer may merge the end of an explanation with the start of the suffix; the two are then encoded apart.
    """
    # plain replacement: explanations contain braces
    texts = [sidecar.template.replace("{explanation}", explanation) for explanation in explanations]
    prompts: list[list[int]] = tokenizer(texts, add_special_tokens=True)["input_ids"] if texts else []
    suffix = list(sidecar.suffix_ids)
    for number, ids in enumerate(prompts if suffix else []):
        if ids[-len(suffix) :] == suffix:
            continue
        ending, text = tokenizer.decode(suffix), texts[number]
        if not (explanations[number] and text.endswith(ending)):
            raise CheckpointError(
                f"{sidecar.path}: an AR prompt ends with tokens {ids[-len(suffix) :]}, the sidecar says {suffix}"
            )
        start = tokenizer.encode(text.removesuffix(ending), add_special_tokens=True)
        prompts[number] = [*start, *suffix]
    return prompts


def read_value_head(directory: Path, d_model: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """weight float32 [d, d] and bias float32 [d] or None of `value_head.safetensors`; finite and of the right width."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = directory / VALUE_HEAD
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: missing; an AR checkpoint needs it: fetch the checkpoint again"
        ) from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}): fetch the checkpoint again") from error
    if "weight" not in tensors:
        raise CheckpointError(f"{path}: holds {', '.join(sorted(tensors)) or 'nothing'}, not 'weight'")
    weight, bias = tensors["weight"].float(), tensors.get("bias")
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
    return weight, None if bias is None else bias.float()


def _get(data: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        if not isinstance(data, dict):
            return None
        data = data.get(key)
    return data


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _integer(path: Path, data: dict[str, Any], *keys: str) -> int | None:
    for key in keys:
        value = _get(data, key)
        if value is not None:
            if not _is_int(value):
                raise CheckpointError(f"{path}: {key} is {value!r}, not an integer")
            return int(value)
    return None


def _layer(path: Path, data: dict[str, Any]) -> int | None:
    return _integer(path, data, *_LAYER_KEYS)


def _injection_scale(path: Path, data: dict[str, Any], d_model: int) -> float | None:
    value = _get(data, "extraction.injection_scale")
    if value is None or value == "raw":
        return None
    if value == "sqrt_d_model":
        return math.sqrt(d_model)
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not (math.isfinite(value) and value > 0)
    ):
        raise CheckpointError(f"{path}: extraction.injection_scale is {value!r}, not a positive number")
    return float(value)


def _template(path: Path, data: dict[str, Any], role: str) -> str:
    names = _TEMPLATE_NAMES[role]
    hole = "{injection_char}" if role == "av" else "{explanation}"
    for name in names:
        template = _get(data, f"prompt_templates.{name}")
        if template is not None:
            if not isinstance(template, str) or template.count(hole) != 1:
                raise CheckpointError(
                    f"{path}: prompt_templates.{name} must be a text that holds {hole} once"
                )
            return template
    raise CheckpointError(f"{path}: prompt_templates.{names[0]} is missing")
