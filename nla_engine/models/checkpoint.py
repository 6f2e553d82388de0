"""The files of a checkpoint: their names, which of them hold the weights, and forms that cannot be run.

The Hub code uses it before it fetches anything large, the loader before it reads anything large.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any

from nla_engine.errors import CheckpointError, first_line

CONFIG, ADAPTER = "config.json", "adapter_config.json"
VALUE_HEAD, VALUE_HEADS = "value_head.safetensors", "value_heads.safetensors"
WHITENING, AV_MAP, AR_MAP = "whitening.safetensors", "av_map.safetensors", "ar_map.safetensors"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
#: Key of a configuration that names the file of the weights, or their index.
_NAMED = "transformers_weights"
#: Endings of files with weights: an error says which a checkpoint has instead of safetensors.
_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
_NO_WEIGHTS = ("training_args.bin",)
#: Keys of a configuration that say how weights were quantised.
_QUANTISED = ("quantization_config", "compression_config")


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON file of a checkpoint. CheckpointError if it cannot be read or is not an object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as JSON ({first_line(error)}): fetch it again"
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: is not a JSON object: fetch it again")
    return found


def weight_files(
    name: str, config: Mapping[str, Any], has: Callable[[str], bool], read: Callable[[str], dict[str, Any]]
) -> list[str]:
    """The files that transformers reads the weights from, an index before its shards. Empty if there are none.

    name: of the checkpoint, for errors; has(file): whether the checkpoint has it; read(file): one of its JSON files
    A file that the config or an index names is listed even if it is missing.
    Raises CheckpointError if what they name cannot be weights.
    """
    first = config.get(_NAMED)
    if first is None:
        first = next((file for file in (WEIGHTS, INDEX) if has(file)), None)
    elif not _is_weights(first) and not _is_weights(first, ".index.json"):
        raise CheckpointError(
            f"{name}: {_NAMED} in {CONFIG} is {first!r}: it must be a .safetensors file of the checkpoint, "
            "or a .safetensors.index.json"
        )
    if first is None:
        return []
    if _is_weights(first) or not has(first):
        return [first]
    shards = read(first).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(map(_is_weights, shards.values())):
        raise CheckpointError(
            f"{name}: {first} has no weight_map that names .safetensors files: fetch it again, "
            "or give another checkpoint"
        )
    return [first, *sorted(set(shards.values()))]


def _is_weights(file: Any, more: str = "") -> bool:
    """Whether it is the path of a safetensors file inside the checkpoint's own directory."""
    if not isinstance(file, str) or not file.endswith(".safetensors" + more):
        return False
    path = PurePath(file)
    return not path.is_absolute() and ".." not in path.parts


def weight_paths(directory: Path, config: Mapping[str, Any]) -> list[Path]:
    """The safetensors files of a local checkpoint, present or not. Raises as `weight_files` does."""
    files = weight_files(
        str(directory),
        config,
        lambda file: (directory / file).is_file(),
        lambda file: read_json(directory / file),
    )
    return [directory / file for file in files if _is_weights(file)]


def other_weights(files: Iterable[str]) -> list[str]:
    """The files that look like weights, in any format."""
    return sorted(file for file in files if file.endswith(_ENDINGS) and file not in _NO_WEIGHTS)


def is_heads_alone(files: Collection[str]) -> bool:
    """Whether these are the files of an AR that has its heads, and the weights of its base unchanged."""
    return VALUE_HEADS in files and not {CONFIG, ADAPTER, WEIGHTS, INDEX} & set(files)


def check_form(directory: Path, name: str) -> dict[str, Any]:
    """The directory's config.json. CheckpointError, which gives `name`, for weights that cannot be run.

    This needs only the small files, so it can be called before the weights are fetched.
    """
    if (directory / ADAPTER).is_file():
        raise CheckpointError(
            f"{name}: has {ADAPTER}, and an adapter has no weights that run alone: give it as a model of its own"
        )
    if not (directory / CONFIG).is_file():
        inside = sorted(
            path.parent.name for file in (CONFIG, ADAPTER) for path in directory.glob(f"*/{file}")
        )
        hint = f", such as its folder {inside[0]}" if inside else ""
        raise CheckpointError(f"{name}: has no {CONFIG}: give the directory of one checkpoint{hint}")
    config = read_json(directory / CONFIG)
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in _QUANTISED:
            if isinstance(part.get(key), dict):
                raise CheckpointError(
                    f"{name}: its weights are quantised ({_method(part[key])}), which the engine does not run: "
                    "give the unquantised checkpoint of this model"
                )
    return config


def _method(given: Mapping[str, Any]) -> str:
    """Name and width of a quantisation, as its configuration gives them."""
    name = str(given.get("quant_method") or given.get("format") or "unnamed method")
    bits = given.get("bits") or given.get("w_bit")
    bits = bits or next(
        (n for n in (4, 8) if given.get(f"load_in_{n}bit") or given.get(f"_load_in_{n}bit")), None
    )
    return f"{name}, {bits} bits" if bits else name
