"""What an adapter says of itself: `adapter_config.json` of PEFT, or `ar_meta.json` of an AR's adapter.

Only plain LoRA and rsLoRA are merged. A key that is not known and could change the weights is refused by name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nla_engine.errors import CheckpointError
from nla_engine.models.checkpoint import ADAPTER, CONFIG, INDEX, WEIGHTS, read_json

ADAPTER_WEIGHTS = "adapter_model.safetensors"
AR_META, AR_WEIGHTS = "ar_meta.json", "ar_lora_value_head.safetensors"
#: The LoRA of an AR that gives several layers, with a head for each.
AR_TAPS = "ar_multitap.safetensors"
#: Keys of adapter_config.json that are read here.
_READ = {
    *("peft_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "use_rslora", "rank_pattern"),
    *("alpha_pattern", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("modules_to_save", "bias", "init_lora_weights"),
}
#: Keys that change no weight of a trained adapter. fan_in_fan_out: the class of a module says it, as PEFT has it too.
_IDLE = {
    *("task_type", "auto_mapping", "inference_mode", "lora_dropout", "fan_in_fan_out", "peft_version"),
    *("megatron_core", "qalora_group_size", "parent_library", "eva_config"),
}
#: Ways to begin training that leave the base's weights as they are. Others (pissa, olora, loftq ...) change them.
_INITS = (None, True, False, "gaussian", "orthogonal", "eva")
#: Keys of ar_meta.json.
_AR_KEYS = {
    *("ar_num_layers", "lora_r", "lora_alpha", "quant", "target_modules", "final_norm_stripped"),
    "use_rslora",
}
#: The same of an AR that gives several layers.
_TAP_KEYS = {
    *(
        "tap_layers",
        "target_cols",
        "lora_r",
        "lora_alpha",
        "quant",
        "strip_final_norm",
        "mse_scale",
        "d_model",
    ),
    "target_modules",
}
_MERGE = "merge it into its base with the tool that trained it, and give that directory"


@dataclass(frozen=True)
class Adapter:
    """One adapter: where it is, and how its tensors add up.

    config, weights: its two files; base, revision: the model it names as its base
    targets, excluded: a pattern, or the ends of modules' names; saved: modules that it replaces as a whole
    blocks: how many blocks of the base its model has, of an AR with its own head; else None
    taps: the layers that such an AR gives, if it gives several
    quantised: whether it says that its base was quantised in training
    """

    config: Path
    weights: Path
    rank: int
    alpha: float
    rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    targets: str | tuple[str, ...]
    excluded: str | tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()
    base: str | None = None
    revision: str | None = None
    blocks: int | None = None
    taps: tuple[int, ...] = ()
    quantised: bool = False

    def rank_of(self, module: str) -> int:
        """The rank of a module's tensors."""
        return _by_pattern(self.rank_pattern, module, self.rank)

    def scaling_of(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023)."""
        rank = self.rank_of(module)
        return _by_pattern(self.alpha_pattern, module, self.alpha) / (rank**0.5 if self.rslora else rank)

    def is_saved(self, module: str) -> bool:
        """Whether the adapter replaces the module (or one that it is part of) as a whole."""
        return any(re.match(rf"(^|.*\.){re.escape(name)}($|\..*)", module) for name in self.saved)

    def is_target(self, module: str) -> bool:
        """Whether the configuration names this module, by PEFT's rules. module: its name in the base model."""
        if _named(self.excluded, module) or self.is_saved(module):
            return False
        if isinstance(self.targets, str):
            return self.targets == "all-linear" or re.fullmatch(self.targets, module) is not None
        if module in self.targets:
            return True
        return _named(self.targets, module) and (self.layers is None or self._layer(module) in self.layers)

    def _layer(self, module: str) -> int | None:
        """The number of the block that a module is in."""
        for pattern in self.layers_pattern or (None,):
            rule = r".*?\.[^.]*\.(\d+)\." if pattern is None else rf"(?:^|.*?\.){pattern}\.(\d+)\."
            if found := re.match(rule, module):
                return int(found[1])
        return None


def is_adapter(files: Collection[str]) -> bool:
    """Whether these are the files of an adapter. A merged AR may keep its ar_meta.json, beside whole weights."""
    own_head = AR_WEIGHTS in files or AR_TAPS in files
    return ADAPTER in files or own_head or (AR_META in files and CONFIG not in files)


def find_adapter(directory: Path, name: str, files: Collection[str] | None = None) -> Adapter | None:
    """The adapter in a directory; None if there is none. CheckpointError, which gives `name`, if it cannot be merged.

    files: the names of its files, if some are not there yet. Only the small ones are read.
    """
    files = os.listdir(directory) if files is None else files
    if not is_adapter(files):
        return None
    check_adapter_files(name, files)
    return _peft(directory, name) if ADAPTER in files else read_ar_meta(directory, name, files)


def check_adapter_files(name: str, files: Collection[str]) -> None:
    """CheckpointError unless the files of an adapter's directory are those of one adapter, and of no other model."""
    wanted, told = (ADAPTER_WEIGHTS, ADAPTER) if ADAPTER in files else (own_weights(files), AR_META)
    others = [WEIGHTS, INDEX, *(file for file in (AR_WEIGHTS, AR_TAPS) if file != wanted)]
    if other := next((file for file in others if file in files), None):
        raise CheckpointError(
            f"{name}: has {told if told in files else wanted} beside other weights ({other}): "
            "which of them is meant is not known: give a directory with one of them"
        )
    if told not in files:
        raise CheckpointError(
            f"{name}: has {wanted} without {told}, which says how to add it: fetch it again"
        )
    if wanted not in files:
        pickled = sorted(file for file in files if file.endswith((".bin", ".pt", ".pth")))
        held = f" (it has {pickled[0]}, which is pickled: pickles can run code and are not read)"
        raise CheckpointError(
            f"{name}: has no {wanted}{held if pickled else ''}: "
            f"{'save the adapter as safetensors' if pickled else 'fetch it again'}"
        )


def own_weights(files: Collection[str]) -> str:
    """The file of an AR's LoRA with its head, or with a head for each of several layers."""
    return AR_TAPS if AR_TAPS in files else AR_WEIGHTS


def _peft(directory: Path, name: str) -> Adapter:
    config = read_json(directory / ADAPTER)
    said = _Said(f"{name}: {ADAPTER}", config)
    kind = str(config.get("peft_type"))
    if kind != "LORA":
        raise CheckpointError(f"{said.where}: peft_type is {kind}: only LORA is merged on loading: {_MERGE}")
    for key, value in config.items():
        if key not in _READ | _IDLE and value not in (None, False) and value not in ({}, [], ""):
            raise CheckpointError(
                f"{said.where}: {key} is {value!r}, which plain LoRA does not have and may change the weights: {_MERGE}"
            )
    if config.get("bias", "none") != "none":
        raise CheckpointError(
            f"{said.where}: bias is {config['bias']!r}: trained biases are not merged: {_MERGE}"
        )
    if config.get("init_lora_weights") not in _INITS:
        raise CheckpointError(
            f"{said.where}: init_lora_weights is {config['init_lora_weights']!r}, which changes the base too: {_MERGE}"
        )
    revision = said.text("revision")
    return Adapter(
        config=directory / ADAPTER,
        weights=directory / ADAPTER_WEIGHTS,
        rank=said.rank("r"),
        alpha=said.number("lora_alpha"),
        rslora=said.truth("use_rslora", False),
        rank_pattern={key: said.rank("rank_pattern", value) for key, value in said.mapping("rank_pattern")},
        alpha_pattern={
            key: said.number("alpha_pattern", value) for key, value in said.mapping("alpha_pattern")
        },
        targets=said.modules("target_modules", needed=True),
        excluded=said.modules("exclude_modules"),
        layers=said.layers(),
        layers_pattern=said.names("layers_pattern"),
        saved=said.names("modules_to_save"),
        base=said.text("base_model_name_or_path"),
        revision=revision,
    )


def read_ar_meta(directory: Path, name: str, files: Collection[str] | None = None) -> Adapter:
    """What ar_meta.json says. Its trainers always use rsLoRA, and do not write that down. files: of the directory."""
    meta = read_json(directory / AR_META)
    said = _Said(f"{name}: {AR_META}", meta)
    weights = own_weights(os.listdir(directory) if files is None else files)
    several = weights == AR_TAPS
    for key, value in meta.items():
        if key not in (_TAP_KEYS if several else _AR_KEYS) and value is not None:
            raise CheckpointError(f"{said.where}: {key} is not known, and may change the weights: {_MERGE}")
    stripped = "strip_final_norm" if several else "final_norm_stripped"
    if not said.truth(stripped, False):
        raise CheckpointError(
            f"{said.where}: {stripped} is not true: this AR applies its base's final norm, which is not "
            "supported: give one that was trained without it"
        )
    taps = said.taps() if several else ()
    quant = meta.get("quant")
    if quant not in (None, "none", "4bit"):
        raise CheckpointError(f"{said.where}: quant is {quant!r}, which is none of none, 4bit")
    return Adapter(
        config=directory / AR_META,
        weights=directory / weights,
        rank=said.rank("lora_r"),
        alpha=said.number("lora_alpha"),
        rslora=said.truth("use_rslora", True),
        rank_pattern={},
        alpha_pattern={},
        targets=said.modules("target_modules", needed=True),
        blocks=max(taps) + 1 if several else said.rank("ar_num_layers"),
        taps=taps,
        quantised=quant == "4bit",
    )


@dataclass(frozen=True)
class _Said:
    """Values of a configuration, each checked. where: file and checkpoint, for errors."""

    where: str
    data: Mapping[str, Any]

    def wrong(self, key: str, value: object, wanted: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {key} is {value!r}, not {wanted}: fetch it again")

    def rank(self, key: str, value: Any = ...) -> int:
        value = self.data.get(key) if value is ... else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.wrong(key, value, "a whole number from 1 on")
        return value

    def number(self, key: str, value: Any = ...) -> float:
        value = self.data.get(key) if value is ... else value
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e9:
            raise self.wrong(key, value, "a number")
        return float(value)

    def truth(self, key: str, default: bool) -> bool:
        value = self.data.get(key)
        if not isinstance(value, bool | None):
            raise self.wrong(key, value, "true or false")
        return default if value is None else value

    def text(self, key: str) -> str | None:
        value = self.data.get(key)
        if not isinstance(value, str | None):
            raise self.wrong(key, value, "a text")
        return value or None

    def mapping(self, key: str) -> list[tuple[str, Any]]:
        value = self.data.get(key) or {}
        if not isinstance(value, dict):
            raise self.wrong(key, value, "an object")
        return [(self.pattern(key, name), number) for name, number in value.items()]

    def pattern(self, key: str, value: str) -> str:
        try:
            re.compile(value)
        except re.error:
            raise self.wrong(key, value, "a pattern") from None
        return value

    def names(self, key: str) -> tuple[str, ...]:
        value = self.data.get(key) or []
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
            raise self.wrong(key, value, "a list of names")
        return tuple(self.pattern(key, name) for name in value)

    def modules(self, key: str, needed: bool = False) -> str | tuple[str, ...]:
        value = self.data.get(key)
        if isinstance(value, str) and value:
            return self.pattern(key, value)
        if needed and not value:
            raise self.wrong(key, value, "the modules that it changes")
        return self.names(key)

    def taps(self) -> tuple[int, ...]:
        value = self.data.get("tap_layers")
        whole = isinstance(value, list) and all(isinstance(n, int) and n >= 0 for n in value)
        if not whole or not value or len(set(value)) < len(value):
            raise self.wrong("tap_layers", value, "a list of different block numbers")
        return tuple(value)

    def layers(self) -> tuple[int, ...] | None:
        value = self.data.get("layers_to_transform")
        value = [value] if isinstance(value, int) else value
        if value is not None and not (isinstance(value, list) and all(isinstance(n, int) for n in value)):
            raise self.wrong("layers_to_transform", value, "a list of block numbers")
        return tuple(value) if value else None


def _named(names: str | tuple[str, ...], module: str) -> bool:
    """Whether a pattern, or one of the names' ends, gives this module."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith("." + name) for name in names)


def _by_pattern(values: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that a module's name ends with."""
    return next((value for key, value in values.items() if re.match(rf"(.*\.)?({key})$", module)), default)
