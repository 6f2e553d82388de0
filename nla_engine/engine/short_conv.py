"""The forward of a gated short convolution (LFM2) while the engine runs it: the last rows of every slot are kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from nla_engine.engine.attention import current_pass
from nla_engine.engine.transfer import to_device
from nla_engine.ops import short_conv
from nla_engine.ops.attention import Shape


class EngineShortConv:
    """Called like the module it replaces, inside a pass of the runner: hidden states [1, T, d] -> [1, T, d]."""

    def __init__(self, module: Any) -> None:
        self.module, self.layer = module, int(module.layer_idx)

    def __call__(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        module, work = self.module, current_pass()
        work.enter(self.layer, Shape(0.0))
        before, after, x = module.in_proj(hidden_states)[0].chunk(3, -1)
        rows, kept, weight = before * x, work.cache.states[self.layer].rows, module.conv.weight[:, 0]
        if work.runs is None:
            mixed = short_conv.step(rows, weight, kept, work.slot, work.position)
        else:
            if entered := [slot for _, _, slot, position in work.runs if position == work.cache.prefix_size]:
                work.cache.states[self.layer].begin(to_device(np.array(entered), rows.device))
            mixed = torch.cat(
                [
                    short_conv.run(rows[token : token + count], weight, kept, slot, position)
                    for token, count, slot, position in work.runs
                ]
            )
        if module.conv.bias is not None:
            mixed += module.conv.bias.float()
        result: torch.Tensor = module.out_proj(after * mixed.to(rows.dtype))
        return result[None]
