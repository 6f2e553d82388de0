"""The forward of a gated delta net (Qwen3-Next, Qwen3.5, OLMo-Hybrid) while the engine runs it: prompts in chunks,
decode steps by the recurrence, with a state per slot.

A sequence's first tokens, which follow the shared prefix, always come in a prompt. There its state begins.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from nla_engine.engine.attention import Pass, current_pass
from nla_engine.engine.states import States, delta_ends, delta_shape
from nla_engine.engine.transfer import to_device
from nla_engine.ops import delta
from nla_engine.ops.attention import Shape
from nla_engine.ops.norm import gated_rms_norm, gated_rms_norm_reference

#: A run of a slot: its first token in the pass, how many, slot, position of the first.
Run = tuple[int, int, int, int]


class EngineDelta:
    """Called like the module it replaces, inside a pass of the runner: hidden states [1, T, d] -> [1, T, d]."""

    def __init__(self, module: Any) -> None:
        self.module, self.shape = module, delta_shape(module)
        self.layer = int(module.layer_idx)

    def __call__(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        module, work = self.module, current_pass()
        work.enter(self.layer, Shape(0.0))
        row, z, a, b = self._project(hidden_states)
        states = work.cache.states[self.layer]
        out = (self._step if work.runs is None else self._read)(work, states, row, a, b)
        (norm, last), gate = delta_ends(module), z.reshape(-1, self.shape.value_size)
        run = gated_rms_norm_reference if work.reference else gated_rms_norm
        normed = run(out.flatten(0, 1), gate, norm.weight, norm.variance_epsilon)
        result: torch.Tensor = last(normed.view(1, len(row), -1))
        return result

    def _project(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows [T, channels] of queries, keys and values; z [T, Hv dv]; a and b [T, Hv]."""
        module = self.module
        if hasattr(module, "in_proj_qkvz"):  # Qwen3-Next, by key head
            parts = module.in_proj_qkvz(hidden), module.in_proj_ba(hidden)
            q, k, v, z, b, a = (part[0] for part in module.fix_query_key_value_ordering(*parts))
            return torch.cat([part.flatten(1) for part in (q, k, v)], -1), z.flatten(1), a, b
        if hasattr(module, "g_proj"):  # OLMo-Hybrid, every one by itself
            names = ("q_proj", "k_proj", "v_proj", "g_proj", "a_proj", "b_proj")
            q, k, v, z, a, b = (getattr(module, name)(hidden)[0] for name in names)
            return torch.cat([q, k, v], -1), z, a, b
        layers = (module.in_proj_qkv, module.in_proj_z, module.in_proj_a, module.in_proj_b)
        row, z, a, b = (layer(hidden)[0] for layer in layers)
        return row, z, a, b

    def _step(
        self, work: Pass, states: States, row: torch.Tensor, a: torch.Tensor, b: torch.Tensor
    ) -> torch.Tensor:
        """A decode step -> [T, Hv, dv]."""
        module, weight = self.module, self.module.conv1d.weight[:, 0]
        convolve = delta.convolve_step_reference if work.reference else delta.convolve_step
        x = convolve(row, weight, states.rows, work.slot, work.position)
        step = delta.delta_step_reference if work.reference else delta.delta_step
        return step(x, a, b, module.A_log, module.dt_bias, states.recurrent, work.slot, self.shape)

    def _read(
        self, work: Pass, states: States, row: torch.Tensor, a: torch.Tensor, b: torch.Tensor
    ) -> torch.Tensor:
        """Runs of prompts -> [T, Hv, dv]."""
        assert work.runs is not None
        module, weight = self.module, self.module.conv1d.weight[:, 0]
        if entered := [slot for _, _, slot, position in work.runs if position == work.cache.prefix_size]:
            states.begin(to_device(np.array(entered), row.device))
        x = torch.cat(
            [
                delta.convolve_run(row[token : token + count], weight, states.rows, slot, position)
                for token, count, slot, position in work.runs
            ]
        )
        parts = (*self.shape.split(x), *delta.gates(a, b, module.A_log, module.dt_bias, self.shape.most))
        out = torch.empty((len(row), *self.shape.state[::2]), dtype=row.dtype, device=row.device)
        for runs in of_like_length(work.runs):
            slots = to_device(np.array([slot for _, _, slot, _ in runs]), row.device)
            q, k, v, g, beta = (
                pad_sequence([part[token : token + count] for token, count, _, _ in runs], batch_first=True)
                for part in parts
            )
            attended, after = delta.delta_chunked(q, k, v, g, beta, states.recurrent[slots])
            states.recurrent[slots] = after
            for own, (token, count, _, _) in zip(attended, runs, strict=True):
                out[token : token + count] = own[:count]
        return out


def of_like_length(runs: list[Run]) -> list[list[Run]]:
    """The runs in groups that are padded to at most twice their tokens, or to one chunk each. A slot that has several
    runs in one pass keeps their order: they are in groups of their own."""
    groups: dict[tuple[int, int], list[Run]] = {}
    before: dict[int, int] = {}
    for run in runs:
        number = before.get(run[2], 0)
        before[run[2]] = number + 1
        groups.setdefault((number, (-(-run[1] // delta.CHUNK) - 1).bit_length()), []).append(run)
    return [groups[key] for key in sorted(groups)]
