"""RMSNorm, with an optional residual added or a gate after it: references in torch, two Triton kernels.

    y = x / sqrt(mean(x^2) + eps) * (w + offset)         [+ residual] [* silu(gate)]

float32 inside, rounded once (transformers also rounds before the weight). offset: 1 for Gemma, whose weights are stored
around 0, else 0. Zhang & Sennrich, arXiv:1910.07467.
"""

from __future__ import annotations

import torch

from nla_engine.ops.backends import has_triton
from nla_engine.ops.triton_module import tl, triton


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    offset: float = 0.0,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [T, d], weight [d], residual [T, d] or None -> [T, d] in x's dtype. Triton where it runs, else torch."""
    return (rms_norm_triton if has_triton(x.device) else rms_norm_reference)(x, weight, eps, offset, residual)


def rms_norm_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    offset: float = 0.0,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """`rms_norm` in plain torch."""
    wide = x.float()
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * (weight.float() + offset)
    return (y if residual is None else y + residual.float()).to(x.dtype)


def gated_rms_norm(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x, gate [T, d], weight [d] -> [T, d] in x's dtype. Triton where it runs, else torch."""
    run = gated_rms_norm_triton if has_triton(x.device) else gated_rms_norm_reference
    return run(x, gate, weight, eps)


def gated_rms_norm_reference(
    x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """`gated_rms_norm` in plain torch."""
    wide = x.float()
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()
    return (y * torch.nn.functional.silu(gate.float())).to(x.dtype)


def gated_rms_norm_triton(
    x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """`gated_rms_norm` as one launch, one program per row."""
    rows, d = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    block = triton.next_power_of_2(d)
    _gated_norm_kernel[(rows,)](
        x,
        gate,
        weight,
        y,
        x.stride(0),
        gate.stride(0),
        d,
        eps,
        BLOCK=block,
        num_warps=min(max(block // 512, 1), 16),
    )
    return y


def rms_norm_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    offset: float = 0.0,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """`rms_norm` as one launch, one program per row."""
    rows, d = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    block = triton.next_power_of_2(d)
    _rms_norm_kernel[(rows,)](
        x,
        weight,
        x if residual is None else residual,
        y,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        d,
        eps,
        offset,
        ADD=residual is not None,
        BLOCK=block,
        num_warps=min(max(block // 512, 1), 16),
    )
    return y


@triton.jit
def _rms_norm_kernel(
    x,  # [T, d], rows x_row apart
    weight,  # [d]
    residual,  # [T, d], rows residual_row apart; not read unless ADD
    y,  # [T, d], contiguous
    x_row,
    residual_row,
    d,
    eps,
    offset,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    real = channel < d
    wide = tl.load(x + row * x_row + channel, mask=real, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / d + eps)
    w = tl.load(weight + channel, mask=real, other=0.0).to(tl.float32) + offset
    value = wide * scale * w
    if ADD:
        value += tl.load(residual + row * residual_row + channel, mask=real, other=0.0).to(tl.float32)
    tl.store(y + row * d + channel, value.to(y.dtype.element_ty), mask=real)


@triton.jit
def _gated_norm_kernel(
    x,  # [T, d], rows x_row apart
    gate,  # [T, d], rows gate_row apart
    weight,  # [d]
    y,  # [T, d], contiguous
    x_row,
    gate_row,
    d,
    eps,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    real = channel < d
    wide = tl.load(x + row * x_row + channel, mask=real, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / d + eps)
    w = tl.load(weight + channel, mask=real, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_row + channel, mask=real, other=0.0).to(tl.float32)
    value = wide * scale * w * g / (1.0 + tl.exp(-g))
    tl.store(y + row * d + channel, value.to(y.dtype.element_ty), mask=real)
