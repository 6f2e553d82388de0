"""What the hardware allows: two ceilings that are measured, and the times that follow from them for each kind of work.

The formulas count what no implementation can avoid: each weight read once per step, two operations per weight and
token, each cached key and value within a window read once, each recurrent state read and written once. Compressed keys
are read as they are kept, one row for all heads. Of experts, a step reads those that any of its tokens is expected to
choose, and a token takes its own. Attention's own arithmetic, norms and sampling are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nla_engine.bench.timing import median, time_launches
from nla_engine.engine.slots import borrowed, row_bytes, state_shapes
from nla_engine.models.load import LanguageModel


@dataclass(frozen=True)
class Hardware:
    """copy: bytes per second, read plus written, of a copy on the device. flops: of a product in the model's dtype."""

    copy: float
    flops: float

    def times(self, devices: int) -> Hardware:
        """So many of them together, if they had nothing to tell each other."""
        return Hardware(self.copy * devices, self.flops * devices)


@dataclass(frozen=True)
class ModelSize:
    """What a model costs: parameters of one block and of the head, and bytes of keys and values of a token that the
    blocks read, each its own or those that it borrows.

    windowed_bytes: those of them in blocks that see `window` tokens. state_bytes: that a sequence keeps whatever its
    length. expert_parameters: of all experts of one block. chosen: the part of the experts that a token takes.
    """

    blocks: int
    block_parameters: float
    head_parameters: int
    kv_bytes: int
    itemsize: int
    windowed_bytes: int = 0
    window: int = 0
    state_bytes: int = 0
    expert_parameters: float = 0.0
    chosen: float = 1.0

    @classmethod
    def of(cls, lm: LanguageModel) -> ModelSize:
        """Counted from the model's parameters. The embedding is left out, since it is a look-up; a tied head is not."""
        config = lm.config
        blocks, states, own = len(lm.blocks), state_shapes(lm), row_bytes(lm)
        read = own | {layer: own[source] for layer, source in borrowed(lm).items()}
        kinds = dict(enumerate(getattr(config, "layer_types", None) or ()))
        experts = [
            weight.numel()
            for name, weight in lm.blocks.named_parameters()
            if "experts" in name and "shared" not in name
        ]
        total, chosen = (
            next((value for name in names if (value := getattr(config, name, None))), 1)
            for names in (("num_local_experts", "num_experts"), ("num_experts_per_tok", "top_k_experts"))
        )
        return cls(
            blocks=blocks,
            block_parameters=sum(p.numel() for p in lm.blocks.parameters()) / blocks,
            head_parameters=lm.vocab_size * lm.d_model,
            kv_bytes=sum(read.values()),
            itemsize=lm.dtype.itemsize,
            windowed_bytes=sum(
                each for layer, each in read.items() if kinds.get(layer) == "sliding_attention"
            ),
            window=getattr(config, "sliding_window", None) or 0,
            state_bytes=sum(shape.slot_bytes(lm.dtype.itemsize) for shape in states.values()),
            expert_parameters=sum(experts) / blocks,
            chosen=chosen / total if experts else 1.0,
        )

    @property
    def parameters(self) -> float:
        """Parameters of every block and the head."""
        return self.blocks * self.block_parameters + self.head_parameters

    @property
    def active(self) -> float:
        """Parameters of a block that one token takes."""
        return self.block_parameters - (1 - self.chosen) * self.expert_parameters

    def read(self, batch: int) -> float:
        """Parameters that a decode step of so many tokens is expected to read: an expert that no token takes is not."""
        idle = (1 - self.chosen) ** batch
        return self.parameters - idle * self.blocks * self.expert_parameters

    def kept_bytes(self, batch: int, context: float, shared: int) -> float:
        """Bytes of keys, values and states that a decode step reads or writes."""
        seen = min(context, self.window) if self.window else context
        common = max(shared - (context - seen), 0)  # what a window still shows of the shared tokens
        full = (self.kv_bytes - self.windowed_bytes) * (batch * (context - shared) + shared)
        return full + self.windowed_bytes * (batch * (seen - common) + common) + 2 * batch * self.state_bytes


def decode_step_seconds(
    size: ModelSize, hardware: Hardware, batch: int, context: float, shared: int = 0
) -> float:
    """One step of `batch` sequences of `context` tokens, of which the first `shared` are the same in all.

    max(weight bytes / copy, 2 * parameters of a token * batch / flops) + bytes of keys, values and states / copy
    """
    active = size.blocks * size.active + size.head_parameters
    weights = max(size.read(batch) * size.itemsize / hardware.copy, 2 * active * batch / hardware.flops)
    return weights + size.kept_bytes(batch, context, shared) / hardware.copy


def prefill_seconds(size: ModelSize, hardware: Hardware, tokens: float, blocks: int | None = None) -> float:
    """Reading `tokens` through the first `blocks` blocks (all): 2 * a token's parameters * tokens / flops."""
    blocks = size.blocks if blocks is None else blocks
    return 2 * blocks * size.active * tokens / hardware.flops


def generate_seconds(
    size: ModelSize, hardware: Hardware, requests: int, prompt: float, new: int, slots: int, shared: int = 0
) -> float:
    """`requests` of `prompt` + `new` tokens in `slots`, always full; `shared` prompt tokens are read once for all.

    prompt: the mean, if they differ. This is prefill of what is not shared, then requests / slots * new steps at the
    mean context, prompt + new / 2.
    """
    steps = requests / slots * new
    step = decode_step_seconds(size, hardware, slots, prompt + new / 2, shared)
    return prefill_seconds(size, hardware, requests * (prompt - shared)) + steps * step


def patch_seconds(size: ModelSize, hardware: Hardware, patched: float, blocks: int) -> float:
    """`patched` tokens through the last `blocks` blocks and the head: 2 * parameters * tokens / flops."""
    return 2 * (blocks * size.active + size.head_parameters) * patched / hardware.flops


def long_seconds(size: ModelSize, hardware: Hardware, prompt: int, lengths: Sequence[int]) -> float:
    """Requests of `prompt` tokens, each with its own number of new tokens, in slots of their own, so that all start at
    once: no run has fuller steps. This is their prefill, then the steps of those that still run."""
    ends = np.sort(np.asarray(lengths))
    running = len(ends) - np.searchsorted(ends, np.arange(1, ends[-1] + 1))
    steps = (
        decode_step_seconds(size, hardware, int(batch), prompt + step)
        for step, batch in enumerate(running.tolist())
    )
    return prefill_seconds(size, hardware, len(ends) * prompt) + sum(steps)


def measure_hardware(device: torch.device, dtype: torch.dtype) -> Hardware:
    """Medians of copies of 2 GiB and of matrix products 8192^3 on random numbers (far smaller ones on a CPU)."""
    large = device.type == "cuda"
    count, side, repeats = (1 << 31, 8192, 20) if large else (1 << 25, 256, 5)
    random = torch.randn(side, side, device=device).to(dtype)
    pairs = [
        (
            torch.zeros(count, dtype=torch.uint8, device=device),
            torch.ones(count, dtype=torch.uint8, device=device),
        )
        for _ in range(2)
    ]
    copies: list[Callable[[], Any]] = [lambda a=a, b=b: a.copy_(b) for a, b in pairs]  # type: ignore[misc]
    copy = 2 * count / median(time_launches(copies, device, repeats))
    del pairs, copies
    sets = [(random, random.roll(i + 1, 0), torch.empty_like(random)) for i in range(3)]
    products: list[Callable[[], Any]] = [lambda a=a, b=b, c=c: torch.mm(a, b, out=c) for a, b, c in sets]  # type: ignore[misc]
    flops = 2 * side**3 / median(time_launches(products, device, repeats))
    return Hardware(copy, flops)
