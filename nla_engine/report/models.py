"""The models of a table in plain words: names, what they were put together from, what vectors went through."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

#: What an option of a run holds that says where the file of a map lies; the same of a whitening is of both models.
_MAPS = {"map": "{role}_map", "whitening": "whitening"}


def short_name(name: Any) -> str:
    """The name of a model or file to show to others: of a local path only the last two parts."""
    path = PurePath(str(name))
    return "/".join(path.parts[-2:]) if path.is_absolute() else str(name)


def named(name: Any, revision: Any) -> str | None:
    """The name of a model with its revision; None without a name."""
    return None if name is None else short_name(name) + (f" at {revision}" if revision else "")


def otherwise(value: Any, text: str) -> str:
    """The value as text, or another text if there is none."""
    return text if value is None else str(value)


def injection_of(metadata: Mapping[str, Any]) -> str:
    """How vectors entered the AV. Tables of older versions name the norm alone: they replace the embedding."""
    if metadata.get("norm_match"):
        norm = "that of what is there"
    else:
        norm = otherwise(metadata["injection_scale"], "as it is")
    return f"{metadata.get('injection') or 'replace'}, norm: {norm}"


def made_of(metadata: Mapping[str, Any], run: Mapping[str, Any], role: str) -> list[tuple[str, str | None]]:
    """(name, value) pairs of an "av", "ar" or "oracle", the value None where there is nothing to say.

    run: the options of the run in which it took part
    """
    who = "oracle" if role == "oracle" else role.upper()
    base = named(metadata.get(f"{role}_base"), metadata.get(f"{role}_base_revision"))
    if base is not None and metadata.get(f"{role}_base_in_training"):
        base += (
            f" (in training its weights had {metadata[f'{role}_base_in_training'].replace('bit', ' bits')})"
        )
    adapter = metadata.get(f"{role}_adapter")
    pairs: list[tuple[str, str | None]] = [
        (f"base of the {who}", base),
        (f"adapter of the {who}", adapter and f"merged into its base, checksum {adapter}"),
    ]
    told = {
        "map": f"a learned map {'behind the AR' if role == 'ar' else 'before the AV'}",
        "whitening": f"whitening {'taken back behind the AR' if role == 'ar' else 'before the AV'}",
    }
    for kind, option in _MAPS.items():
        if checksum := metadata.get(f"{role}_{kind}"):
            file = run.get(option.format(role=role))
            where = "the file beside the weights" if file is None else short_name(file)
            pairs.append((told[kind], f"{where}, checksum {checksum}"))
    if role == "av":
        pairs += [
            ("vectors of each prompt", run.get("slots")),
            ("prompt of the user", run.get("prompt")),
            ("beginning of the reply", run.get("prefill") or None),
        ]
    return pairs


def further_layers(metadata: Mapping[str, Any]) -> str | None:
    """The other layers that the AR gives from the same text, None if there are none."""
    layers = list(metadata.get("further_layers", {}))
    if not layers:
        return None
    columns = ", ".join(f"cos_L{layer}" for layer in layers)
    return f"{', '.join(layers)}: in the table only, as {columns} and so on"
