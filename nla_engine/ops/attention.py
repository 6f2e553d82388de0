"""Attention of packed queries over a paged cache and a shared prefix: reference in torch, and Triton kernels.

    out[t, h] = sum_p softmax_p(scale * q[t, h] . k[p, h // G]) v[p, h // G]    position - window < p <= position of t

Keys and values of positions below the prefix size are in the prefix, the others in blocks that the query's slot holds:
place p = position - prefix size is at (table[slot, p // size], p % size). A decode step and a packed prefill differ
only in how queries are cut into tiles. G: query heads per key/value head, any number. Online softmax after Milakov &
Gimelshein, arXiv:1805.02867; tiling after Dao et al., arXiv:2205.14135; blocks after Kwon et al., arXiv:2309.06180.
Every query sees the prefix, so tiles that cross sequences attend to it; a slot's softmax continues from that partial
result (Juravsky et al., arXiv:2402.05099). A head's sink is a score without a value: a softmax over it and the keys
gives the keys less than 1 in all (as in gpt-oss; Xiao et al., arXiv:2309.17453). A head's slope biases its scores by
the key's position (ALiBi; Press et al., arXiv:2108.12409). Where sequences may be long, or are few, a decode step gives
each part of a sequence a program of its own, and joins their partial results (Dao et al., "Flash-Decoding", 2023): one
long sequence must not hold up the step, nor leave the card idle.

Values may be the first channels of the keys' own rows (`ops.latent`): queries and keys are then wider than the result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from nla_engine.ops.attention_kernels import attend_kernel, join_kernel, prefix_kernel
from nla_engine.ops.backends import has_triton
from nla_engine.ops.key_values import KeyValues
from nla_engine.ops.tile_sizes import (
    PREFIX_ROWS,
    card_or_interpreter,
    cut_for,
    head_width,
    part_for,
    quick_step,
)
from nla_engine.ops.triton_module import tl, triton


@dataclass(frozen=True)
class Tiles:
    """Runs of queries of one slot each, int64 [tiles]: first packed token, how many (0: an unused tile), slot, position
    of the first.

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
class Slopes:
    """Biases of scores that grow with the position p of a key, bias = values[h] * p; values: float32 [H], contiguous.

    rounded: the dtype that biases are rounded to, or None; coarse: p is rounded to it as well. A model that rounds them
    has learned so: from position 256 on, bfloat16 does not tell every key from the next.
    """

    values: torch.Tensor = field(compare=False, repr=False)
    rounded: torch.dtype | None = None
    coarse: bool = False

    def biases(self, at: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Of keys at positions `at`, int64 [L] -> [H, L] in `dtype`, float32 or float64."""
        if self.rounded is None:
            return self.values[:, None].to(dtype) * at
        place = at.to(self.rounded if self.coarse else torch.float32).float()
        return (self.values[:, None] * place).to(self.rounded).to(dtype)


@dataclass(frozen=True)
class Shape:
    """scale of the scores; window: positions that a query sees, 0 = all; softcap of the scores, 0 = none; sinks: float
    [H], contiguous, or None; slopes: biases of the scores, or None. Shapes that differ in the values of their sinks or
    slopes alone are equal.

    chunked: the sequence is cut into chunks of `window` positions, and a query sees what its own chunk holds up to it
    (Llama-4); else the window moves with the query
    """

    scale: float
    window: int = 0
    softcap: float = 0.0
    sinks: torch.Tensor | None = field(default=None, compare=False, repr=False)
    slopes: Slopes | None = None
    chunked: bool = False
    sunk: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sunk", self.sinks is not None)
        if self.sunk and self.slopes is not None:  # a sink's score is not shifted with the biases of the keys
            raise ValueError("attention with sinks and slopes: no model is known that has both")

    def first(self, own: Any) -> Any:
        """The first position that a query at position `own` sees; below 0: all. own: int, or int64 of any shape."""
        if not self.window:
            return own * 0
        return own // self.window * self.window if self.chunked else own - self.window + 1

    @property
    def window_kind(self) -> int:
        """What the kernels call WINDOW: 0 without a window, 1 for one that moves, 2 for chunks."""
        return (self.window > 0) * (1 + self.chunked)


def attend(query: torch.Tensor, kv: KeyValues, tiles: Tiles, shape: Shape) -> torch.Tensor:
    """query [T, H, h], in any of float32, float16, bfloat16 -> [T, H, h of the values]. Triton, or else torch."""
    return (attend_triton if has_triton(query.device) else attend_torch)(query, kv, tiles, shape)


def attend_torch(query: torch.Tensor, kv: KeyValues, tiles: Tiles, shape: Shape) -> torch.Tensor:
    """The reference for these tiles."""
    return (attend_one_each if len(tiles.token) == len(query) else attend_reference)(query, kv, tiles, shape)


def attend_reference(query: torch.Tensor, kv: KeyValues, tiles: Tiles, shape: Shape) -> torch.Tensor:
    """One tile after the other, softmax in float32. Slow and obvious; synchronises with the device."""
    out = query.new_empty((*query.shape[:2], kv.values.shape[-1]))
    places = (tiles.token, tiles.count, tiles.slot, tiles.position)
    for token, count, slot, position in zip(*(column.tolist() for column in places), strict=True):
        end, rows = position + count, slice(token, token + count)
        keys, values = kv.places(slot, max(end - kv.prefix_size, 0))
        keys, values = torch.cat([kv.prefix_keys[:end], keys]), torch.cat([kv.prefix_values[:end], values])
        at = torch.arange(end, device=query.device)
        own = at[position:, None]
        seen = (at <= own) & (at >= shape.first(own))
        out[rows] = attend_dense(query[None, rows], keys[None], values[None], seen[None], shape, at)[0]
    return out


def attend_one_each(query: torch.Tensor, kv: KeyValues, tiles: Tiles, shape: Shape) -> torch.Tensor:
    """The reference for a decode step (one query per tile) as one batched computation."""
    lanes = len(query)
    keys, values = kv.places(tiles.slot, tiles.longest - kv.prefix_size)
    if kv.prefix_size:
        keys = torch.cat([kv.prefix_keys.expand(lanes, -1, -1, -1), keys], 1)
        values = torch.cat([kv.prefix_values.expand(lanes, -1, -1, -1), values], 1)
    at = torch.arange(tiles.longest, device=query.device)
    own = tiles.position[:, None]
    seen = (at <= own) & (at >= shape.first(own))
    # A weight of 0 would not remove another sequence's NaN.
    values = values.masked_fill(~seen[:, :, None, None], 0.0)
    return attend_dense(query[:, None], keys, values, seen[:, None], shape, at)[:, 0]


def attend_dense(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    seen: torch.Tensor,
    shape: Shape,
    at: torch.Tensor,
) -> torch.Tensor:
    """query [B, T, H, h], keys and values [B, L, KV, h] at positions `at` int64 [L], seen bool [B, T, L] ->
    [B, T, H, h]."""
    batch, length, heads, size = query.shape
    groups = keys.shape[2]
    grouped = query.reshape(batch, length, groups, heads // groups, size)
    scores = torch.einsum("btkgh,blkh->bkgtl", grouped, keys)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * shape.scale
    if shape.softcap:
        scores = torch.tanh(scores / shape.softcap) * shape.softcap
    if shape.slopes is not None:
        scores += shape.slopes.biases(at, scores.dtype).view(groups, -1, 1, len(at))
    scores = scores.masked_fill(~seen[:, None, None], -math.inf)
    if shape.sinks is not None:
        sinks = shape.sinks.to(scores.dtype).view(groups, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks], -1)
    weights = scores.softmax(-1).to(values.dtype)[..., : keys.shape[1]]
    return torch.einsum("bkgtl,blkh->btkgh", weights, values).reshape(batch, length, heads, -1)


def tile_rows(tokens: int, group: int) -> int:
    """Rows of a tile for runs of up to `tokens` tokens: at most 64, or G if that is more."""
    return min(max(16, triton.next_power_of_2(tokens * group)), max(64, triton.next_power_of_2(group)))


def attend_triton(query: torch.Tensor, kv: KeyValues, tiles: Tiles, shape: Shape) -> torch.Tensor:
    """One or more programs per tile and key/value head. No synchronisation; runs inside CUDA graphs."""
    tokens, heads, width = query.shape
    groups, size, rest = kv.keys.shape[2], kv.values.shape[-1], width - kv.values.shape[-1]
    query = query if query.stride(2) == 1 else query.contiguous()
    out = torch.empty((tokens, heads, size), dtype=query.dtype, device=query.device)
    for tensor in (kv.keys, kv.values, kv.prefix_keys, kv.prefix_values):
        if tensor.numel() and tensor.stride(-1) != 1:
            raise ValueError("keys and values: the channels of a head are not contiguous")
    if rest and (groups > 1 or kv.values.data_ptr() != kv.keys.data_ptr()):
        raise ValueError("keys that are wider than values: the values are not their first channels")
    rounded = None if shape.slopes is None else shape.slopes.rounded
    options = {
        "GROUP": heads // groups,
        "HEAD": size,
        "REST": rest,
        "BLOCK_H": head_width(size),
        "BLOCK_R": head_width(rest),
        "WINDOW": shape.window_kind,
        "SOFTCAP": shape.softcap > 0,
        "SINKS": shape.sunk,
        "ROUND": None if rounded is None else getattr(tl, str(rounded).removeprefix("torch.")),
        "COARSE": shape.slopes is not None and shape.slopes.coarse,
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
    }
    itemsize = query.dtype.itemsize
    card = card_or_interpreter(query.device)
    partial = torch.empty((tokens, heads, size) if kv.prefix_size else 0, device=query.device)
    state = torch.empty((2, tokens, heads) if kv.prefix_size else (2, 0), device=query.device)
    sinks = state if shape.sinks is None else shape.sinks
    if kv.prefix_size:
        most = PREFIX_ROWS if size <= 128 and itemsize < 4 else PREFIX_ROWS // 2
        cut = cut_for(size, itemsize, most, card, rest=rest)
        prefix_kernel[(triton.cdiv(tokens * (heads // groups), cut.rows), groups)](
            query,
            kv.prefix_keys,
            kv.prefix_values,
            partial,
            state[0],
            state[1],
            sinks,
            shape.slopes and shape.slopes.values,
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
    places = tiles.longest - kv.prefix_size
    seen = min(places, shape.window or places)  # a window holds few places, wherever it is
    part, quick = 0, False
    if len(tiles.token) == tokens:  # a decode step
        part = part_for(seen, tokens * groups, kv.size, card)
        quick = quick_step(size, seen, tokens * groups, card)
    cut = cut_for(size, itemsize, tiles.rows, card, part=part, rest=rest, quick=quick)
    if tiles.rows > cut.rows:  # several programs share a tile
        part = 0
    if kv.size % cut.keys:
        raise ValueError(f"blocks of {kv.size} places: the kernel reads {cut.keys} at once")
    parts = triton.cdiv(places, part) if part else 0
    ends = (parts, tokens, heads) if part else (1, 0, 0)
    part_sums, part_state = (torch.empty(each, device=query.device) for each in ((*ends, size), (2, *ends)))
    attend_kernel[(len(tiles.token), groups, parts or tiles.rows // cut.rows)](
        query,
        kv.keys,
        kv.values,
        out,
        partial,
        state[0],
        state[1],
        sinks,
        shape.slopes and shape.slopes.values,
        part_sums,
        part_state[0],
        part_state[1],
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
        PART=part,
        SIZE=kv.size,
        BLOCK_M=cut.rows,
        BLOCK_N=cut.keys,
        num_warps=cut.warps,
        num_stages=cut.stages,
        **options,
    )
    if part:
        many = tokens * groups >= card.processors  # most of them have one part or two
        join_kernel[(tokens, heads)](
            out,
            part_sums,
            part_state[0],
            part_state[1],
            tiles.position,
            kv.prefix_size,
            shape.window,
            HEAD=size,
            BLOCK_H=head_width(size),
            WINDOW=shape.window_kind,
            PART=part,
            BLOCK_P=min(triton.next_power_of_2(parts), 4 if many else 32),
            num_warps=1 if many else 4,
        )
    return out
