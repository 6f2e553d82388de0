"""Attention of packed queries on a CPU: torch's fused kernel, over views of the cache wherever a view will do, which is
where one block holds all that is seen of a slot.

The formula, and the slow reference, are in `ops.attention`. Four cases go to that reference: a soft cap, sinks and
slopes, which the fused kernel does not know, and a result that is not finite. A masked key has weight 0, but 0 times
another sequence's NaN is NaN; the reference leaves such values out.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import scaled_dot_product_attention

from nla_engine.ops.attention import Shape, Tiles, attend_torch
from nla_engine.ops.key_values import KeyValues

#: Queries that share a mask, where a mask is needed: each of them is held against the keys of the last one.
_CHUNK = 256
#: Blocks between the first and the last lane's are computed as well if there are at most this many per lane.
_IDLE = 2


def attend_cpu(query: torch.Tensor, kv: KeyValues, tiles: Tiles, shape: Shape) -> torch.Tensor:
    """query [T, H, h], in float32 or bfloat16 -> [T, H, h]."""
    if shape.softcap or shape.sunk or shape.slopes:
        return attend_torch(query, kv, tiles, shape)
    out = (_decode if len(tiles.token) == len(query) else _prefill)(query, kv, tiles, shape)
    return out if bool(out.sum().isfinite()) else attend_torch(query, kv, tiles, shape)


def _decode(query: torch.Tensor, kv: KeyValues, tiles: Tiles, shape: Shape) -> torch.Tensor:
    """One query per slot. Idle blocks between those of the lanes are computed too, and dropped."""
    heads, size = query.shape[1:]
    held, groups = tiles.longest - kv.prefix_size, kv.keys.shape[2]
    first, span, at = _span(kv, tiles)
    if span:
        keys, values = kv.keys[first : first + span, :held], kv.values[first : first + span, :held]
    else:
        keys, values = kv.places(tiles.slot, held)
    if kv.prefix_size:
        many = len(keys), -1, -1, -1
        keys = torch.cat([kv.prefix_keys.expand(many), keys], 1)
        values = torch.cat([kv.prefix_values.expand(many), values], 1)
    if at is not None:
        query = query.new_zeros((span, heads, size)).index_copy_(0, at, query)
    out = scaled_dot_product_attention(
        query.reshape(-1, groups, heads // groups, size),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=_decode_mask(tiles, shape, query.dtype, span, at),
        scale=shape.scale,
    ).reshape(-1, heads, values.shape[-1])
    return out if at is None else out[at]


def _span(kv: KeyValues, tiles: Tiles) -> tuple[int, int, torch.Tensor | None]:
    """The first block of the lanes, how many blocks from there to take as one view, and which of these are the lanes',
    int64 [lanes] (None: all, in order); (0, 0, None): lanes are gathered."""
    if "span" not in tiles.once:
        tiles.once["span"] = 0, 0, None
        if tiles.longest - kv.prefix_size <= kv.size:
            own = kv.table[tiles.slot, 0]
            blocks = own.tolist()
            first, span = min(blocks), max(blocks) - min(blocks) + 1
            if len(set(blocks)) == len(blocks) and span <= _IDLE * len(blocks):
                in_order = blocks == list(range(first, first + span))
                tiles.once["span"] = first, span, None if in_order else own.long() - first
    found: tuple[int, int, torch.Tensor | None] = tiles.once["span"]
    return found


def _decode_mask(
    tiles: Tiles, shape: Shape, dtype: torch.dtype, span: int, lanes: torch.Tensor | None
) -> torch.Tensor:
    """What each lane sees, [lanes or span, 1, 1, longest]: 0 or -inf. An idle block sees everything."""
    key = ("mask", shape.window, shape.chunked)
    if key not in tiles.once:
        at = torch.arange(tiles.longest)
        own = tiles.position[:, None]
        hidden = (at > own) | (at < shape.first(own))
        if lanes is not None:
            hidden = hidden.new_zeros((span, len(at))).index_copy_(0, lanes, hidden)
        tiles.once[key] = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -math.inf)[
            :, None, None
        ]
    mask: torch.Tensor = tiles.once[key]
    return mask


def _prefill(query: torch.Tensor, kv: KeyValues, tiles: Tiles, shape: Shape) -> torch.Tensor:
    """One run of queries of a slot after the other. Query heads of a key's group are read as a batch of their own."""
    heads, size = query.shape[1:]
    groups, window = kv.keys.shape[2], shape.window
    grouped = query.reshape(-1, groups, heads // groups, size)
    out = grouped.new_empty((*grouped.shape[:-1], kv.values.shape[-1]))
    for token, count, slot, position in _runs(tiles):
        causal = position == 0 and not 0 < window < count
        for start in range(0, count, count if causal else _CHUNK):
            rows = slice(token + start, token + (count if causal else min(start + _CHUNK, count)))
            first, end = position + start, position + rows.stop - token
            low = max(shape.first(first), 0)
            keys, values = (
                held.transpose(0, 1)[:, None].expand(-1, heads // groups, -1, -1)
                for held in _places(kv, slot, low, end)
            )
            seen = None
            if not causal:
                at, own = torch.arange(low, end), torch.arange(first, end)[:, None]
                seen = (at <= own) & (at >= shape.first(own))
            attended = scaled_dot_product_attention(
                grouped[rows].permute(1, 2, 0, 3),
                keys,
                values,
                attn_mask=seen,
                is_causal=causal,
                scale=shape.scale,
            )
            out[rows] = attended.permute(2, 0, 1, 3)
    return out.reshape(-1, heads, out.shape[-1])


def _runs(tiles: Tiles) -> list[tuple[int, int, int, int]]:
    """The tiles (token, count, slot, position), where those that continue one another are one."""
    if "runs" not in tiles.once:
        runs: list[tuple[int, int, int, int]] = []
        columns = (tiles.token, tiles.count, tiles.slot, tiles.position)
        for token, count, slot, position in zip(*(column.tolist() for column in columns), strict=True):
            if not count:
                continue
            if runs:
                before, size, same, start = runs[-1]
                if (before + size, same, start + size) == (token, slot, position):
                    runs[-1] = (before, size + count, slot, start)
                    continue
            runs.append((token, count, slot, position))
        tiles.once["runs"] = runs
    found: list[tuple[int, int, int, int]] = tiles.once["runs"]
    return found


def _places(kv: KeyValues, slot: int, low: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values at positions [low, end) of a slot. Views without prefix and within one block."""
    prefix = kv.prefix_size
    first, last = max(low - prefix, 0), max(end - prefix, 0)
    if last <= kv.size:
        block = int(kv.table[slot, 0])
        keys, values = kv.keys[block, first:last], kv.values[block, first:last]
    else:
        keys, values = kv.places(slot, last, first)
    if low >= prefix:
        return keys, values
    return torch.cat([kv.prefix_keys[low:end], keys]), torch.cat([kv.prefix_values[low:end], values])
