"""Which tokens may be drawn: top-k, top-p and min-p, cut as transformers cuts. Reference in torch, one Triton launch.

With s = logit / T in float32 and w = exp(s - max s), a token of a row is removed

    top-k   if k or more tokens have a larger s: tokens equal to the k-th stay
    top-p   if its w and those of all tokens before it sum to at most (1 - p) times the sum over what top-k left
            before: smaller s, or equal s and a lower token number (a stable sort in ascending order)
    min-p   if w < min-p

The last token in this order always stays. Rules and their order are those of transformers' TopKLogitsWarper,
TopPLogitsWarper and MinPLogitsWarper. One thing differs: of equal tokens at the edge of top-p, torch.sort decides there
which go, and it need not be stable. Here the lower numbers go.

Sums are exact: w is cut to a multiple of 2^-bits, and the multiples are added as int64 in any order. But w itself is
rounded. So a token whose share of the sum is within about 1e-6 of 1 - p can be on the other side of the edge.

The kernel sorts nothing and searches no edge of top-p. It checks the token that was drawn from the whole vocabulary. If
that one is removed, so are all before it, and it draws again from those behind it, with the same scores. What it
accepts has therefore the best score of all that stay. At top-p 0.9 the first token stays nine times out of ten, and the
check takes one pass over the row. Only top-k needs a search, for the k-th largest logit: some ten passes that count.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from nla_engine.ops.gumbel import LARGEST, draw_key, draw_scores, first_of_best, sortable
from nla_engine.ops.triton_module import tl, triton

#: Logits per step of a program.
_BLOCK = 4096
#: Least divisor of logits, per unit of the largest one: s stays finite. It is far below any temperature in use.
_LEAST = 2.0**-126
_MOST = tl.constexpr(LARGEST)
_PER_UNIT = tl.constexpr(_LEAST)
#: As `sortable` integers: -inf, NaN. And below and above all.
_MINUS_INF = tl.constexpr(-0x7F800001)
_NAN = tl.constexpr(0x7FFFFFFF)
_NONE = tl.constexpr(-0x80000000)


@dataclass(frozen=True)
class Truncation:
    """None: not used. top_p: above 0 to 1. top_k: 1 or more. min_p: 0 to 1. Used in the order top_k, top_p, min_p."""

    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None

    def __str__(self) -> str:
        given = {"top-k": self.top_k, "top-p": self.top_p, "min-p": self.min_p}
        return ", then ".join(f"{n} {v}" for n, v in given.items() if v is not None) or "no truncation"

    def cuts(self, vocabulary: int) -> bool:
        """Whether it can remove any of so many tokens."""
        return self.uses_top_k(vocabulary) or self.uses_top_p or bool(self.min_p)

    def uses_top_k(self, vocabulary: int) -> bool:
        """Whether top-k can."""
        return self.top_k is not None and self.top_k < vocabulary

    @property
    def uses_top_p(self) -> bool:
        """Whether top-p can."""
        return self.top_p is not None and self.top_p < 1

    @property
    def removed(self) -> float:
        """1 - top_p in float32, as transformers compares it."""
        return float(np.float32(1 - (1.0 if self.top_p is None else self.top_p)))

    @property
    def least(self) -> float:
        """min_p in float32."""
        return float(np.float32(self.min_p or 0.0))


def kept(logits: torch.Tensor, temperature: float, truncation: Truncation) -> torch.Tensor:
    """bool [n, V]: which tokens stay, for logits [n, V]. All of a row with NaN, or of -inf alone."""
    vocabulary = logits.shape[-1]
    x = logits.float()
    largest = x.amax(-1, keepdim=True)
    divisor = (largest.abs().clamp(max=LARGEST) * _LEAST).clamp(min=_divisor(temperature))
    s = x / divisor + 0.0  # + 0: -0 is 0
    top = largest / divisor + 0.0
    weight = torch.where(s == top, 1.0, torch.exp(s - top))
    stays = torch.ones_like(s, dtype=torch.bool)
    if truncation.uses_top_k(vocabulary):
        stays &= s >= s.topk(truncation.top_k or 1).values[:, -1:]
    if truncation.uses_top_p:
        _, order = s.sort(stable=True)
        units = (weight * _units(vocabulary)).long() * stays
        sums = units.gather(-1, order).cumsum(-1)
        goes = sums <= (sums[:, -1:].double() * truncation.removed).long()
        goes[:, -1] = False
        stays &= ~goes.scatter(-1, order, goes)
    stays &= weight >= truncation.least
    return stays | ~(largest > -torch.inf)


def _divisor(temperature: float) -> float:
    return min(max(temperature, _LEAST), LARGEST)


def _units(vocabulary: int) -> float:
    """Units per 1 of weight: as many as let the sum of a row, at most `vocabulary`, fit an int64."""
    return 2.0 ** (62 - (vocabulary - 1).bit_length())


def redraw(
    logits: torch.Tensor,
    lanes: torch.Tensor,
    running: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    best: torch.Tensor,
    temperature: float,
    divisors: tuple[float, float],
    key: int,
    truncation: Truncation,
) -> torch.Tensor:
    """int32 [B]: the best token that stays, in lanes that generate; others are not set. One launch, no synchronisation.

    logits: [B, V], each row contiguous
    lanes: int64 [B], slots
    running: sequence, position, active and closing of each slot
    best: int32 [2, B, parts]: the best score of each part of a row, as a sortable integer, and its token
    divisors, key: those of `gumbel`
    """
    lane_count, vocabulary = logits.shape
    sequence, position, active, closing = running
    chosen = torch.empty(lane_count, dtype=torch.int32, device=logits.device)
    _redraw_kernel[(lane_count,)](
        logits,
        lanes,
        sequence,
        position,
        active.view(torch.uint8),
        closing.view(torch.uint8),
        best[0],
        best[1],
        chosen,
        logits.stride(0),
        vocabulary,
        best.shape[2],
        _divisor(temperature),
        *divisors,
        key,
        min(truncation.top_k or 0, vocabulary),
        truncation.removed,
        truncation.least,
        _units(vocabulary),
        TOP_K=truncation.uses_top_k(vocabulary),
        TOP_P=truncation.uses_top_p,
        PARTS=triton.next_power_of_2(best.shape[2]),
        BLOCK=min(_BLOCK, triton.next_power_of_2(vocabulary)),
        num_warps=16,
    )
    return chosen


@triton.jit(do_not_specialize=["key", "top_k"])
def _redraw_kernel(
    logits,  # [B, V], rows logits_row apart
    lanes,  # int64 [B]
    sequence,  # int64 [slots + 1]
    position,  # int64 [slots + 1]
    active,  # uint8 [slots + 1]
    closing,  # uint8 [slots + 1]
    best_order,  # int32 [B, parts]
    best_token,  # int32 [B, parts]
    chosen,  # int32 [B]
    logits_row,
    vocabulary,
    parts,
    temperature,
    logits_divisor,
    noise_divisor,
    key,
    top_k,
    removed,
    min_p,
    units,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lane = tl.program_id(0).to(tl.int64)
    slot = tl.load(lanes + lane)
    if (tl.load(active + slot) != 0) & (tl.load(closing + slot) == 0):  # others draw nothing
        part = tl.arange(0, PARTS)
        order = tl.load(best_order + lane * parts + part, mask=part < parts, other=_NONE)
        first = tl.load(best_token + lane * parts + part, mask=part < parts, other=_NAN)
        token = first_of_best(order, first)
        row = logits + lane * logits_row
        top = _largest(row, vocabulary, BLOCK)
        if (top > _MINUS_INF) & (top < _NAN):
            most = _value(top)
            divisor = tl.maximum(tl.minimum(tl.abs(most), _MOST) * _PER_UNIT, temperature)
            if TOP_K:
                least = _scaled(_value(_kth_largest(row, vocabulary, top_k, top, divisor, BLOCK)), divisor)
            else:
                least = -float("inf")
            most = _scaled(most, divisor)
            s = _scaled(tl.load(row + token).to(tl.float32), divisor)
            draw = draw_key(key, sequence, position, slot)
            if (s < least) | (_weight(s, most) < min_p):
                token = _draw_behind(
                    row,
                    vocabulary,
                    least,
                    -1,
                    most,
                    divisor,
                    min_p,
                    draw,
                    logits_divisor,
                    noise_divisor,
                    BLOCK,
                )
                s = _scaled(tl.load(row + token).to(tl.float32), divisor)
            if TOP_P:
                while _top_p_removes(row, vocabulary, s, token, least, most, divisor, removed, units, BLOCK):
                    token = _draw_behind(
                        row,
                        vocabulary,
                        s,
                        token,
                        most,
                        divisor,
                        min_p,
                        draw,
                        logits_divisor,
                        noise_divisor,
                        BLOCK,
                    )
                    s = _scaled(tl.load(row + token).to(tl.float32), divisor)
        tl.store(chosen + lane, token)


@triton.jit
def _largest(row, vocabulary, BLOCK: tl.constexpr):
    """The largest logit of a row, as a sortable integer."""
    most = tl.full([BLOCK], _NONE, tl.int32)
    for start in range(0, vocabulary, BLOCK):
        _, real, x = _read(row, start, vocabulary, BLOCK)
        most = tl.maximum(most, tl.where(real, sortable(x), _NONE))
    return tl.max(most, 0)


@triton.jit
def _kth_largest(row, vocabulary, k, top, step, BLOCK: tl.constexpr):
    """The k-th largest logit, k < vocabulary, as a sortable integer. top: the largest. step: first distance to try.

    The answer is from `low` to `high`. Down to the first `low` the distance from the largest doubles; then the middle
    between both is tried. Both are values of the row, so a step that finds no other value between them is the last.
    """
    low, high = tl.full([], _NONE, tl.int64), top.to(tl.int64)
    most = _value(top)
    step = tl.maximum(step, tl.abs(most) * 0.0625)
    while low < high:
        between = _value(low.to(tl.int32)) * 0.5 + _value(high.to(tl.int32)) * 0.5
        tried = sortable(tl.where(low == _NONE, most - step, between)).to(tl.int64)
        tried = tl.where((tried > low) & (tried <= high), tried, low + (high - low + 1) // 2)
        step = step * 2.0
        count = tl.zeros([BLOCK], tl.int32)
        over = tl.full([BLOCK], _NAN, tl.int32)
        under = tl.full([BLOCK], _NONE, tl.int32)
        for start in range(0, vocabulary, BLOCK):
            _, real, x = _read(row, start, vocabulary, BLOCK)
            order = sortable(x)
            larger = order >= tried.to(tl.int32)
            count += (real & larger).to(tl.int32)
            over = tl.minimum(over, tl.where(real & larger, order, _NAN))
            under = tl.maximum(under, tl.where(real & (larger == 0), order, _NONE))
        found = tl.sum(count, 0)
        smallest, below = tl.min(over, 0).to(tl.int64), tl.max(under, 0).to(tl.int64)
        low = tl.where(found >= k, smallest, low)
        high = tl.where(found > k, high, tl.where(found == k, smallest, below))
    return high.to(tl.int32)


@triton.jit
def _draw_behind(
    row, vocabulary, s, token, most, divisor, min_p, draw, logits_divisor, noise_divisor, BLOCK: tl.constexpr
):
    """The first token of the best score among those behind (s, token) that min-p keeps."""
    best = tl.full([BLOCK], _NONE, tl.int32)
    first = tl.full([BLOCK], _NAN, tl.int32)
    for start in range(0, vocabulary, BLOCK):
        number, real, x = _read(row, start, vocabulary, BLOCK)
        scaled = _scaled(x, divisor)
        behind = real & ((scaled > s) | ((scaled == s) & (number > token)))
        if tl.max(behind.to(tl.int32), 0) > 0:
            stays = behind & (_weight(scaled, most) >= min_p)
            order = sortable(draw_scores(x, number, draw, logits_divisor, noise_divisor))
            better = stays & (order > best)
            best = tl.where(better, order, best)
            first = tl.where(better, number, first)
    return first_of_best(best, first)


@triton.jit
def _top_p_removes(row, vocabulary, s, token, least, most, divisor, removed, units, BLOCK: tl.constexpr):
    """Whether a token (and all before it) goes: the sum up to it is that of all without what comes behind it."""
    total = tl.zeros([BLOCK], tl.int64)
    behind = tl.zeros([BLOCK], tl.int64)
    for start in range(0, vocabulary, BLOCK):
        number, real, x = _read(row, start, vocabulary, BLOCK)
        scaled = _scaled(x, divisor)
        weight = tl.where(real & (scaled >= least), (_weight(scaled, most) * units).to(tl.int64), 0)
        total += weight
        behind += tl.where((scaled > s) | ((scaled == s) & (number > token)), weight, 0)
    total_sum, behind_sum = tl.sum(total, 0), tl.sum(behind, 0)
    most_removed = (total_sum.to(tl.float64) * removed).to(tl.int64)
    return (behind_sum > 0) & (total_sum - behind_sum <= most_removed)


@triton.jit
def _read(row, start, vocabulary, BLOCK: tl.constexpr):
    """Numbers of the tokens of a block, which of them exist, and their logits in float32."""
    number = start + tl.arange(0, BLOCK)
    real = number < vocabulary
    return number, real, tl.load(row + number, mask=real, other=0.0).to(tl.float32)


@triton.jit
def _scaled(x, divisor):
    """s."""
    return tl.div_rn(x, divisor) + 0.0


@triton.jit
def _weight(s, most):
    """w. most: the largest s."""
    return tl.where(s == most, 1.0, tl.exp(s - most))


@triton.jit
def _value(order):
    """The float32 of a sortable integer."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
