"""Attention of packed queries over a paged cache and a shared prefix: reference in torch, two Triton kernels.

    out[t, h] = sum_p softmax_p(scale * q[t, h] . k[p, h // G]) v[p, h // G]    position - window < p <= position of t

Keys and values of positions below the prefix size are in the prefix, the others in blocks that the query's slot holds:
place p = position - prefix size is at (table[slot, p // size], p % size). A decode step and a packed prefill differ
only in how queries are cut into tiles. G: query heads per key/value head, any number. Online softmax after Milakov &
Gimelshein, arXiv:1805.02867; tiling after Dao et al., arXiv:2205.14135; blocks after Kwon et al., arXiv:2309.06180.
Every query sees the prefix, so tiles that cross sequences attend to it; a slot's softmax continues from that partial
result (Juravsky et al., arXiv:2402.05099). A head's sink is a score without a value: a softmax over it and the keys
gives the keys less than 1 in all (as in gpt-oss; Xiao et al., arXiv:2309.17453).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from nla_engine.ops.backends import has_triton
from nla_engine.ops.key_values import KeyValues
from nla_engine.ops.tile_sizes import PREFIX_ROWS, card_or_interpreter, cut_for, head_width
from nla_engine.ops.triton_module import tl, triton


@dataclass(frozen=True)
class Tiles:
    """Runs of queries of one slot each, int64 [tiles]: first packed token, how many, slot, position of the first.

    own: int64 [T], the position of every packed token; none is in the shared prefix
    rows: most query rows (tokens times G) of a tile; longest: an upper bound on positions + 1
    once: what a CPU computes for the first layer of a pass and uses in all
    """

    token: torch.Tensor
    count: torch.Tensor
    slot: torch.Tensor
    position: torch.Tensor
    own: torch.Tensor
    rows: int
    longest: int
    once: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class Shape:
    """scale of the scores; window: positions that a query sees, 0 = all; softcap of the scores, 0 = none; sinks: float
    [H], contiguous, or None. Shapes that differ in the values of their sinks alone are equal."""

    scale: float
    window: int = 0
    softcap: float = 0.0
    sinks: torch.Tensor | None = field(default=None, compare=False, repr=False)
    sunk: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sunk", self.sinks is not None)


def attend(query: torch.Tensor, kv: KeyValues, tiles: Tiles, shape: Shape) -> torch.Tensor:
    """query [T, H, h], in any of float32, float16, bfloat16 -> [T, H, h]. Triton where it runs, else torch."""
    return (attend_triton if has_triton(query.device) else attend_torch)(query, kv, tiles, shape)


def attend_torch(query: torch.Tensor, kv: KeyValues, tiles: Tiles, shape: Shape) -> torch.Tensor:
    """The reference for these tiles."""
    return (attend_one_each if len(tiles.token) == len(query) else attend_reference)(query, kv, tiles, shape)


def attend_reference(query: torch.Tensor, kv: KeyValues, tiles: Tiles, shape: Shape) -> torch.Tensor:
    """One tile after the other, softmax in float32. Slow and obvious; synchronises with the device."""
    out = torch.empty_like(query)
    places = (tiles.token, tiles.count, tiles.slot, tiles.position)
    for token, count, slot, position in zip(*(column.tolist() for column in places), strict=True):
        end, rows = position + count, slice(token, token + count)
        keys, values = kv.places(slot, max(end - kv.prefix_size, 0))
        keys, values = torch.cat([kv.prefix_keys[:end], keys]), torch.cat([kv.prefix_values[:end], values])
        at = torch.arange(end, device=query.device)
        own = at[position:, None]
        seen = (at <= own) & (at > own - shape.window if shape.window else at >= 0)
        out[rows] = _attend(query[None, rows], keys[None], values[None], seen[None], shape)[0]
    return out


def attend_one_each(query: torch.Tensor, kv: KeyValues, tiles: Tiles, shape: Shape) -> torch.Tensor:
    """The reference for a decode step (one query per tile) as one batched computation."""
    lanes = len(query)
    keys, values = kv.places(tiles.slot, tiles.longest - kv.prefix_size)
    if kv.prefix_size:
        keys = torch.cat([kv.prefix_keys.expand(lanes, -1, -1, -1), keys], 1)
        values = torch.cat([kv.prefix_values.expand(lanes, -1, -1, -1), values], 1)
    at = torch.arange(tiles.longest, device=query.device)
    seen = at <= tiles.position[:, None]
    if shape.window:
        seen &= at > tiles.position[:, None] - shape.window
    # A weight of 0 would not remove another sequence's NaN.
    values = values.masked_fill(~seen[:, :, None, None], 0.0)
    return _attend(query[:, None], keys, values, seen[:, None], shape)[:, 0]


def _attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor, shape: Shape
) -> torch.Tensor:
    """query [B, T, H, h], keys and values [B, L, KV, h], seen bool [B, T, L] -> [B, T, H, h]."""
    batch, length, heads, size = query.shape
    groups = keys.shape[2]
    grouped = query.reshape(batch, length, groups, heads // groups, size)
    scores = torch.einsum("btkgh,blkh->bkgtl", grouped, keys).float() * shape.scale
    if shape.softcap:
        scores = torch.tanh(scores / shape.softcap) * shape.softcap
    scores = scores.masked_fill(~seen[:, None, None], -math.inf)
    if shape.sinks is not None:
        sinks = shape.sinks.float().view(groups, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks], -1)
    weights = scores.softmax(-1).to(values.dtype)[..., : keys.shape[1]]
    return torch.einsum("bkgtl,blkh->btkgh", weights, values).reshape(batch, length, heads, size)


def tile_rows(tokens: int, group: int) -> int:
    """Rows of a tile for runs of up to `tokens` tokens: at most 64, or G if that is more."""
    return min(max(16, triton.next_power_of_2(tokens * group)), max(64, triton.next_power_of_2(group)))


def attend_triton(query: torch.Tensor, kv: KeyValues, tiles: Tiles, shape: Shape) -> torch.Tensor:
    """One or more programs per tile and key/value head. No synchronisation; runs inside CUDA graphs."""
    tokens, heads, size = query.shape
    groups = kv.keys.shape[2]
    query = query if query.stride(2) == 1 else query.contiguous()
    out = torch.empty((tokens, heads, size), dtype=query.dtype, device=query.device)
    for tensor in (kv.keys, kv.values, kv.prefix_keys, kv.prefix_values):
        if tensor.numel() and tensor.stride(-1) != 1:
            raise ValueError("keys and values: the channels of a head are not contiguous")
    options = {
        "GROUP": heads // groups,
        "HEAD": size,
        "BLOCK_H": head_width(size),
        "WINDOW": shape.window > 0,
        "SOFTCAP": shape.softcap > 0,
        "SINKS": shape.sunk,
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
    }
    itemsize = query.dtype.itemsize
    card = card_or_interpreter(query.device)
    partial = torch.empty((tokens, heads, size) if kv.prefix_size else 0, device=query.device)
    state = torch.empty((2, tokens, heads) if kv.prefix_size else (2, 0), device=query.device)
    sinks = state if shape.sinks is None else shape.sinks
    if kv.prefix_size:
        cut = cut_for(size, itemsize, PREFIX_ROWS if size <= 128 and itemsize < 4 else PREFIX_ROWS // 2, card)
        _prefix_kernel[(triton.cdiv(tokens * (heads // groups), cut.rows), groups)](
            query,
            kv.prefix_keys,
            kv.prefix_values,
            partial,
            state[0],
            state[1],
            sinks,
            tiles.own,
            query.stride(0),
            query.stride(1),
            kv.prefix_keys.stride(0),
            kv.prefix_keys.stride(1),
            kv.prefix_size,
            tokens,
            shape.window,
            shape.scale,
            shape.softcap,
            BLOCK_M=cut.rows,
            BLOCK_N=cut.keys,
            num_warps=cut.warps,
            num_stages=cut.stages,
            **options,
        )
    cut = cut_for(size, itemsize, tiles.rows, card)
    if kv.size % cut.keys:
        raise ValueError(f"blocks of {kv.size} places: the kernel reads {cut.keys} at once")
    _attend_kernel[(len(tiles.token), groups, tiles.rows // cut.rows)](
        query,
        kv.keys,
        kv.values,
        out,
        partial,
        state[0],
        state[1],
        sinks,
        tiles.token,
        tiles.count,
        tiles.slot,
        tiles.position,
        kv.table,
        query.stride(0),
        query.stride(1),
        kv.table.stride(0),
        kv.keys.stride(0),
        kv.keys.stride(1),
        kv.keys.stride(2),
        kv.prefix_size,
        shape.window,
        shape.scale,
        shape.softcap,
        PREFIX=kv.prefix_size > 0,
        SHARED=tiles.rows > cut.rows,
        SIZE=kv.size,
        BLOCK_M=cut.rows,
        BLOCK_N=cut.keys,
        num_warps=cut.warps,
        num_stages=cut.stages,
        **options,
    )
    return out


@triton.jit
def _prefix_kernel(
    q,  # [T, H, h]
    prefix_keys,  # [P, KV, h]
    prefix_values,  # [P, KV, h], strides of prefix_keys
    partial,  # float32 [T, H, h], contiguous: the sum of weighted values so far
    sums,  # float32 [T, H]: the sum of weights so far
    biggests,  # float32 [T, H]: the score that weights are relative to
    sinks,  # float [H]; not read unless SINKS
    positions,  # int64 [T]
    q_token,
    q_head,
    prefix_position,
    prefix_head,
    prefix_size,
    tokens,
    window,
    scale,
    softcap,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    group = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # row r is head r % G of token r // G
    token = (row // GROUP).to(tl.int64)
    mine = token < tokens
    head = group * GROUP + row % GROUP
    channel = tl.arange(0, BLOCK_H)
    real = channel < HEAD
    q_at = token * q_token + head * q_head
    block = tl.load(q + q_at[:, None] + channel[None], mask=mine[:, None] & real[None], other=0.0)
    own = tl.load(positions + token, mask=mine, other=0).to(tl.int32)

    biggest, total = _begin(sinks, head, mine, BLOCK_M, SINKS)
    acc = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    k_base = prefix_keys + group * prefix_head
    v_base = prefix_values + group * prefix_head
    for start in range(0, prefix_size, BLOCK_N):
        at = start + tl.arange(0, BLOCK_N)
        there = at < prefix_size
        place = at.to(tl.int64)[:, None] * prefix_position + channel[None]
        k = tl.load(k_base + place, mask=there[:, None] & real[None], other=0.0)
        v = tl.load(v_base + place, mask=there[:, None] & real[None], other=0.0)
        seen = there[None] & mine[:, None]
        if WINDOW:
            seen = seen & (at[None] > own[:, None] - window)
        acc, total, biggest = _fold(
            block, k, v, seen, acc, total, biggest, scale, softcap, SOFTCAP, PRECISION
        )

    flat = token * (tl.num_programs(1) * GROUP) + head
    tl.store(partial + flat[:, None] * HEAD + channel[None], acc, mask=mine[:, None] & real[None])
    tl.store(sums + flat, total, mask=mine)
    tl.store(biggests + flat, biggest, mask=mine)


@triton.jit
def _attend_kernel(
    q,  # [T, H, h]
    keys,  # [blocks, SIZE, KV, h]
    values,  # [blocks, SIZE, KV, h], strides of keys
    out,  # [T, H, h], contiguous
    partial,  # float32 [T, H, h], contiguous: from the prefix's kernel; unused without PREFIX
    sums,  # float32 [T, H]: the same
    biggests,  # float32 [T, H]: the same
    sinks,  # float [H]; not read unless SINKS
    tile_token,  # int64 [tiles]
    tile_count,
    tile_slot,
    tile_position,
    table,  # int32 [slots, columns]
    q_token,
    q_head,
    table_slot,
    kv_block,
    kv_position,
    kv_head,
    prefix_size,
    window,
    scale,
    softcap,
    PREFIX: tl.constexpr,
    SHARED: tl.constexpr,  # a tile has several programs
    SIZE: tl.constexpr,  # a multiple of BLOCK_N
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile, group = tl.program_id(0), tl.program_id(1)
    token = tl.load(tile_token + tile)
    count = tl.load(tile_count + tile).to(tl.int32)
    slot = tl.load(tile_slot + tile)
    first = tl.load(tile_position + tile).to(tl.int32)

    row = tl.arange(0, BLOCK_M)  # row r is head r % G of token r // G
    if SHARED:  # else the compiler knows the rows, which saves 2% of a decode step
        row += tl.program_id(2) * BLOCK_M
    mine = row // GROUP < count
    channel = tl.arange(0, BLOCK_H)
    real = channel < HEAD
    own = first + row // GROUP
    head = group * GROUP + row % GROUP
    q_at = (token + row // GROUP) * q_token + head * q_head
    block = tl.load(q + q_at[:, None] + channel[None], mask=mine[:, None] & real[None], other=0.0)

    flat = (token + row // GROUP) * (tl.num_programs(1) * GROUP) + head
    out_at = flat[:, None] * HEAD + channel[None]
    if PREFIX:
        biggest = tl.load(biggests + flat, mask=mine, other=-float("inf"))
        total = tl.load(sums + flat, mask=mine, other=0.0)
        acc = tl.load(partial + out_at, mask=mine[:, None] & real[None], other=0.0)
    else:
        biggest, total = _begin(sinks, head, mine, BLOCK_M, SINKS)
        acc = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)

    end = first + count - prefix_size  # places in the slot
    low = 0
    if WINDOW:
        low = tl.maximum(first - window + 1 - prefix_size, 0)
    low = low // BLOCK_N * BLOCK_N
    k_base = keys + group * kv_head
    v_base = values + group * kv_head
    entry = table + slot * table_slot
    number = tl.load(entry + low // SIZE)
    for start in range(low, end, BLOCK_N):
        at = start + tl.arange(0, BLOCK_N)
        there = at < end
        base = number.to(tl.int64) * kv_block
        number = tl.load(entry + (start + BLOCK_N) // SIZE)  # ahead, so that no key waits for it
        inside = start % SIZE + tl.arange(0, BLOCK_N)
        place = base + inside.to(tl.int64)[:, None] * kv_position + channel[None]
        k = tl.load(k_base + place, mask=there[:, None] & real[None], other=0.0)
        v = tl.load(v_base + place, mask=there[:, None] & real[None], other=0.0)
        seen = there[None] & (at[None] + prefix_size <= own[:, None])
        if WINDOW:
            seen = seen & (at[None] + prefix_size > own[:, None] - window)
        acc, total, biggest = _fold(
            block, k, v, seen, acc, total, biggest, scale, softcap, SOFTCAP, PRECISION
        )

    result = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out + out_at, result.to(out.dtype.element_ty), mask=mine[:, None] & real[None])


@triton.jit
def _begin(sinks, head, mine, ROWS: tl.constexpr, SINKS: tl.constexpr):
    """The running softmax of rows before any key: the score that weights are relative to, and the sum of weights."""
    if SINKS:
        return tl.load(sinks + head, mask=mine, other=0.0).to(tl.float32), tl.full([ROWS], 1.0, tl.float32)
    else:
        return tl.full([ROWS], -float("inf"), tl.float32), tl.zeros([ROWS], tl.float32)


@triton.jit
def _fold(
    q, k, v, seen, acc, total, biggest, scale, softcap, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Add one block of keys [N, h] and values [N, h] to the running softmax of q [M, h]."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if SOFTCAP:
        ratio = scores / softcap
        scores = softcap * (2.0 / (1.0 + tl.exp(-2.0 * ratio)) - 1.0)  # tanh
    scores = tl.where(seen, scores, -float("inf"))
    largest = tl.maximum(biggest, tl.max(scores, 1))
    safe = tl.where(largest == -float("inf"), 0.0, largest)  # nothing seen yet
    weights = tl.exp(scores - safe[:, None])
    shrink = tl.exp(biggest - safe)
    total = total * shrink + tl.sum(weights, 1)
    acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    return acc, total, largest
