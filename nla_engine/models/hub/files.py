"""Which files of a checkpoint's repository are loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from nla_engine.errors import CheckpointError, first_line

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
#: Files beside the weights that transformers may look for when it loads a decoder and its tokenizer.
BESIDE_WEIGHTS = (
    CONFIG,
    ADAPTER_CONFIG,
    "generation_config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "*vocab*.json",
    "*vocab*.txt",
    "*merges.txt",
    "*.model",
    "*.model.v*",
    "*.tiktoken",
    "*.tokenizer",
    "tekken.json",
    "emoji.json",
    "normalizer.json",
    "word_*.json",
    "chat_template.json",
    "chat_template*.jinja",
)
TEMPLATES = "additional_chat_templates/*.jinja"
#: Weights in the order in which transformers looks for them.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
#: Endings of weights that are not read, for a refusal that says what a repository has instead.
_FOREIGN = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


def choose(
    name: str, files: Iterable[str], read: Callable[[str], dict[str, Any]], *, remote_code: bool = False
) -> list[str]:
    """Which of a repository's files are loaded: configuration, tokenizer, templates, weights, NLA's own.

    files: every path in the repository; read(path): one of its JSON files
    Raises CheckpointError if it holds no weights that are read, or lacks a shard that its index names.
    """
    from nla_engine.models.sidecar import SIDECAR, VALUE_HEAD

    files = sorted(files)
    need_checkpoint(name, files)
    patterns = (*BESIDE_WEIGHTS, SIDECAR, VALUE_HEAD)
    chosen = [f for f in files if "/" not in f and any(fnmatchcase(f, pattern) for pattern in patterns)]
    chosen += [f for f in files if fnmatchcase(f, TEMPLATES)]
    if remote_code:
        chosen += [f for f in files if f.endswith(".py")]
    if CONFIG in files:
        chosen += _weights(name, files, read)
    return sorted(set(chosen))


def _weights(name: str, files: list[str], read: Callable[[str], dict[str, Any]]) -> list[str]:
    """The weights that transformers loads: those that the config names, else a single file, else an index's shards."""
    named = read(CONFIG).get("transformers_weights")
    for file in [named] if isinstance(named, str) else WEIGHTS:
        if file not in files:
            continue
        if not file.endswith(".index.json"):
            return [file]
        shards = read(file).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise CheckpointError(
                f"{name}: {file} has no weight_map: the repository is damaged, give another"
            )
        missing = sorted(set(shards.values()) - set(files))
        if missing:
            raise CheckpointError(
                f"{name}: {file} names {missing[0]}, which the repository lacks ({len(missing)} in all): "
                "its upload is not complete, give another revision or repository"
            )
        return [file, *sorted(set(shards.values()))]
    if ADAPTER_CONFIG in files:
        return []
    raise CheckpointError(
        f"{name}: this repository has no {WEIGHTS[0]}, whole or in shards{_instead(files)}: "
        "give a revision or a repository that has"
    )


def need_checkpoint(name: str, files: list[str]) -> None:
    """CheckpointError unless a repository with these files is a model or an adapter of transformers."""
    if CONFIG not in files and ADAPTER_CONFIG not in files:
        raise CheckpointError(
            f"{name}: this repository has no {CONFIG}, so that it is no checkpoint of transformers"
            f"{_instead(files)}: give another"
        )


def _instead(files: list[str]) -> str:
    found = [f for f in files if f.endswith(_FOREIGN) and f != "training_args.bin"]
    if not found:
        return ""
    pickled = all(f.endswith(_PICKLED) for f in found)
    what = "its weights are pickled, which can run code when read" if pickled else "what it has is not read"
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return f" ({what}: {found[0]}{more})"


def is_whole(file: Path, size: int) -> bool:
    """Whether the file is there, all `size` bytes of it."""
    try:
        return file.stat().st_size == size
    except OSError:
        return False


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. CheckpointError if the file holds something else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read ({first_line(error)}): fetch it again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: is not a mapping of names to values: give another repository")
    return found
