"""What transformers' own masks and configuration say of the windows in which the blocks attend."""

from __future__ import annotations

from typing import Any

import torch

from nla_engine.engine.expected import split_call
from nla_engine.engine.own_attention import knows_attention, own_mask
from nla_engine.models.implementation import attend_by
from nla_engine.models.load import LanguageModel
from nla_engine.ops.attention import Shape


def largest_window(lm: LanguageModel, shapes: list[Shape]) -> int:
    """The largest window that the blocks ask for or the configuration names; 0: none."""
    named = [
        value
        for name, value in vars(lm.config).items()
        if ("window" in name or "chunk" in name) and isinstance(value, int) and not isinstance(value, bool)
    ]
    return max([shape.window for shape in shapes] + [value for value in named if value > 0])


def masks_of_the_library(lm: LanguageModel, length: int) -> list[torch.Tensor | None]:
    """What the last of `length` tokens attends to by transformers' mask for each block: bool [length], or None where
    it makes no mask. The blocks themselves do not run."""
    seen: list[torch.Tensor | None] = []

    def skip(*args: Any, **kwargs: Any) -> Any:
        block = lm.blocks[len(seen)]
        own = own_mask(block, length)
        hidden, _, kwargs = split_call(args, kwargs)
        mask = kwargs.get("attention_mask") if own is None else None
        if mask is not None:
            mask = mask[0, 0, -1, :length]
            mask = mask if mask.dtype == torch.bool else mask == 0
        seen.append(mask if own is None else own)
        return (hidden,) if knows_attention([block]) else hidden  # these blocks return tuples

    implementation = lm.config._attn_implementation
    attend_by(lm.model, "eager")
    for block in lm.blocks:
        block.forward = skip
    try:
        lm.decoder(input_ids=torch.zeros((1, length), dtype=torch.int64, device=lm.device), use_cache=False)
    finally:
        for block in lm.blocks:
            del block.forward
        attend_by(lm.model, implementation)
    return seen
