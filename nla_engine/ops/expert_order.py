"""Chosen experts, sorted: where the row of each token and expert goes if the rows of an expert stand together.

References in torch, two Triton kernels: the order, and the weighted sum that brings the rows back to their tokens.
Sort and sum are the same for the same input, bit by bit: no atomic operations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nla_engine.ops.backends import has_triton
from nla_engine.ops.triton_module import tl, triton

_BLOCK = 1024


@dataclass(frozen=True)
class ExpertOrder:
    """S = T * k rows of T tokens with k experts each, those of expert 0 first; of one expert in the order of tokens.

    All int32. token [S]: whose row it is. place [T, k]: where the row of a token and its expert is. ends [E]: where the
    rows of each expert end. The rows of each expert are cut into tiles of `height`, the last one of an expert may have
    fewer: tile_expert, tile_row [S // height + E] say whose rows it has and which is its first. Where tile_expert is
    -1, there is no tile.
    """

    token: torch.Tensor
    place: torch.Tensor
    ends: torch.Tensor
    tile_expert: torch.Tensor
    tile_row: torch.Tensor
    height: int


def order_by_expert(chosen: torch.Tensor, experts: int, height: int) -> ExpertOrder:
    """chosen int64 [T, k], contiguous, each in [0, experts) -> the order. Triton where it runs, else the reference."""
    run = order_by_expert_triton if has_triton(chosen.device) else order_by_expert_reference
    return run(chosen, experts, height)


def order_by_expert_reference(chosen: torch.Tensor, experts: int, height: int) -> ExpertOrder:
    """`order_by_expert` in plain torch."""
    flat = chosen.flatten()
    count = torch.bincount(flat, minlength=experts)
    ends = count.cumsum(0)
    source = flat.argsort(stable=True)
    place = torch.empty_like(source)
    place[source] = torch.arange(len(source), device=source.device)
    # Expert e has tile slots of its own from begins // height + e on. They are enough, whatever the counts are.
    begins, numbers = ends - count, torch.arange(experts, device=flat.device)
    first = begins // height + numbers
    slots = torch.arange(len(flat) // height + experts, device=flat.device)
    owner = torch.searchsorted(first, slots, right=True) - 1
    row = begins[owner] + (slots - first[owner]) * height
    expert = torch.where(row < ends[owner], owner, -1)
    token, place = source // chosen.shape[1], place.view_as(chosen)
    return ExpertOrder(token.int(), place.int(), ends.int(), expert.int(), row.int(), height)


def order_by_expert_triton(chosen: torch.Tensor, experts: int, height: int) -> ExpertOrder:
    """`order_by_expert` as one launch, one program per expert. ValueError unless chosen is contiguous int64 [T, k]."""
    if chosen.dtype != torch.int64 or chosen.dim() != 2 or not chosen.is_contiguous():
        raise ValueError("chosen experts are contiguous int64 [T, k]")
    rows = chosen.numel()
    tiles = rows // height + experts
    room = torch.empty(2 * rows + experts + 2 * tiles, dtype=torch.int32, device=chosen.device)
    token, place, ends, expert, row = room.split([rows, rows, experts, tiles, tiles])
    _order_kernel[(experts,)](
        chosen,
        token,
        place,
        ends,
        expert,
        row,
        rows,
        TOP=chosen.shape[1],
        HEIGHT=height,
        BLOCK=_BLOCK,
        num_warps=4,
    )
    return ExpertOrder(token, place.view_as(chosen), ends, expert, row, height)


def weighted_sum(rows: torch.Tensor, place: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """rows [S, d], contiguous; place int32 [T, k] of a token's rows; weights [T, k] in any float dtype, contiguous ->
    their sums [T, d] in the dtype of rows. float32 inside, rounded once. Triton where it runs, else the reference."""
    run = weighted_sum_triton if has_triton(rows.device) else weighted_sum_reference
    return run(rows, place, weights)


def weighted_sum_reference(rows: torch.Tensor, place: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`weighted_sum` in plain torch."""
    return (rows[place.long()].float() * weights.float()[..., None]).sum(1).to(rows.dtype)


def weighted_sum_triton(rows: torch.Tensor, place: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`weighted_sum` as one launch."""
    (tokens, top), d = place.shape, rows.shape[1]
    out = rows.new_empty((tokens, d))
    block = min(1024, triton.next_power_of_2(d))
    _sum_kernel[(tokens, triton.cdiv(d, block))](
        rows, place, weights, out, d, TOP=top, BLOCK=block, num_warps=4
    )
    return out


# Packed passes have any number of tokens, and what is cut from one tensor is aligned by chance: one compilation.
@triton.jit(
    do_not_specialize=["rows"],
    do_not_specialize_on_alignment=["token", "place", "ends", "tile_expert", "tile_row"],
)
def _order_kernel(
    chosen,  # [rows], of [T, TOP]
    token,  # [rows]
    place,  # [rows], of [T, TOP]
    ends,  # [E]
    tile_expert,  # [rows // HEIGHT + E]
    tile_row,  # the same
    rows,
    TOP: tl.constexpr,
    HEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    own = tl.program_id(0)
    below = tl.zeros([BLOCK], tl.int32)
    mine = tl.zeros([BLOCK], tl.int32)
    for start in range(0, rows, BLOCK):
        at = start + tl.arange(0, BLOCK)
        expert = tl.load(chosen + at, mask=at < rows, other=2147483647).to(tl.int32)
        below += (expert < own).to(tl.int32)
        mine += (expert == own).to(tl.int32)
    begin = tl.sum(below, 0)
    end = begin + tl.sum(mine, 0)
    tl.store(ends + own, end)
    before = begin
    for start in range(0, rows, BLOCK):
        at = start + tl.arange(0, BLOCK)
        is_own = tl.load(chosen + at, mask=at < rows, other=2147483647).to(tl.int32) == own
        to = before + tl.cumsum(is_own.to(tl.int32), 0) - 1
        tl.store(token + to, at // TOP, mask=is_own)
        tl.store(place + at, to, mask=is_own)
        before += tl.sum(is_own.to(tl.int32), 0)
    first = begin // HEIGHT + own
    for slot in range(first, end // HEIGHT + own + 1):
        row = begin + (slot - first) * HEIGHT
        tl.store(tile_expert + slot, tl.where(row < end, own, -1))
        tl.store(tile_row + slot, row)


@triton.jit
def _sum_kernel(
    rows,  # [S, d], contiguous
    place,  # [T, TOP]
    weights,  # [T, TOP]
    out,  # [T, d]
    d,
    TOP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for each in tl.static_range(TOP):
        row = tl.load(place + token * TOP + each).to(tl.int64)
        weight = tl.load(weights + token * TOP + each).to(tl.float32)
        total += weight * tl.load(rows + row * d + channel, mask=channel < d, other=0.0).to(tl.float32)
    tl.store(out + token * d + channel, total.to(out.dtype.element_ty), mask=channel < d)
