"""Products in fp8 (e4m3): rows and weights quantised row by row, the product scaled back. Reference in torch, Triton.

    s = max(max_k |x_k|, tiny) / 448        q = e4m3(x * (448 / (448 s)))        x w^T ~ (q_x q_w^T) s_x s_w

A row of x is a token, a row of w an output channel. e4m3 rounds to nearest; its largest value is 448. A row with a NaN
or an infinity gets an infinite scale, so that its products are not finite either. Values are always rounded to the
model's dtype before they are quantised: fused or not, the codes are those of `quantise(rms_norm(x))` and so on.
Micikevicius et al., arXiv:2209.05433.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from nla_engine.errors import RequestError, first_line
from nla_engine.ops.backends import triton_fault
from nla_engine.ops.cards import card_of
from nla_engine.ops.gate import gate_reference, gated
from nla_engine.ops.norm import rms_norm_reference
from nla_engine.ops.triton_module import tl, triton

_LARGEST = 448.0
#: The least value used for a row's largest entry: scales, and products of two scales, stay normal float32.
_TINY = 2.0**-60
#: The oldest cards that multiply fp8: Ada.
_CAPABILITY = (8, 9)
#: Rows, channels and columns of the trial product, and how far its result may be from the reference's (relative L2):
#: it sums with 14 bits and rounds to bfloat16.
_TRIAL, _DIFFERENCE = (32, 256, 64), 2**-7


@dataclass(frozen=True)
class Quantised:
    """codes: float8_e4m3fn [n, k]; scale: float32 [n, 1]; the value is codes * scale."""

    codes: torch.Tensor
    scale: torch.Tensor


def has_fp8(device: torch.device) -> bool:
    """Whether the device multiplies fp8 itself; others run the reference."""
    return device.type == "cuda" and not fp8_fault(device)


def check_fp8(device: torch.device) -> None:
    """RequestError if this is a GPU that does not multiply fp8. A CPU runs the reference."""
    if device.type == "cuda" and (fault := fp8_fault(device)):
        raise RequestError(f"{fault}: use --precision full")


@functools.cache
def fp8_fault(device: torch.device) -> str:
    """Why a GPU does not multiply fp8; empty if it does. The first call, before any graph capture, tries a product."""
    card = card_of(device)
    if card.capability < _CAPABILITY:
        return f"{card} does not multiply fp8, which needs an NVIDIA card of compute capability 8.9 or more"
    if fault := triton_fault(device):
        return f"fp8 needs Triton kernels ({fault})"
    random = torch.Generator(device).manual_seed(0)  # a graph of another thread may use torch's own
    rows, channels, columns = _TRIAL
    x, w = (torch.randn(n, channels, device=device, generator=random) for n in (rows, columns))
    x8, w8 = quantise_triton(x), quantise_triton(w)
    wanted = scaled_linear_reference(x8, w8, None, torch.float32)
    try:
        apart = float((_scaled_product(x8, w8, None).float() - wanted).norm() / wanted.norm())
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:  # a torch without products scaled row by row for this card
        return (
            f"{card}: torch {torch.__version__} has no product in fp8 scaled row by row ({first_line(error)})"
        )
    if not apart <= _DIFFERENCE:
        return f"{card}: torch's product in fp8 differs from the reference by {apart:.2g} (limit {_DIFFERENCE:.2g})"
    return ""


def quantise(x: torch.Tensor) -> Quantised:
    """x [n, k] of any float dtype, contiguous. Triton where there is fp8, else the reference."""
    return (quantise_triton if has_fp8(x.device) else quantise_reference)(x)


def rms_norm_quantised(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, add: torch.Tensor | None = None
) -> Quantised:
    """`quantise` of `rms_norm` of x [T, d]; add [T, d] is added to x first, in place. x, add: contiguous."""
    run = rms_norm_quantised_triton if has_fp8(x.device) else rms_norm_quantised_reference
    return run(x, weight, eps, offset, add)


def gate_quantised(both: torch.Tensor, activation: str) -> Quantised:
    """`quantise` of `gate` of both [T, 2 m], contiguous."""
    return (gate_quantised_triton if has_fp8(both.device) else gate_quantised_reference)(both, activation)


def scaled_linear(x: Quantised, w: Quantised, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """x [m, k], w [n, k], bias [n] or None -> x w^T + bias [m, n] in `dtype`. torch._scaled_mm where there is fp8.

    The tensor cores sum with fast accumulation, in about 14 bits; the reference sums in float32.
    """
    if not has_fp8(x.codes.device):
        return scaled_linear_reference(x, w, bias, dtype)
    return _scaled_product(x, w, bias).to(dtype)


def _scaled_product(x: Quantised, w: Quantised, bias: torch.Tensor | None) -> torch.Tensor:
    """`scaled_linear` in bfloat16, by torch._scaled_mm."""
    return torch._scaled_mm(
        x.codes,
        w.codes.t(),
        scale_a=x.scale,
        scale_b=w.scale.t(),
        bias=None if bias is None else bias.to(torch.bfloat16),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def scaled_linear_reference(
    x: Quantised, w: Quantised, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """`scaled_linear` in float32."""
    out = (x.codes.float() @ w.codes.float().t()) * x.scale * w.scale.t()
    return (out if bias is None else out + bias.float()).to(dtype)


def quantise_reference(x: torch.Tensor) -> Quantised:
    """`quantise` in plain torch."""
    wide = x.float()
    size = torch.where(wide.isnan(), torch.inf, wide.abs()).amax(-1, keepdim=True).clamp(min=_TINY)
    inverse = torch.full_like(size, _LARGEST) / size  # torch rounds a number divided by a tensor twice
    return Quantised((wide * inverse).to(torch.float8_e4m3fn), size * (1 / _LARGEST))


def rms_norm_quantised_reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, add: torch.Tensor | None = None
) -> Quantised:
    """`rms_norm_quantised` in plain torch."""
    if add is not None:
        x.add_(add)
    return quantise_reference(rms_norm_reference(x, weight, eps, offset))


def gate_quantised_reference(both: torch.Tensor, activation: str) -> Quantised:
    """`gate_quantised` in plain torch."""
    return quantise_reference(gate_reference(both, activation))


def _empty(rows: int, width: int, device: torch.device) -> Quantised:
    codes = torch.empty((rows, width), dtype=torch.float8_e4m3fn, device=device)
    return Quantised(codes, torch.empty((rows, 1), dtype=torch.float32, device=device))


def quantise_triton(x: torch.Tensor) -> Quantised:
    """`quantise` as one launch, one program per row."""
    rows, width = x.shape
    out = _empty(rows, width, x.device)
    block = min(4096, triton.next_power_of_2(width))
    _quantise_kernel[(rows,)](x, out.codes, out.scale, width, BLOCK=block, num_warps=max(block // 512, 1))
    return out


def rms_norm_quantised_triton(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, add: torch.Tensor | None = None
) -> Quantised:
    """`rms_norm_quantised` as one launch, one program per row."""
    rows, d = x.shape
    out = _empty(rows, d, x.device)
    block = triton.next_power_of_2(d)
    _norm_kernel[(rows,)](
        x,
        x if add is None else add,
        weight,
        out.codes,
        out.scale,
        d,
        eps,
        offset,
        ADD=add is not None,
        BLOCK=block,
        num_warps=min(max(block // 512, 1), 16),
    )
    return out


def gate_quantised_triton(both: torch.Tensor, activation: str) -> Quantised:
    """`gate_quantised` as one launch, one program per row, which keeps it in registers until its scale is known."""
    rows, width = both.shape[0], both.shape[1] // 2
    out = _empty(rows, width, both.device)
    block = min(4096, triton.next_power_of_2(width))
    _gate_kernel[(rows,)](
        both,
        out.codes,
        out.scale,
        width,
        SILU=activation == "silu",
        BLOCK=block,
        PIECES=triton.cdiv(width, block),
        num_warps=max(block // 256, 1),
    )
    return out


@triton.jit
def _size(wide):
    """Largest |x| of a block; infinite if it holds a NaN."""
    return tl.max(tl.where(wide == wide, tl.abs(wide), float("inf")), 0)


@triton.jit
def _quantise_kernel(
    x,  # [T, k], contiguous
    codes,  # e4m3 [T, k], contiguous
    scale,  # float32 [T]
    width,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    size = 8.673617379884035e-19  # 2^-60, see _TINY
    for start in range(0, width, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        wide = tl.load(x + row * width + channel, mask=channel < width, other=0.0).to(tl.float32)
        size = tl.maximum(size, _size(wide))
    inverse = tl.div_rn(448.0, size)
    for start in range(0, width, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        wide = tl.load(x + row * width + channel, mask=channel < width, other=0.0).to(tl.float32)
        tl.store(codes + row * width + channel, (wide * inverse).to(tl.float8e4nv), mask=channel < width)
    tl.store(scale + row, size * 0.002232142857142857)  # 1 / 448


@triton.jit
def _norm_kernel(
    x,  # [T, d], contiguous; written where ADD
    add,  # [T, d], contiguous; not read unless ADD
    weight,  # [d]
    codes,  # e4m3 [T, d], contiguous
    scale,  # float32 [T]
    d,
    eps,
    offset,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    real = channel < d
    at = row * d + channel
    wide = tl.load(x + at, mask=real, other=0.0).to(tl.float32)
    if ADD:
        total = (wide + tl.load(add + at, mask=real, other=0.0).to(tl.float32)).to(x.dtype.element_ty)
        tl.store(x + at, total, mask=real)
        wide = total.to(tl.float32)
    root = tl.rsqrt(tl.sum(wide * wide, 0) / d + eps)
    w = tl.load(weight + channel, mask=real, other=0.0).to(tl.float32) + offset
    y = (wide * root * w).to(x.dtype.element_ty).to(tl.float32)
    size = tl.maximum(_size(y), 8.673617379884035e-19)  # 2^-60, see _TINY
    tl.store(codes + at, (y * tl.div_rn(448.0, size)).to(tl.float8e4nv), mask=real)
    tl.store(scale + row, size * 0.002232142857142857)  # 1 / 448


@triton.jit
def _gate_kernel(
    both,  # [T, 2 m], contiguous
    codes,  # e4m3 [T, m], contiguous
    scale,  # float32 [T]
    width,  # m, more than (PIECES - 1) BLOCK and at most PIECES BLOCK
    SILU: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    pieces = ()
    most = tl.full((BLOCK,), 8.673617379884035e-19, tl.float32)  # 2^-60, see _TINY
    for i in tl.static_range(PIECES):
        y = gated(both, row, width, i * BLOCK + channel, SILU, WHOLE=i < PIECES - 1).to(tl.float32)
        most = tl.maximum(most, tl.abs(y), propagate_nan=tl.PropagateNan.ALL)
        pieces += (y,)  # type: ignore[assignment]
    size = _size(most)
    inverse = tl.div_rn(448.0, size)
    for i in tl.static_range(PIECES):
        at = i * BLOCK + channel
        code = (pieces[i] * inverse).to(tl.float8e4nv)
        if i < PIECES - 1:
            tl.store(codes + row * width + at, code)
        else:
            tl.store(codes + row * width + at, code, mask=at < width)
    tl.store(scale + row, size * 0.002232142857142857)  # 1 / 448
