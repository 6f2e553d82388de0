"""What the hardware allows: two ceilings that are measured, and the times that follow from them for each kind of work.

The formulas count what no implementation can avoid: each weight read once per step, two operations per weight and
token, each cached key and value read once. Attention's own arithmetic, norms and sampling are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nla_engine.bench.timing import median, time_launches
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
    """What a model costs: parameters of one block and of the head, and bytes of keys and values that a token leaves."""

    blocks: int
    block_parameters: float
    head_parameters: int
    kv_bytes: int
    itemsize: int

    @classmethod
    def of(cls, lm: LanguageModel) -> ModelSize:
        """Counted from the model's parameters. The embedding is left out, since it is a look-up; a tied head is not."""
        config = lm.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        blocks = len(lm.blocks)
        return cls(
            blocks=blocks,
            block_parameters=sum(p.numel() for p in lm.blocks.parameters()) / blocks,
            head_parameters=lm.vocab_size * lm.d_model,
            kv_bytes=2 * blocks * heads * head_size * lm.dtype.itemsize,
            itemsize=lm.dtype.itemsize,
        )

    @property
    def parameters(self) -> float:
        """Parameters of every block and the head: what a decode step reads."""
        return self.blocks * self.block_parameters + self.head_parameters


def decode_step_seconds(
    size: ModelSize, hardware: Hardware, batch: int, context: float, shared: int = 0
) -> float:
    """One step of `batch` sequences of `context` tokens, of which the first `shared` are the same in all.

    max(weight bytes / copy, 2 * parameters * batch / flops) + KV bytes / copy
    """
    weights = max(
        size.parameters * size.itemsize / hardware.copy, 2 * size.parameters * batch / hardware.flops
    )
    return weights + (batch * (context - shared) + shared) * size.kv_bytes / hardware.copy


def prefill_seconds(size: ModelSize, hardware: Hardware, tokens: float, blocks: int | None = None) -> float:
    """Reading `tokens` through the first `blocks` blocks (all): 2 * block parameters * tokens / flops."""
    blocks = size.blocks if blocks is None else blocks
    return 2 * blocks * size.block_parameters * tokens / hardware.flops


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
    return 2 * (blocks * size.block_parameters + size.head_parameters) * patched / hardware.flops


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
