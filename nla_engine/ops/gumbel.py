"""Scores whose argmax is a draw from the softmax (Gumbel-max): logits plus noise. Reference in torch, parts for Triton.

    score_v = logit_v / a + g_v / b       argmax_v draws v with probability softmax(logit / T)
    a = max(T, 1), b = max(1 / T, 1)      so that neither term overflows float32, for any T > 0

g_v = -log(-log u_v), where u_v is a counter-based hash of (seed, sequence, position, v), so no state is kept and
batching cannot change a draw (the mixer is C. Wellons' 'lowbias32').
"""

from __future__ import annotations

from typing import TypeVar

import torch

from nla_engine.ops.triton_module import tl, triton

_MASK = 0xFFFFFFFF
LARGEST = torch.finfo(torch.float32).max
_Bits = TypeVar("_Bits", int, torch.Tensor)


def scores(
    logits: torch.Tensor, sequence: torch.Tensor, position: torch.Tensor, temperature: float, seed: int
) -> torch.Tensor:
    """float32 [n, V] for logits [n, V]; sequence, position: int64 [n] of the token that is drawn."""
    vocabulary = torch.arange(logits.shape[-1], device=logits.device)
    key = torch.full_like(sequence, seed_key(seed))
    for part in (sequence, sequence >> 32, position):
        key = hash_bits(key ^ (part & _MASK))
    bits = hash_bits(key[:, None] ^ hash_bits(vocabulary)[None])
    u = ((bits >> 9).float() + 0.5) * 2.0**-23  # 23 bits: with 24 the largest would round to 1 and always win
    a, b = divisors(temperature)
    return logits.float() / a - torch.log(-torch.log(u)) / b


def divisors(temperature: float) -> tuple[float, float]:
    """Divisors of the logits and of their Gumbel noise: the scores are logit / T + noise, times one positive number."""
    return min(max(temperature, 1.0), LARGEST), min(max(1.0 / temperature, 1.0), LARGEST)


def seed_key(seed: int) -> int:
    """The seed's 32 bits: the first key of the hash."""
    return hash_bits(hash_bits(seed & _MASK) ^ (seed >> 32 & _MASK))


def hash_bits(x: _Bits) -> _Bits:
    """A 32-bit mixer, two multiply-xorshift rounds, on Python's integers or int64 tensors."""
    x = x & _MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


@triton.jit
def draw_key(key, sequence, position, slot):
    """uint32: the hash of the seed's key (int32), and of a slot's sequence and next position (pointers to int64)."""
    number = tl.load(sequence + slot)
    draw = key.to(tl.uint32)
    draw = mix(draw ^ number.to(tl.uint32))
    draw = mix(draw ^ (number >> 32).to(tl.uint32))
    return mix(draw ^ (tl.load(position + slot) + 1).to(tl.uint32))


@triton.jit
def draw_scores(logits, token, draw, logits_divisor, noise_divisor):
    """`scores` of some tokens of one row. logits: float32; token: int32; draw: of `draw_key`."""
    bits = mix(mix(token.to(tl.uint32)) ^ draw)
    u = ((bits >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23
    return tl.div_rn(logits, logits_divisor) - tl.div_rn(tl.log(-tl.log(u)), noise_divisor)


@triton.jit
def mix(x):
    """`hash_bits` on uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def sortable(x):
    """float32 to int32 that sorts as torch sorts floats: -0 is 0, NaN is the largest."""
    as_int = (x + 0.0).to(tl.int32, bitcast=True)  # + 0: -0 is 0
    order = as_int ^ ((as_int >> 31) & 0x7FFFFFFF)
    return tl.where(x == x, order, 0x7FFFFFFF)


@triton.jit
def first_of_best(order, token):
    """The first token among those of the largest order."""
    return tl.min(tl.where(order == tl.max(order, 0), token, 0x7FFFFFFF), 0)
