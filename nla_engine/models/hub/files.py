"""Which files of a checkpoint's repository are loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from nla_engine.errors import CheckpointError
from nla_engine.models.adapters.form import (
    ADAPTER_WEIGHTS,
    AR_META,
    check_adapter_files,
    is_adapter,
    own_weights,
)
from nla_engine.models.checkpoint import (
    ADAPTER,
    AR_MAP,
    AV_MAP,
    CONFIG,
    VALUE_HEAD,
    VALUE_HEADS,
    WEIGHTS,
    WHITENING,
    is_heads_alone,
    other_weights,
    weight_files,
)

#: Files beside the weights that transformers may look for when it loads a decoder and its tokenizer.
BESIDE_WEIGHTS = (
    CONFIG,
    ADAPTER,
    AR_META,
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
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


def choose(
    name: str, files: Iterable[str], read: Callable[[str], dict[str, Any]], *, remote_code: bool = False
) -> list[str]:
    """Which of a repository's files are loaded: configuration, tokenizer, templates, weights, NLA's own.

    files: every path in the repository or folder; read(path): one of its JSON files
    Raises CheckpointError if it holds no weights that can be read, or lacks a shard that its index names.
    """
    from nla_engine.models.sidecar import SIDECAR

    files = sorted(files)
    need_checkpoint(name, files)
    patterns = (*BESIDE_WEIGHTS, SIDECAR, VALUE_HEAD, VALUE_HEADS, WHITENING, AV_MAP, AR_MAP)
    chosen = [f for f in files if "/" not in f and any(fnmatchcase(f, pattern) for pattern in patterns)]
    chosen += [f for f in files if fnmatchcase(f, TEMPLATES)]
    if remote_code:
        chosen += [f for f in files if f.endswith(".py")]
    if is_adapter(files):
        check_adapter_files(name, files)
        chosen += [ADAPTER_WEIGHTS if ADAPTER in files else own_weights(files)]
    elif not is_heads_alone(files):
        chosen += _weights(name, files, read)
    return sorted(set(chosen))


def _weights(name: str, files: list[str], read: Callable[[str], dict[str, Any]]) -> list[str]:
    """The files of the weights. CheckpointError unless the repository has them all."""
    found = weight_files(name, read(CONFIG), lambda file: file in files, read)
    if not found:
        raise CheckpointError(
            f"{name}: this repository has no {WEIGHTS}, whole or in shards{_instead(files)}: "
            "give a revision or a repository that has"
        )
    missing = [file for file in found if file not in files]
    if missing:
        raise CheckpointError(
            f"{name}: {CONFIG if missing[0] == found[0] else found[0]} names {missing[0]}, which the repository lacks "
            f"({len(missing)} in all): its upload is not complete, give another revision or repository"
        )
    return found


def need_checkpoint(name: str, files: list[str]) -> None:
    """CheckpointError unless these are the files of a transformers model, of an adapter, or of an AR's heads."""
    if CONFIG in files or is_adapter(files) or is_heads_alone(files):
        return
    inside = sorted(
        {f.rpartition("/")[0] for f in files if f.endswith((f"/{CONFIG}", f"/{ADAPTER}", f"/{AR_META}"))}
    )
    if inside:
        raise CheckpointError(
            f"{name}: has no {CONFIG} itself, its folders have: give one of them, such as {name}/{inside[0]}"
        )
    raise CheckpointError(
        f"{name}: this repository has no {CONFIG}, so it is no transformers checkpoint{_instead(files)}: give another"
    )


def _instead(files: list[str]) -> str:
    found = other_weights(files)
    if not found:
        return ""
    pickled = all(f.endswith(_PICKLED) for f in found)
    what = "its weights are pickled, which can run code when read" if pickled else "what it has is not read"
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return f" ({what}: {found[0]}{more})"


def is_whole(file: Path, size: int) -> bool:
    """Whether the file exists and has `size` bytes."""
    try:
        return file.stat().st_size == size
    except OSError:
        return False
