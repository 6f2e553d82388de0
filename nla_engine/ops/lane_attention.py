"""Attention of lanes, each over the start of a sequence and over its own tokens: reference in torch, a Triton kernel.

A lane is m tokens that stand in the place of those at positions f .. f + m - 1 of a sequence. Its token i sees

    the sequence at t < f        the lane at j <= i        of both: position - window < seen position

in one softmax, in float32. Many lanes share a sequence: a program reads its keys once for all lanes of a tile. Online
softmax as in `attention`. The tokens of a lane come first, one by one, as rows of different lanes see different ones.
"""

from __future__ import annotations

import torch

from nla_engine.ops.attention import Shape, Tiles, attend_dense
from nla_engine.ops.attention_kernels import fold
from nla_engine.ops.backends import has_triton
from nla_engine.ops.tile_sizes import card_or_interpreter, cut_for, head_width
from nla_engine.ops.triton_module import tl, triton

#: The widest heads that the kernel is tested with.
_WIDEST = 256
#: Fewer would run out of registers, which hold a key and a value of the lane for every row.
_WARPS = 8


def takes_lanes(query: torch.Tensor, values: torch.Tensor, shape: Shape) -> bool:
    """Whether the kernel attends for queries [.., h] and values [.., h'] like these, on their device."""
    plain = shape.sinks is None and shape.slopes is None and not shape.chunked
    fits = query.shape[-1] == values.shape[-1] <= _WIDEST and query.dtype == values.dtype
    return plain and fits and has_triton(query.device)


def attend_lanes_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tiles: Tiles,
    tokens: int,
    shape: Shape,
) -> torch.Tensor:
    """`attend_lanes_triton` in plain torch, lane by lane."""
    out = torch.empty_like(query)
    for token, count, number in zip(
        *(x.tolist() for x in (tiles.token, tiles.count, tiles.slot)), strict=True
    ):
        for at in range(token, token + count):
            first = at - at % tokens
            lane, past = slice(first, at + 1), int(tiles.own[first])
            own_keys, own_values = (
                torch.cat([held[number, :, :past].transpose(0, 1), x[lane]])
                for held, x in ((keys, key), (values, value))
            )
            place = torch.arange(len(own_keys), device=query.device)
            seen = place >= shape.first(int(tiles.own[at]))
            out[at] = attend_dense(
                query[None, None, at], own_keys[None], own_values[None], seen[None, None], shape, place
            )[0, 0]
    return out


def attend_lanes_triton(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tiles: Tiles,
    tokens: int,
    shape: Shape,
) -> torch.Tensor:
    """query [T, H, h], key and value [T, KV, h]: of lanes of `tokens` each; keys, values [S, KV, P, h] -> [T, H, h].

    tiles: runs of tokens whose lanes are of one sequence, which their slot says; own: f + i of every token; the
    position of a tile is not used
    """
    heads, size = query.shape[1:]
    groups = key.shape[1]
    query, key, value, keys, values = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value, keys, values)
    )
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    cut = cut_for(size, query.dtype.itemsize, tiles.rows, card_or_interpreter(query.device))
    _lanes_kernel[(len(tiles.token), groups, tiles.rows // cut.rows)](
        query,
        key,
        value,
        keys,
        values,
        out,
        tiles.token,
        tiles.count,
        tiles.slot,
        tiles.own,
        *query.stride()[:2],
        *key.stride()[:2],
        *value.stride()[:2],
        *keys.stride()[:3],
        *values.stride()[:3],
        tokens,
        shape.window,
        shape.scale,
        shape.softcap,
        GROUP=heads // groups,
        HEAD=size,
        BLOCK_H=head_width(size),
        BLOCK_M=cut.rows,
        BLOCK_N=cut.keys,
        WINDOW=shape.window > 0,
        SOFTCAP=shape.softcap > 0,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=_WARPS,
        num_stages=cut.stages,
    )
    return out


@triton.jit
def _lanes_kernel(
    q,  # [T, H, h]
    lane_keys,  # [T, KV, h]
    lane_values,  # [T, KV, h]
    keys,  # [S, KV, P, h]
    values,  # [S, KV, P, h]
    out,  # [T, H, h], contiguous
    tile_token,  # int64 [tiles]
    tile_count,
    tile_sequence,
    positions,  # int64 [T]
    q_token,
    q_head,
    lane_key_token,
    lane_key_head,
    lane_value_token,
    lane_value_head,
    key_sequence,
    key_head,
    key_position,
    value_sequence,
    value_head,
    value_position,
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
    PRECISION: tl.constexpr,
):
    tile, group = tl.program_id(0), tl.program_id(1)
    row = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)  # row r is head r % G of token r // G
    mine = row // GROUP < tl.load(tile_count + tile).to(tl.int32)
    token = tl.load(tile_token + tile) + row // GROUP
    sequence = tl.load(tile_sequence + tile)
    head = group * GROUP + row % GROUP
    channel = tl.arange(0, BLOCK_H)
    real = channel < HEAD
    q_at = token * q_token + head * q_head
    block = tl.load(q + q_at[:, None] + channel[None], mask=mine[:, None] & real[None], other=0.0)
    step = (token % tokens).to(tl.int32)
    own = tl.load(positions + token, mask=mine, other=0).to(tl.int32)
    past = tl.where(mine, own - step, 0)  # so many tokens of the sequence may be seen

    biggest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    for other in range(tokens):
        seen = mine & (other <= step)
        if WINDOW:
            seen = seen & (step - other < window)
        there = seen[:, None] & real[None]
        place = token - step + other
        k_at = place * lane_key_token + group * lane_key_head
        v_at = place * lane_value_token + group * lane_value_head
        k = tl.load(lane_keys + k_at[:, None] + channel[None], mask=there, other=0.0).to(tl.float32)
        v = tl.load(lane_values + v_at[:, None] + channel[None], mask=there, other=0.0).to(tl.float32)
        scores = tl.sum(block.to(tl.float32) * k, 1) * scale
        if SOFTCAP:
            scores = softcap * (2.0 / (1.0 + tl.exp(-2.0 * scores / softcap)) - 1.0)  # tanh
        scores = tl.where(seen, scores, -float("inf"))
        largest = tl.maximum(biggest, scores)
        safe = tl.where(largest == -float("inf"), 0.0, largest)  # nothing seen yet
        weights = tl.exp(scores - safe)
        shrink = tl.exp(biggest - safe)
        total = total * shrink + weights
        acc = acc * shrink[:, None] + weights[:, None] * v
        biggest = largest

    low = 0
    if WINDOW:
        low = tl.maximum(tl.min(tl.where(mine, own - window + 1, 2147483647), 0), 0)
    end = tl.max(past, 0)
    k_base = keys + sequence * key_sequence + group * key_head
    v_base = values + sequence * value_sequence + group * value_head
    for start in range(low, end, BLOCK_N):
        at = start + tl.arange(0, BLOCK_N)
        there = (at < end)[:, None] & real[None]
        k = tl.load(k_base + at[:, None] * key_position + channel[None], mask=there, other=0.0)
        v = tl.load(v_base + at[:, None] * value_position + channel[None], mask=there, other=0.0)
        seen = at[None] < past[:, None]
        if WINDOW:
            seen = seen & (at[None] > own[:, None] - window)
        acc, total, biggest = fold(
            block, k, block, k, v, seen, acc, total, biggest, scale, softcap, None, SOFTCAP, 0, PRECISION
        )

    flat = token * (tl.num_programs(1) * GROUP) + head
    result = acc / tl.where(mine, total, 1.0)[:, None]
    out_at = out + flat[:, None] * HEAD + channel[None]
    tl.store(out_at, result.to(out.dtype.element_ty), mask=mine[:, None] & real[None])
