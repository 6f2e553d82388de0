"""From one row of projections to rotated queries and to keys and values in the cache: reference and Triton kernel.

    q, k, v = split(row);  q, k = rms_norm(q), rms_norm(k) per head if the model has such norms
    q, k = x cos + rotate_half(x) sin;  cache[table[slot, place // size], place % size] = k, v

float32 inside, rounded once. Su et al., arXiv:2104.09864, in the half-split form of transformers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nla_engine.ops.backends import has_triton
from nla_engine.ops.norm import rms_norm_reference
from nla_engine.ops.triton_module import tl, triton


@dataclass(frozen=True)
class HeadNorm:
    """RMSNorm of each query and key head: weights [h] of both, eps, and the offset added to the weights."""

    query: torch.Tensor
    key: torch.Tensor
    eps: float
    offset: float


def rotate_and_store(
    row: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    slot: torch.Tensor,
    place: torch.Tensor,
    norm: HeadNorm | None,
) -> torch.Tensor:
    """row [T, (H + 2 KV) h]; cos, sin [T, h], or [T, h / 2] if both halves are the same; keys, values [blocks, size,
    KV, h], table int32 [slots, columns] to write at (slot, place) int64 [T].

    Returns rotated queries [T, H, h]. Triton where it runs, else the reference.
    """
    run = rotate_and_store_triton if has_triton(row.device) else rotate_and_store_reference
    return run(row, cos, sin, keys, values, table, slot, place, norm)


def rotate_and_store_reference(
    row: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    slot: torch.Tensor,
    place: torch.Tensor,
    norm: HeadNorm | None,
) -> torch.Tensor:
    """`rotate_and_store` in plain torch."""
    groups, size = keys.shape[2:]
    heads = row.shape[1] // size - 2 * groups
    q, k, v = row.view(len(row), -1, size).split([heads, groups, groups], 1)
    if norm is not None:
        q = rms_norm_reference(q, norm.query, norm.eps, norm.offset)
        k = rms_norm_reference(k, norm.key, norm.eps, norm.offset)
    at = table[slot, place // keys.shape[1]].long(), place % keys.shape[1]
    keys[at] = _rotate(k, cos, sin)
    values[at] = v
    return _rotate(q, cos, sin)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = x.float().chunk(2, -1)
    turned = torch.cat([-high, low], -1)
    cos, sin = (each.repeat(1, x.shape[-1] // each.shape[-1]).float()[:, None] for each in (cos, sin))
    return (x.float() * cos + turned * sin).to(x.dtype)


def rotate_and_store_triton(
    row: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    slot: torch.Tensor,
    place: torch.Tensor,
    norm: HeadNorm | None,
) -> torch.Tensor:
    """`rotate_and_store` as one launch."""
    groups, size = keys.shape[2:]
    heads = row.shape[1] // size - 2 * groups
    q = torch.empty((len(row), heads, size), dtype=row.dtype, device=row.device)
    _rotate_kernel[(len(row), groups)](
        row,
        cos,
        sin,
        q,
        keys,
        values,
        table,
        slot,
        place,
        row if norm is None else norm.query,
        row if norm is None else norm.key,
        row.stride(0),
        *cos.stride()[-2:],
        table.stride(0),
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        0.0 if norm is None else norm.eps,
        0.0 if norm is None else norm.offset,
        GROUP=heads // groups,
        HALF=size // 2,
        HIGH=cos.shape[-1] - size // 2,
        BLOCK_G=triton.next_power_of_2(heads // groups + 1),
        BLOCK_H=triton.next_power_of_2(size // 2),
        NORM=norm is not None,
        BLOCK=keys.shape[1],
        num_warps=2,
    )
    return q


@triton.jit
def _rotate_kernel(
    row,  # [T, (H + 2 KV) h]
    cos,  # [T, HIGH + HALF]
    sin,  # strides of cos
    q,  # [T, H, h], contiguous
    keys,  # [blocks, BLOCK, KV, h]
    values,  # [blocks, BLOCK, KV, h], strides of keys
    table,  # int32 [slots, columns]
    slot,  # int64 [T]
    place,  # int64 [T]
    query_weight,  # [h]; not read unless NORM
    key_weight,  # [h]; not read unless NORM
    row_token,
    cos_token,
    cos_channel,
    table_slot,
    kv_block,
    kv_place,
    kv_head,
    eps,
    offset,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    HIGH: tl.constexpr,  # where the angles of the second half begin
    BLOCK_G: tl.constexpr,
    BLOCK_H: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK: tl.constexpr,  # places in a block of the cache
):
    """One program: a token's queries for one key/value head, as rows 0..G-1, and its key as row G."""
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    groups = tl.num_programs(1)
    own = tl.load(place + token)  # first, as what it leads to is needed last
    number = tl.load(table + tl.load(slot + token) * table_slot + own // BLOCK).to(tl.int64)
    SIZE: tl.constexpr = 2 * HALF
    head = tl.arange(0, BLOCK_G)
    channel = tl.arange(0, BLOCK_H)
    is_key = head == GROUP
    real = (head <= GROUP)[:, None] & (channel < HALF)[None]
    source = tl.where(is_key, groups * GROUP + group, group * GROUP + head)
    at = row + token * row_token + source[:, None] * SIZE + channel[None]
    low = tl.load(at, mask=real, other=0.0).to(tl.float32)
    high = tl.load(at + HALF, mask=real, other=0.0).to(tl.float32)
    inside = channel < HALF
    if NORM:
        square = tl.sum(low * low, 1) + tl.sum(high * high, 1)
        scale = tl.rsqrt(square / SIZE + eps)[:, None]
        q_low = tl.load(query_weight + channel, mask=inside, other=0.0).to(tl.float32) + offset
        q_high = tl.load(query_weight + HALF + channel, mask=inside, other=0.0).to(tl.float32) + offset
        k_low = tl.load(key_weight + channel, mask=inside, other=0.0).to(tl.float32) + offset
        k_high = tl.load(key_weight + HALF + channel, mask=inside, other=0.0).to(tl.float32) + offset
        low = low * scale * tl.where(is_key[:, None], k_low[None], q_low[None])
        high = high * scale * tl.where(is_key[:, None], k_high[None], q_high[None])
        low = low.to(row.dtype.element_ty).to(tl.float32)  # the reference rounds after the norm
        high = high.to(row.dtype.element_ty).to(tl.float32)
    angle = token * cos_token + channel * cos_channel
    above = HIGH * cos_channel
    cos_low = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)[None]
    cos_high = tl.load(cos + angle + above, mask=inside, other=0.0).to(tl.float32)[None]
    sin_low = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)[None]
    sin_high = tl.load(sin + angle + above, mask=inside, other=0.0).to(tl.float32)[None]
    new_low = (low * cos_low - high * sin_low).to(row.dtype.element_ty)
    new_high = (high * cos_high + low * sin_high).to(row.dtype.element_ty)

    q_at = q + (token * groups * GROUP + group * GROUP + head)[:, None] * SIZE + channel[None]
    q_real = real & (head < GROUP)[:, None]
    tl.store(q_at, new_low, mask=q_real)
    tl.store(q_at + HALF, new_high, mask=q_real)
    base = number * kv_block + own % BLOCK * kv_place + group * kv_head
    k_at = keys + base + tl.zeros([BLOCK_G, 1], tl.int64) + channel[None]
    k_real = real & is_key[:, None]
    tl.store(k_at, new_low, mask=k_real)
    tl.store(k_at + HALF, new_high, mask=k_real)
    v_from = row + token * row_token + (groups * (GROUP + 1) + group) * SIZE + channel
    tl.store(values + base + channel, tl.load(v_from, mask=inside), mask=inside)
    tl.store(values + base + HALF + channel, tl.load(v_from + HALF, mask=inside), mask=inside)
