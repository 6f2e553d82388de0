"""The gate of a gated MLP: reference in torch, one Triton kernel.

    y = act(g) * u        with [g, u] side by side in one row; act: silu (SwiGLU) or tanh-approximated gelu (GeGLU)

Shazeer, arXiv:2002.05202.
"""

from __future__ import annotations

import torch

from nla_engine.ops.backends import has_triton
from nla_engine.ops.triton_module import tl, triton

#: transformers' names of the activations that the kernel knows.
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu", "gelu_new": "gelu"}


def gate(both: torch.Tensor, activation: str) -> torch.Tensor:
    """both [T, 2 m], contiguous; activation "silu" or "gelu" -> [T, m]. Triton where it runs, else the reference."""
    return (gate_triton if has_triton(both.device) else gate_reference)(both, activation)


def gate_reference(both: torch.Tensor, activation: str) -> torch.Tensor:
    """`gate` in plain torch."""
    g, u = both.float().chunk(2, -1)
    act = (
        torch.nn.functional.silu(g)
        if activation == "silu"
        else torch.nn.functional.gelu(g, approximate="tanh")
    )
    return (act * u).to(both.dtype)


def gate_triton(both: torch.Tensor, activation: str) -> torch.Tensor:
    """`gate` as one launch."""
    rows, width = both.shape[0], both.shape[1] // 2
    y = torch.empty((rows, width), dtype=both.dtype, device=both.device)
    block = min(2048, triton.next_power_of_2(width))
    _gate_kernel[(rows, triton.cdiv(width, block))](
        both, y, width, SILU=activation == "silu", BLOCK=block, num_warps=4
    )
    return y


@triton.jit
def _gate_kernel(
    both,  # [T, 2 m], contiguous
    y,  # [T, m], contiguous
    width,
    SILU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = channel < width
    tl.store(y + row * width + channel, gated(both, row, width, channel, SILU), mask=real)


@triton.jit
def gated(both, row, width, channel, SILU: tl.constexpr, WHOLE: tl.constexpr = False):
    """The channels `channel` of a row of the result, rounded to the dtype of both [T, 2 m]; 0 past the width m, where
    no channel may be if WHOLE."""
    at = both + row * 2 * width + channel
    if WHOLE:
        g, u = tl.load(at).to(tl.float32), tl.load(at + width).to(tl.float32)
    else:
        real = channel < width
        g = tl.load(at, mask=real, other=0.0).to(tl.float32)
        u = tl.load(at + width, mask=real, other=0.0).to(tl.float32)
    return (activated(g, SILU) * u).to(both.dtype.element_ty)


@triton.jit
def activated(g, SILU: tl.constexpr):
    """silu(g), or gelu(g) as tanh approximates it; g: float32."""
    if SILU:
        act = over_one_and(g, g * -1.4426950408889634)  # log2(e)
    else:  # g (1 + tanh(z)) / 2 = g / (1 + exp(-2 z)), z = sqrt(2 / pi) (g + 0.044715 g^3)
        act = over_one_and(g, (g + 0.044715 * g * g * g) * -2.302208198144325)
    return act


@triton.jit
def over_one_and(g, e):
    """g / (1 + 2^e) as g r r, r = 1 / sqrt(1 + 2^e): a quotient or a natural exponential takes more instructions."""
    root = tl.rsqrt(1.0 + tl.exp2(e))  # 0 where 2^e overflows, and so is the result
    return g * root * root
