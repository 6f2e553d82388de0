"""NLA sidecars (`nla_meta.yaml`): read every dialect into one form, and check it against its tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from nla_engine.errors import CheckpointError
from nla_engine.models.injection import Injection, norm_named
from nla_engine.models.template import split_template
from nla_engine.pair_fields import SCALES, is_scale

SIDECAR = "nla_meta.yaml"
KINDS = ("nla_model", "nla_dataset")
_ROLES = {"av": "av", "actor": "av", "verbalizer": "av", "ar": "ar", "critic": "ar", "reconstructor": "ar"}
_TEMPLATE_NAMES = {"av": ("av", "actor", "verbalizer"), "ar": ("ar", "critic", "reconstructor")}
#: Where the layer is told. The last two name K, whatever their word says.
_LAYER_KEYS = (
    "extraction_layer_index",
    "extraction.layer_index",
    "critic.extraction_layer_index",
    "ar.extraction_layer_index",
    "critic.num_hidden_layers",
    "ar.num_hidden_layers",
    "extraction.whitening.layer_index",
)
#: extraction.norm of vectors that were whitened before training: (v - mean) @ matrix, the matrix symmetric.
WHITENED = ("whitened_zca", "whitened_zca_v1")
#: All that is known of how a vector enters, by section. Another key that speaks of it is another way to enter.
_INJECTION_KEYS = {
    "": set(),
    "extraction": {"injection_scale"},
    "tokens": {
        "injection_char",
        "injection_token_id",
        "injection_left_neighbor_id",
        "injection_right_neighbor_id",
    },
}
_SAY = "pass --injection replace if they take the place of the marker's embedding, or --injection add@L"


@dataclass(frozen=True)
class Sidecar:
    """What an NLA checkpoint says of itself, with what was given beside it.

    role: "av" or "ar"; d_model: width; layer: K, or None if not stated
    injection: how vectors enter (AV)
    template: texts around the marker in the AV's user message (it stands there once for each slot), or around the
    explanation in the AR's text
    marker, marker_id, left_id, right_id: the injection character, its id and its neighbours' (AV; None if not stated)
    suffix_ids: the last token ids of every AR prompt (empty if not stated)
    norm: what was done to vectors before training: "none", one of WHITENED, or None if not stated
    whitening: sha256 of the whitening, None if not stated
    min_position: the first position of a token that it was trained on; None if not stated
    """

    path: Path
    role: str
    d_model: int
    layer: int | None
    injection: Injection
    template: tuple[str, ...]
    marker: str | None
    marker_id: int | None
    left_id: int | None
    right_id: int | None
    suffix_ids: tuple[int, ...]
    norm: str | None = None
    whitening: str | None = None
    #: Nothing is computed from it, so it is not in the fingerprint.
    min_position: int | None = field(default=None, repr=False)

    def fingerprint(self) -> str:
        """sha256 over everything but the path."""
        return hashlib.sha256(repr(replace(self, path=Path())).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Given:
    """What the user says of a checkpoint whose sidecar does not: it comes before what the sidecar says.

    scale: a number as text, or one of SCALES; norm_match: in place of a scale
    injection: as `Injection.named` reads it; values: of the holes in a template
    layer: the one that is read; map, whitening: files that come before those beside the weights
    slots: vectors that enter one prompt of an AV, each at a marker of its own; prompt: whether the user gives it
    """

    scale: str | None = None
    injection: str | None = None
    norm_match: bool = False
    values: tuple[tuple[str, str], ...] = ()
    layer: int | None = None
    map: Path | None = None
    whitening: Path | None = None
    slots: int = 1
    prompt: bool = False


def read_sidecar(directory: Path, role: str, given: Given = Given()) -> Sidecar:
    """Read `directory`/nla_meta.yaml as the sidecar of an "av" or "ar". CheckpointError names file and fault.

    Nothing is guessed: what is unknown or missing is refused, unless `given` says it.
    """
    path = directory / SIDECAR
    data = _read_yaml(path)
    kind = data.get("kind")
    if kind is not None and kind not in KINDS:
        raise CheckpointError(f"{path}: kind is {kind!r}, which is none of {', '.join(KINDS)}")
    told = _get(data, "role")
    found = role if told is None else _ROLES.get(str(told).lower())
    if found is None:
        raise CheckpointError(f"{path}: role {told!r} is none of {', '.join(_ROLES)}")
    if found != role:
        raise CheckpointError(
            f"{directory}: is an {found.upper()} checkpoint, but was given as the {role.upper()}; swap --av and --ar?"
        )
    d_model = _agreed(path, data, "d_model", "extraction.d_model")
    if d_model is None or d_model < 1:
        raise CheckpointError(f"{path}: d_model is missing or not a positive integer")
    norm, whitening = _norm(path, data)
    layer = _agreed(path, data, *_LAYER_KEYS)
    marker = _get(data, "tokens.injection_char")
    suffix = _get(data, "tokens.critic_suffix_ids") or _get(data, "tokens.ar_suffix_ids") or []
    if not isinstance(suffix, list) or not all(_is_int(id_) for id_ in suffix):
        raise CheckpointError(f"{path}: tokens.critic_suffix_ids is not a list of token ids")
    values = _values(path, data, given, layer)
    sidecar = Sidecar(
        path=path,
        role=role,
        d_model=d_model,
        layer=layer,
        injection=_injection(path, data, d_model, kind, given) if role == "av" else Injection(),
        template=_template(path, data, role, values, None if marker is None else str(marker), given),
        marker=None if marker is None else str(marker),
        marker_id=_integer(path, data, "tokens.injection_token_id"),
        left_id=_integer(path, data, "tokens.injection_left_neighbor_id"),
        right_id=_integer(path, data, "tokens.injection_right_neighbor_id"),
        suffix_ids=tuple(suffix),
        norm=norm,
        whitening=whitening,
        min_position=_integer(path, data, "extraction.min_position"),
    )
    if sidecar.min_position is not None and sidecar.min_position < 0:
        raise CheckpointError(
            f"{path}: extraction.min_position is {sidecar.min_position}, which is no position"
        )
    if role == "av" and (sidecar.marker is None or sidecar.marker_id is None):
        raise CheckpointError(f"{path}: tokens.injection_char or tokens.injection_token_id is missing")
    return sidecar


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: missing; {path.parent} is not an NLA checkpoint: give the directory of an AV or AR"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{path}: cannot be read as YAML ({reason}): mend it or fetch the checkpoint again"
        ) from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: not a mapping of keys to values")
    return data


def reconstructor_prompts(
    sidecar: Sidecar, tokenizer: Any, explanations: Sequence[str], special: bool = True
) -> list[list[int]]:
    """The AR's prompt around each explanation, as token ids. CheckpointError if one does not end with the suffix ids.

    special: begin with the tokenizer's own start token, if it has one
    A tokenizer may merge the end of an explanation with the start of the suffix; the two are then encoded apart.
    """
    texts = [explanation.join(sidecar.template) for explanation in explanations]
    prompts: list[list[int]] = tokenizer(texts, add_special_tokens=special)["input_ids"] if texts else []
    suffix = list(sidecar.suffix_ids)
    for number, ids in enumerate(prompts if suffix else []):
        if ids[-len(suffix) :] == suffix:
            continue
        ending, text = tokenizer.decode(suffix), texts[number]
        if not (explanations[number] and text.endswith(ending)):
            raise CheckpointError(
                f"{sidecar.path}: an AR prompt ends with tokens {ids[-len(suffix) :]}, the sidecar says {suffix}"
            )
        start = tokenizer.encode(text.removesuffix(ending), add_special_tokens=special)
        prompts[number] = [*start, *suffix]
    return prompts


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


def _agreed(path: Path, data: dict[str, Any], *keys: str) -> int | None:
    """The number that all of these keys that are there name. CheckpointError if two of them differ."""
    found = {key: number for key in keys if (number := _integer(path, data, key)) is not None}
    if len(set(found.values())) > 1:
        told = ", ".join(f"{key} {number}" for key, number in found.items())
        raise CheckpointError(f"{path}: tells two different numbers ({told}): correct the wrong one")
    return next(iter(found.values()), None)


def _norm(path: Path, data: dict[str, Any]) -> tuple[str | None, str | None]:
    """What was done to vectors before training, and the sha256 of the whitening."""
    norm, whitening = _get(data, "extraction.norm"), _get(data, "extraction.whitening")
    if norm not in (None, "none", *WHITENED):
        raise CheckpointError(
            f"{path}: extraction.norm is {norm!r}: only vectors as they were captured (none) and whitened ones "
            f"({WHITENED[0]}) are supported"
        )
    if whitening is not None and norm not in WHITENED:
        raise CheckpointError(
            f"{path}: has extraction.whitening, and extraction.norm does not say {WHITENED[0]}: correct the wrong one"
        )
    told = _get(whitening, "stats_sha256")
    return norm, None if told is None else str(told)


def _values(path: Path, data: dict[str, Any], given: Given, layer: int | None) -> dict[str, str]:
    """The values of a template's holes. layer: what the sidecar says; else the one that is read.

    depth_pct is that of `depth_percentages` which is nearest to the layer's depth, as trainers of all layers choose it.
    """
    values = dict(given.values)
    layer = given.layer if layer is None else layer
    depths, blocks = _get(data, "depth_percentages"), _integer(path, data, "n_layers")
    if layer is not None and blocks and depths and isinstance(depths, list) and all(map(_is_int, depths)):
        depth = 100 * layer / blocks
        values.setdefault("depth_pct", str(min(depths, key=lambda percent: abs(percent - depth))))
    if layer is not None and values.setdefault("layer", str(layer)) != str(layer):
        raise CheckpointError(
            f"{path}: --template-value layer={values['layer']}, but layer {layer} is read: leave it out"
        )
    return values


def _injection(path: Path, data: dict[str, Any], d_model: int, kind: object, given: Given) -> Injection:
    """As `given` says, else in place of the marker's embedding. CheckpointError if that is not sure."""
    name = given.injection
    if name is None:
        _check_replaces(path, data, kind)
        name = "replace"
    scale = None if given.norm_match else _injection_scale(path, data, d_model, given)
    return Injection.named(name, scale, given.norm_match)


def _check_replaces(path: Path, data: dict[str, Any], kind: object) -> None:
    """CheckpointError unless the vector is known to take the place of the marker's embedding."""
    for section, known in _INJECTION_KEYS.items():
        there = _get(data, section) if section else data
        for key in there if isinstance(there, dict) else ():
            if "inject" in str(key).lower() and key not in known:
                name = ".".join(filter(None, (section, str(key))))
                raise CheckpointError(
                    f"{path}: {name} is not known, and may change how vectors enter: {_SAY}"
                )
    if kind == "nla_dataset":
        raise CheckpointError(
            f"{path}: is a data set's sidecar (kind: nla_dataset), which does not say how vectors enter: {_SAY}"
        )


def _injection_scale(path: Path, data: dict[str, Any], d_model: int, given: Given) -> float | None:
    """The norm that vectors are brought to, None for as they are."""
    name, value = "extraction.injection_scale", _get(data, "extraction.injection_scale")
    if given.scale is not None:
        name, value = "--injection-scale", given.scale
    if value is None:
        raise CheckpointError(
            f"{path}: extraction.injection_scale is missing: pass --injection-scale with the norm that this AV was "
            "trained on, raw if its vectors enter as they are, or --norm-match"
        )
    if isinstance(value, bool) or not is_scale(str(value)):
        raise CheckpointError(
            f"{path}: {name} is {value!r}, not a positive number or one of {', '.join(SCALES)}"
        )
    return norm_named(str(value), d_model)


def _template(
    path: Path, data: dict[str, Any], role: str, values: dict[str, str], marker: str | None, given: Given
) -> tuple[str, ...]:
    names = _TEMPLATE_NAMES[role]
    for name in names:
        template = _get(data, f"prompt_templates.{name}")
        if template is None or template == "":
            continue
        key = f"{path}: prompt_templates.{name}"
        if not isinstance(template, str):
            raise CheckpointError(f"{key} is not a text")
        try:
            if role == "av":
                times = None if given.prompt and given.slots > 1 else given.slots
                return split_template(template, "injection_char", values, marker, times)
            return split_template(template, "explanation", values)
        except ValueError as error:
            raise CheckpointError(f"{key} {error}") from None
    raise CheckpointError(f"{path}: prompt_templates.{names[0]} is missing")
