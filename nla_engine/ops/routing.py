"""Which experts a token takes, and how much of each: reference in torch, one Triton kernel.

    weights = softmax(logits) at the k largest, divided by their sum if they are to add up to 1;  times a scale

A softmax over the k largest alone is the same as one over all whose k largest are divided by their sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nla_engine.ops.backends import has_triton
from nla_engine.ops.triton_module import tl, triton

#: Tokens of a program.
_ROWS = 4


@dataclass(frozen=True)
class Routing:
    """top: k. renormed: whether a token's weights add up to `scale`. dtype: of the weights; None: as the logits'."""

    top: int
    renormed: bool
    scale: float = 1.0
    dtype: torch.dtype | None = None


def route(logits: torch.Tensor, how: Routing) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [T, E], contiguous -> weights [T, k], and chosen experts int64 [T, k], the likeliest first; of equal ones
    the first, in the kernel. float32 inside, rounded once. Triton where it runs, else the reference."""
    return (route_triton if has_triton(logits.device) else route_reference)(logits, how)


def route_reference(logits: torch.Tensor, how: Routing) -> tuple[torch.Tensor, torch.Tensor]:
    """`route` in plain torch."""
    weights, chosen = logits.float().softmax(-1).topk(how.top, -1)
    if how.renormed:
        weights = weights / weights.sum(-1, keepdim=True)
    return (weights * how.scale).to(how.dtype or logits.dtype), chosen


def route_triton(logits: torch.Tensor, how: Routing) -> tuple[torch.Tensor, torch.Tensor]:
    """`route` as one launch. ValueError for logits that are not contiguous."""
    if not logits.is_contiguous():
        raise ValueError("the logits of a router are contiguous")
    tokens, experts = logits.shape
    weights = logits.new_empty((tokens, how.top), dtype=how.dtype or logits.dtype)
    chosen = logits.new_empty((tokens, how.top), dtype=torch.int64)
    _route_kernel[(triton.cdiv(tokens, _ROWS),)](
        logits,
        weights,
        chosen,
        tokens,
        experts,
        how.scale,
        TOP=how.top,
        RENORMED=how.renormed,
        ROWS=_ROWS,
        BLOCK_E=triton.next_power_of_2(experts),
        BLOCK_K=triton.next_power_of_2(how.top),
        num_warps=_ROWS,
    )
    return weights, chosen


# Packed passes have any number of tokens: one compilation serves them all.
@triton.jit(do_not_specialize=["tokens"])
def _route_kernel(
    logits,  # [T, E]
    weights,  # [T, TOP]
    chosen,  # int64 [T, TOP]
    tokens,
    experts,
    scale,
    TOP: tl.constexpr,
    RENORMED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    expert, place = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    real = (token < tokens)[:, None]
    none = float("-inf")
    at = logits + token[:, None] * experts + expert[None]
    left = tl.load(at, mask=real & (expert < experts)[None], other=0.0).to(tl.float32)
    left = tl.where(left == left, left, -1e38)  # NaN: so that its token takes experts that there are
    left = tl.where((expert < experts)[None], left, none)
    largest = tl.max(left, 1)
    total = tl.zeros([ROWS], tl.float32) if RENORMED else tl.sum(tl.exp(left - largest[:, None]), 1)
    taken = tl.zeros([ROWS, BLOCK_K], tl.float32)
    number = tl.zeros([ROWS, BLOCK_K], tl.int32)
    for each in tl.static_range(TOP):
        most = tl.max(left, 1)
        best = tl.min(tl.where(left == most[:, None], expert[None], BLOCK_E), 1)
        share = tl.exp(most - largest)
        if RENORMED:
            total += share
        taken = tl.where((place == each)[None], share[:, None], taken)
        number = tl.where((place == each)[None], best[:, None], number)
        left = tl.where(expert[None] == best[:, None], none, left)
    to = token[:, None] * TOP + place[None]
    inside = real & (place < TOP)[None]
    tl.store(weights + to, (taken / total[:, None] * scale).to(weights.dtype.element_ty), mask=inside)
    tl.store(chosen + to, number.to(tl.int64), mask=inside)
