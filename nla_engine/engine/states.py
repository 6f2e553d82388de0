"""What blocks keep of a sequence besides keys and values, for every slot: the state of a gated delta rule (Qwen3-Next,
Qwen3.5, OLMo-Hybrid), and the last rows of the convolution before it, or of one that stands alone (LFM2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from nla_engine.ops.delta import DeltaShape

#: Classes of modules whose arithmetic is that of `ops.delta`.
_KNOWN = (
    "Qwen3NextGatedDeltaNet",
    "Qwen3_5GatedDeltaNet",
    "Qwen3_5MoeGatedDeltaNet",
    "OlmoHybridGatedDeltaNet",
)


def delta_module(block: Any) -> Any:
    """The module of a block that mixes tokens by a gated delta rule; None if the block has none that is known."""
    module: Any = getattr(block, "linear_attn", None)
    if type(module).__name__ not in _KNOWN:
        return None
    known = module.conv1d.bias is None and module.activation == "silu" and module.conv_kernel_size > 1
    known &= hasattr(delta_ends(module)[0], "variance_epsilon")
    return module if known else None


def delta_ends(module: Any) -> tuple[Any, Any]:
    """The gated norm and the last product of a module that mixes tokens by a gated delta rule."""
    return (module.o_norm, module.o_proj) if hasattr(module, "o_norm") else (module.norm, module.out_proj)


def delta_shape(module: Any) -> DeltaShape:
    """Of a module that `delta_module` returned."""
    return DeltaShape(
        module.num_k_heads,
        module.num_v_heads,
        module.head_k_dim,
        module.head_v_dim,
        module.conv_kernel_size,
        2.0 if getattr(module, "allow_neg_eigval", False) else 1.0,
    )


#: Classes of modules whose arithmetic is that of `engine.short_conv`.
_CONVOLUTIONS = ("Lfm2ShortConv", "Lfm2MoeShortConv", "Lfm3ShortConv")


@dataclass(frozen=True)
class ConvShape:
    """Channels and taps of a convolution; there is no other state."""

    channels: int
    taps: int
    state: tuple[int, ...] = (0,)

    def slot_bytes(self, itemsize: int) -> int:
        """What a slot keeps for one block, with rows of `itemsize` bytes."""
        return itemsize * self.channels * (self.taps - 1)


def conv_module(block: Any) -> Any:
    """The module of a block that mixes tokens by a short convolution; None if the block has none that is known."""
    module: Any = getattr(block, "conv", None)
    return module if type(module).__name__ in _CONVOLUTIONS and module.conv_kernel_size > 1 else None


def kept_shape(block: Any) -> DeltaShape | ConvShape | None:
    """Of what a block keeps instead of keys and values; None: it attends, or is not known."""
    if (delta := delta_module(block)) is not None:
        return delta_shape(delta)
    conv = conv_module(block)
    return None if conv is None else ConvShape(conv.conv.in_channels, conv.conv_kernel_size)


@dataclass
class States:
    """Of one block. recurrent: float32 [slots + 1, Hv, dk, dv], empty where there is a convolution alone; rows:
    [slots + 1, k - 1, channels], see `ops.short_conv`.

    prefix: both of them behind the shared prefix, without the dimension of slots; None: there is no prefix
    """

    recurrent: torch.Tensor
    rows: torch.Tensor
    prefix: tuple[torch.Tensor, torch.Tensor] | None = None

    def begin(self, slots: torch.Tensor) -> None:
        """New sequences read their first tokens in these slots, int64 [n]."""
        if self.prefix is None:
            self.recurrent[slots] = 0.0  # rows at negative positions are not read
        else:
            self.recurrent[slots], self.rows[slots] = self.prefix

    def keep_as_prefix(self, slot: int) -> None:
        """What this slot has read is the shared prefix."""
        self.prefix = self.recurrent[slot].clone(), self.rows[slot].clone()

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Slots `target` go on from where slots `source` are, int64 [n] each."""
        for held in (self.recurrent, self.rows):
            held[target] = held[source]
