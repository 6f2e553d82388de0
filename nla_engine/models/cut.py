"""A configuration with fewer blocks, so that only the first blocks of a checkpoint are read."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import torch
import transformers

from nla_engine.errors import CheckpointError

#: Types of a module's attributes that say how it computes.
_PLAIN = (bool, int, float, str, type(None), tuple)


def cut_config(directory: Path, blocks: int, remote_code: bool) -> Any:
    """The configuration of a checkpoint, with its first `blocks` blocks only.

    None if these would compute otherwise without the others, as far as their modules tell: then all have to be read.
    CheckpointError if it has fewer.
    """
    whole = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=remote_code)
    cut = copy.deepcopy(whole)
    text = cut.get_text_config(decoder=True)
    count = int(text.num_hidden_layers)
    if blocks > count:
        raise CheckpointError(
            f"{directory}: has {count} blocks, {blocks} are needed: give the base of that depth"
        )
    try:
        for key, value in list(vars(text).items()):
            if isinstance(value, list | tuple) and len(value) == count:
                setattr(text, key, value[:blocks])
        text.num_hidden_layers = blocks
        before, after = (_described(config, blocks, remote_code) for config in (whole, cut))
    except Exception:  # the library raises many types where a configuration cannot be cut
        return None
    return cut if before == after else None


def is_behind(key: str, blocks: int) -> bool:
    """Whether a tensor's name is that of a block behind the first `blocks`."""
    found = re.search(r"(?:^|\.)layers\.(\d+)\.", key)
    return found is not None and int(found[1]) >= blocks


def _described(config: Any, blocks: int, remote_code: bool) -> list[tuple[Any, ...]]:
    """What the first blocks of a configuration's model are, and the parameters beside its blocks.

    Of each module: its name, class, parameters' shapes, and the plain attributes that say how it computes.
    """
    with torch.device("meta"):
        model: Any = transformers.AutoModel.from_config(config, trust_remote_code=remote_code).get_decoder()
    found: list[tuple[Any, ...]] = [
        (name, tuple(weight.shape))
        for name, weight in model.named_parameters()
        if not name.startswith("layers.")
    ]
    for number, block in enumerate(model.layers[:blocks]):
        for name, module in block.named_modules():
            shapes = [tuple(weight.shape) for weight in module.parameters(recurse=False)]
            plain = {key: value for key, value in vars(module).items() if isinstance(value, _PLAIN)}
            found.append((number, name, type(module).__name__, shapes, plain))
    return found
