"""How far one next-token distribution lies from another, from their logits: reference in torch, one Triton kernel.

With P = softmax(x), Q = softmax(y), in float32 and in nats:

    kl = sum P (log P - log Q)        change = log Q(token) - log P(token)        same: argmax x = argmax y

A token of probability 0 in P adds nothing. Of equal logits the first is the largest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nla_engine.ops.backends import has_triton
from nla_engine.ops.triton_module import tl, triton

_BLOCK = 2048


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
    """`divergence` as one launch, one program for each y. Each reads both rows twice and keeps nothing of them."""
    lanes, vocabulary = y.shape
    out = torch.empty((3, lanes), dtype=torch.float32, device=y.device)
    if lanes:
        _divergence_kernel[(lanes,)](
            x, y, row, token, out, x.stride(0), y.stride(0), lanes, vocabulary, BLOCK=_BLOCK, num_warps=8
        )
    return Divergence(*out)


def _of(logprobs: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """float32 [n]: the log-probabilities of these tokens, int64 [n]; NaN for -1."""
    found = logprobs.gather(-1, token.clamp(min=0)[:, None])[:, 0]
    return found.masked_fill(token < 0, torch.nan)


@triton.jit
def _seen(values, place, biggest, total, best):
    """Maximum, sum of exp(value - maximum) and place of the maximum of each column, with one more value in each."""
    larger = values > biggest
    new = tl.where(larger, values, biggest)
    base = tl.where(new == -float("inf"), 0.0, new)
    return new, total * tl.exp(biggest - base) + tl.exp(values - base), tl.where(larger, place, best)


@triton.jit
def _joined(biggest, total, best):
    """log(sum(exp)) of all columns together, and the first place of their maximum."""
    top = tl.max(biggest, 0)
    base = tl.where(top == -float("inf"), 0.0, top)
    whole = tl.sum(total * tl.exp(biggest - base), 0)
    return base + tl.log(whole), tl.min(tl.where(biggest == top, best, 2147483647), 0)


@triton.jit
def _divergence_kernel(
    x,  # [R, V], rows x_row apart
    y,  # [n, V], rows y_row apart
    row,  # int64 [n]
    token,  # int64 [n]
    out,  # float32 [3, n]: kl, same, change
    x_row,
    y_row,
    lanes,
    vocabulary,
    BLOCK: tl.constexpr,
):
    lane = tl.program_id(0).to(tl.int64)
    own, other = x + tl.load(row + lane) * x_row, y + lane * y_row
    column = tl.arange(0, BLOCK)
    big_x = tl.full([BLOCK], -float("inf"), tl.float32)
    big_y = tl.full([BLOCK], -float("inf"), tl.float32)
    sum_x = tl.zeros([BLOCK], tl.float32)
    sum_y = tl.zeros([BLOCK], tl.float32)
    best_x = tl.zeros([BLOCK], tl.int32)
    best_y = tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocabulary, BLOCK):
        place = start + column
        real = place < vocabulary
        a = tl.load(own + place, mask=real, other=-float("inf")).to(tl.float32)
        b = tl.load(other + place, mask=real, other=-float("inf")).to(tl.float32)
        big_x, sum_x, best_x = _seen(a, place, big_x, sum_x, best_x)
        big_y, sum_y, best_y = _seen(b, place, big_y, sum_y, best_y)
    log_x, first_x = _joined(big_x, sum_x, best_x)
    log_y, first_y = _joined(big_y, sum_y, best_y)
    apart = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        place = start + column
        real = place < vocabulary
        a = tl.load(own + place, mask=real, other=-float("inf")).to(tl.float32) - log_x
        b = tl.load(other + place, mask=real, other=-float("inf")).to(tl.float32) - log_y
        chance = tl.exp(a)
        nothing = chance == 0.0
        apart += chance * (tl.where(nothing, 0.0, a) - tl.where(nothing, 0.0, b))
    kl = tl.sum(apart, 0)
    wanted = tl.load(token + lane)
    there = wanted >= 0
    said = tl.load(own + wanted, mask=there, other=0.0).to(tl.float32) - log_x
    now = tl.load(other + wanted, mask=there, other=0.0).to(tl.float32) - log_y
    tl.store(out + lane, tl.where(kl < 0.0, 0.0, kl))
    tl.store(out + lanes + lane, (first_x == first_y).to(tl.float32))
    tl.store(out + 2 * lanes + lane, tl.where(there, now - said, float("nan")))
