"""Compressed keys of multi-head latent attention (DeepSeek-AI, arXiv:2405.04434): from a row of their projection to the
cache, and the rotated part of the queries. Reference and Triton kernel.

    latent, turned = split(row);  cache[table[slot, place // size], place % size] = [rms_norm(latent), rotate(turned)]

rotate turns pairs of channels (x, y) by the token's angles: (x cos - y sin, y cos + x sin). The pairs are
(2 i, 2 i + 1) where channels are interleaved, else (i, i + R / 2). The results are at i and i + R / 2 either way:
queries and keys are turned alike, so their products are those of transformers. float32 inside, rounded once.

All heads read this one key, and its first part, the latent, is their one value. What a head's own projections of keys
and values would do to the latent is done to its query and to what it attends to instead:

    q . (U x) = (U^T q) . x,     sum_p a_p (V x_p) = V sum_p a_p x_p
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nla_engine.ops.backends import has_triton
from nla_engine.ops.norm import rms_norm_reference
from nla_engine.ops.triton_module import tl, triton


@dataclass(frozen=True)
class Angles:
    """cos and sin of every token's angles, [T, R / 2] each, with the same strides. interleaved: whether the channels of
    a pair are neighbours."""

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool


@dataclass(frozen=True)
class LatentNorm:
    """RMSNorm of the latent: weight [L], eps, and a factor of the result."""

    weight: torch.Tensor
    eps: float
    factor: float = 1.0


def store_latent(
    row: torch.Tensor,
    norm: LatentNorm,
    angles: Angles,
    turned: torch.Tensor,
    query: torch.Tensor,
    keys: torch.Tensor,
    table: torch.Tensor,
    slot: torch.Tensor,
    place: torch.Tensor,
) -> None:
    """row [T, L + R]; turned [T, H, R], the part of the queries that rotates: goes to query [T, H, L + R], rotated,
    behind the first L channels, which are left alone; keys [blocks, size, 1, L + R], table int32 [slots, columns] to
    write at (slot, place) int64 [T]. Triton where it runs, else the reference.
    """
    run = store_latent_triton if has_triton(row.device) else store_latent_reference
    run(row, norm, angles, turned, query, keys, table, slot, place)


def store_latent_reference(
    row: torch.Tensor,
    norm: LatentNorm,
    angles: Angles,
    turned: torch.Tensor,
    query: torch.Tensor,
    keys: torch.Tensor,
    table: torch.Tensor,
    slot: torch.Tensor,
    place: torch.Tensor,
) -> None:
    """`store_latent` in plain torch."""
    size = len(norm.weight)
    at = table[slot, place // keys.shape[1]].long(), place % keys.shape[1]
    latent = rms_norm_reference(row[:, :size].float(), norm.weight, norm.eps) * norm.factor
    keys[at] = torch.cat([latent.to(row.dtype), _rotate(row[:, size:], angles)], -1)[:, None]
    query[..., size:] = _rotate(turned, angles)


def _rotate(x: torch.Tensor, angles: Angles) -> torch.Tensor:
    """x [T, R] or [T, H, R]."""
    cos, sin = angles.cos.float(), angles.sin.float()
    if x.ndim == 3:
        cos, sin = cos[:, None], sin[:, None]
    wide = x.float()
    low, high = (wide[..., ::2], wide[..., 1::2]) if angles.interleaved else wide.chunk(2, -1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1).to(x.dtype)


def store_latent_triton(
    row: torch.Tensor,
    norm: LatentNorm,
    angles: Angles,
    turned: torch.Tensor,
    query: torch.Tensor,
    keys: torch.Tensor,
    table: torch.Tensor,
    slot: torch.Tensor,
    place: torch.Tensor,
) -> None:
    """`store_latent` as one launch."""
    size, heads, half = len(norm.weight), turned.shape[1], turned.shape[2] // 2
    if row.stride(1) != 1 or turned.stride(2) != 1 or not query.is_contiguous() or keys.stride(3) != 1:
        raise ValueError("latents: the channels of a row, a query or a key are not contiguous")
    _latent_kernel[(len(row),)](
        row,
        norm.weight,
        angles.cos,
        angles.sin,
        turned,
        query,
        keys,
        table,
        slot,
        place,
        row.stride(0),
        angles.cos.stride(0),
        angles.cos.stride(1),
        turned.stride(0),
        turned.stride(1),
        table.stride(0),
        keys.stride(0),
        keys.stride(1),
        norm.eps,
        norm.factor,
        HEADS=heads,
        LATENT=size,
        HALF=half,
        BLOCK_L=triton.next_power_of_2(size),
        BLOCK_H=triton.next_power_of_2(heads + 1),
        BLOCK_R=triton.next_power_of_2(half),
        INTERLEAVED=angles.interleaved,
        BLOCK=keys.shape[1],
        num_warps=4,
    )


@triton.jit
def _latent_kernel(
    row,  # [T, L + R]
    weight,  # [L]
    cos,  # [T, R / 2]
    sin,  # [T, R / 2], strides of cos
    turned,  # [T, H, R]
    query,  # [T, H, L + R], contiguous
    keys,  # [blocks, BLOCK, 1, L + R]
    table,  # int32 [slots, columns]
    slot,  # int64 [T]
    place,  # int64 [T]
    row_token,
    cos_token,
    cos_channel,
    turned_token,
    turned_head,
    table_slot,
    key_block,
    key_place,
    eps,
    factor,
    HEADS: tl.constexpr,
    LATENT: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK: tl.constexpr,  # places in a block of the cache
):
    """One program: a token's latent; the rotated part of its queries as rows 0..H-1, and of its key as row H."""
    token = tl.program_id(0).to(tl.int64)
    own = tl.load(place + token)  # first, as what it leads to is needed last
    number = tl.load(table + tl.load(slot + token) * table_slot + own // BLOCK).to(tl.int64)
    k_at = keys + number * key_block + own % BLOCK * key_place
    SIZE: tl.constexpr = LATENT + 2 * HALF

    channel = tl.arange(0, BLOCK_L)
    inside = channel < LATENT
    x = tl.load(row + token * row_token + channel, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / LATENT + eps) * factor
    latent = x * scale * tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(k_at + channel, latent.to(keys.dtype.element_ty), mask=inside)

    head = tl.arange(0, BLOCK_H)[:, None]
    pair = tl.arange(0, BLOCK_R)[None]
    there = pair < HALF
    low_at, apart = pair, HALF
    if INTERLEAVED:
        low_at, apart = 2 * pair, 1
    q_from = turned + token * turned_token + head * turned_head + low_at
    q_real = there & (head < HEADS)
    k_from = row + token * row_token + LATENT + low_at + head * 0
    k_real = there & (head == HEADS)
    low = tl.load(q_from, mask=q_real, other=0.0).to(tl.float32)
    high = tl.load(q_from + apart, mask=q_real, other=0.0).to(tl.float32)
    low += tl.load(k_from, mask=k_real, other=0.0).to(tl.float32)
    high += tl.load(k_from + apart, mask=k_real, other=0.0).to(tl.float32)
    angle = token * cos_token + pair * cos_channel
    c = tl.load(cos + angle, mask=there, other=0.0).to(tl.float32)
    s = tl.load(sin + angle, mask=there, other=0.0).to(tl.float32)
    new_low = (low * c - high * s).to(row.dtype.element_ty)
    new_high = (high * c + low * s).to(row.dtype.element_ty)
    q_at = query + (token * HEADS + head) * SIZE + LATENT + pair
    tl.store(q_at, new_low, mask=q_real)
    tl.store(q_at + HALF, new_high, mask=q_real)
    k_at = k_at + LATENT + pair + head * 0
    tl.store(k_at, new_low, mask=k_real)
    tl.store(k_at + HALF, new_high, mask=k_real)
