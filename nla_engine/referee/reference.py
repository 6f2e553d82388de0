"""The slow, obvious reference for `patcher`: transformers' own forward of the whole sequence, with one hook."""

from __future__ import annotations

from typing import Any

import torch

from nla_engine.models.decoder import block_output
from nla_engine.models.implementation import attend_by
from nla_engine.models.load import LanguageModel


@torch.inference_mode()
def patched_states(
    lm: LanguageModel, ids: torch.Tensor, layer: int, position: int, vector: torch.Tensor | None
) -> torch.Tensor:
    """Final hidden states [T, d] of one sequence, ids int64 [T], with `vector` [d] as output of block `layer` there.

    vector: None leaves the sequence as it is. Attention is transformers' eager one, which the model has afterwards.
    """
    attend_by(lm.model, "eager")

    def replace(_module: object, _inputs: object, output: Any) -> Any:
        hidden = block_output(output).clone()
        if vector is not None:
            hidden[0, position] = vector.to(hidden)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    hook = lm.blocks[layer].register_forward_hook(replace)
    try:
        states: torch.Tensor = lm.decoder(input_ids=ids[None], use_cache=False).last_hidden_state[0]
    finally:
        hook.remove()
    return states
