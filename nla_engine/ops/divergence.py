"""How far one next-token distribution lies from another, from their logits: reference in torch, Triton kernels.

With P = softmax(x), Q = softmax(y), in float32 and in nats:

    kl = sum P (log P - log Q)        change = log Q(token) - log P(token)        same: argmax x = argmax y

A token of probability 0 in P adds nothing. Of equal logits the first is the largest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nla_engine.ops.backends import has_triton
from nla_engine.ops.triton_module import tl, triton

#: Columns that a program reads at once, its warps, and the parts of a row of x, which have a program each.
_BLOCK, _WARPS, _PARTS = 2048, 4, 16


@dataclass(frozen=True)
class Divergence:
    """float32 [n] each: kl, not below 0; same: 1 or 0; change: NaN where no token was asked for."""

    kl: torch.Tensor
    same: torch.Tensor
    change: torch.Tensor


def divergence(
    x: torch.Tensor, y: torch.Tensor, row: torch.Tensor, token: torch.Tensor, *, plain: bool = False
) -> Divergence:
    """Logits x [R, V] and y [n, V], contiguous, of one dtype; row int64 [n], which x belongs to each y.

    token: int64 [n], -1 for none; plain: in torch on every device. Launches only: no synchronisation.
    """
    run = divergence_reference if plain or not has_triton(y.device) else divergence_triton
    return run(x, y, row, token)


def divergence_reference(
    x: torch.Tensor, y: torch.Tensor, row: torch.Tensor, token: torch.Tensor
) -> Divergence:
    """`divergence` in plain torch."""
    before, after = x.float().log_softmax(-1), y.float().log_softmax(-1)
    change = _of(after, token) - _of(before[row], token)
    same = after.argmax(-1) == before.argmax(-1)[row]
    before = before[row]
    chance = before.exp()
    kl = torch.where(chance != 0, chance * (before - after), 0.0).sum(-1)
    return Divergence(kl.clamp(min=0.0), same.float(), change)


def divergence_triton(x: torch.Tensor, y: torch.Tensor, row: torch.Tensor, token: torch.Tensor) -> Divergence:
    """`divergence` as two launches: softmax and maximum of each x, then one program for each y, which reads it once."""
    lanes, vocabulary = y.shape
    out = torch.empty((3, lanes), dtype=torch.float32, device=y.device)
    part = triton.cdiv(triton.cdiv(vocabulary, _PARTS), _BLOCK) * _BLOCK
    found = torch.empty((2, len(x), _PARTS), dtype=torch.float32, device=y.device)
    first = torch.empty((len(x), _PARTS), dtype=torch.int32, device=y.device)
    if lanes:
        _softmax_kernel[(len(x), _PARTS)](
            x, found, first, x.stride(0), found.stride(0), vocabulary, part, BLOCK=_BLOCK, num_warps=_WARPS
        )
        _divergence_kernel[(lanes,)](
            x,
            y,
            found,
            first,
            row,
            token,
            out,
            x.stride(0),
            y.stride(0),
            found.stride(0),
            lanes,
            vocabulary,
            PARTS=_PARTS,
            BLOCK=_BLOCK,
            num_warps=_WARPS,
        )
    return Divergence(*out)


def _of(logprobs: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """float32 [n]: the log-probabilities of these tokens, int64 [n]; NaN for -1."""
    found = logprobs.gather(-1, token.clamp(min=0)[:, None])[:, 0]
    return found.masked_fill(token < 0, torch.nan)


@triton.jit
def _read(x, start, vocabulary, BLOCK: tl.constexpr):
    """BLOCK values of a row from place `start` on, float32 [BLOCK / 8, 8]; -inf behind its end. A thread reads a row of
    these, so what is computed along it takes no other thread."""
    place = start + tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None]
    return place, tl.load(x + place, mask=place < vocabulary, other=-float("inf")).to(tl.float32)


@triton.jit
def _begin(vocabulary, ROWS: tl.constexpr):
    """Maximum, sum of exp(value - maximum) and block of the maximum of each row of blocks, of no value yet. The maximum
    is finite, so that no finite value is infinitely far from it."""
    lowest = tl.full([ROWS], -3.4028234663852886e38, tl.float32)
    return lowest, tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.int32) + vocabulary


@triton.jit
def _seen(values, start, biggest, total, best):
    """The same with one more block of values, from place `start` on."""
    largest = tl.maximum(biggest, tl.max(values, 1))
    total = total * tl.exp(biggest - largest) + tl.sum(tl.exp(values - largest[:, None]), 1)
    return largest, total, tl.where(largest > biggest, start, best)


@triton.jit
def _joined(biggest, total, best):
    """The same of all rows together, with the first block or place that has the maximum."""
    top = tl.max(biggest, 0)
    return (
        top,
        tl.sum(total * tl.exp(biggest - top), 0),
        tl.min(tl.where(biggest == top, best, 2147483647), 0),
    )


@triton.jit
def _first(x, top, start, vocabulary, BLOCK: tl.constexpr):
    """The first place of a value in the block from `start` on."""
    place, values = _read(x, tl.minimum(start, vocabulary), vocabulary, BLOCK)
    return tl.min(tl.min(tl.where(values == top, place, 2147483647), 1), 0)


@triton.jit
def _softmax_kernel(
    x,  # [R, V], rows x_row apart
    found,  # float32 [2, R, parts]: of each part the maximum and the sum of exp(value - maximum)
    first,  # int32 [R, parts]: the first place of the maximum
    x_row,
    found_kind,
    vocabulary,
    part,  # columns of a part, a multiple of BLOCK
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * part
    own = x + row * x_row
    biggest, total, best = _begin(vocabulary, BLOCK // 8)
    for start in range(begin, tl.minimum(begin + part, vocabulary), BLOCK):
        _, a = _read(own, start, vocabulary, BLOCK)
        biggest, total, best = _seen(a, start, biggest, total, best)
    top, whole, block = _joined(biggest, total, best)
    at = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(found + at, top)
    tl.store(found + found_kind + at, whole)
    tl.store(first + at, _first(own, top, block, vocabulary, BLOCK))


@triton.jit
def _divergence_kernel(
    x,  # [R, V], rows x_row apart
    y,  # [n, V], rows y_row apart
    found,  # float32 [2, R, PARTS], from the other kernel
    first,  # int32 [R, PARTS], the same
    row,  # int64 [n]
    token,  # int64 [n]
    out,  # float32 [3, n]: kl, same, change
    x_row,
    y_row,
    found_kind,
    lanes,
    vocabulary,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """kl = sum P (x - y) + sum P (log sum exp y - log sum exp x), from one reading of y.

    The sum of P is 1 but for rounding, which cancels in the whole where x and y differ by a constant.
    """
    lane = tl.program_id(0).to(tl.int64)
    mine = tl.load(row + lane)
    own, other = x + mine * x_row, y + lane * y_row
    part = mine * PARTS + tl.arange(0, PARTS)
    top_x, sum_x, first_x = _joined(
        tl.load(found + part), tl.load(found + found_kind + part), tl.load(first + part)
    )
    log_x = tl.log(sum_x)
    biggest, total, best = _begin(vocabulary, BLOCK // 8)
    apart = tl.zeros([BLOCK // 8], tl.float32)
    chances = tl.zeros([BLOCK // 8], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        _, a = _read(own, start, vocabulary, BLOCK)
        _, b = _read(other, start, vocabulary, BLOCK)
        biggest, total, best = _seen(b, start, biggest, total, best)
        chance = tl.exp(a - (top_x + log_x))
        some = chance > 0.0  # elsewhere a and b may both be -inf
        apart += tl.sum(chance * (tl.where(some, a, 0.0) - tl.where(some, b, 0.0)), 1)
        chances += tl.sum(chance, 1)
    top_y, sum_y, block = _joined(biggest, total, best)
    first_y = _first(other, top_y, block, vocabulary, BLOCK)
    log_y = tl.log(sum_y)
    kl = tl.sum(apart, 0) + tl.sum(chances, 0) * ((top_y - top_x) + (log_y - log_x))
    wanted = tl.load(token + lane)
    there = wanted >= 0
    said = tl.load(own + wanted, mask=there, other=0.0).to(tl.float32) - top_x - log_x
    now = tl.load(other + wanted, mask=there, other=0.0).to(tl.float32) - top_y - log_y
    tl.store(out + lane, tl.where(kl < 0.0, 0.0, kl))
    tl.store(out + lanes + lane, (first_x == first_y).to(tl.float32))
    tl.store(out + 2 * lanes + lane, tl.where(there, now - said, float("nan")))
