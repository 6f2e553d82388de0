"""The next token of every lane: greedy, or sampled with random numbers that belong to (seed, sequence, position).

Sampling is an exponential race (Gumbel-max): argmax_v logit_v / T - log(-log u_v) draws v with probability
softmax(logit / T). u_v is a counter-based hash, so no state is kept and batching cannot change a draw.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy. No other transformation of the logits is ever applied."""

    temperature: float = 0.0
    seed: int = 0


def choose(
    logits: torch.Tensor, sequence: torch.Tensor, position: torch.Tensor, sampling: Sampling
) -> torch.Tensor:
    """int64 [n]: the token chosen for each row of logits [n, V]; sequence, position: int64 [n] of the chosen token."""
    if sampling.temperature == 0.0:
        return logits.argmax(-1)
    vocabulary = torch.arange(logits.shape[-1], device=logits.device)
    key = torch.zeros_like(sequence)
    for part in (sampling.seed, sampling.seed >> 32, sequence, sequence >> 32, position):
        key = _hash(key ^ (part & _MASK))
    bits = _hash(key[:, None] ^ _hash(vocabulary)[None])
    u = (
        (bits >> 9).float() + 0.5
    ) * 2.0**-23  # 23 bits: with 24 the largest would round to 1, a certain winner
    return (logits.float() / sampling.temperature - torch.log(-torch.log(u))).argmax(-1)


def _hash(x: torch.Tensor) -> torch.Tensor:
    """A 32-bit mixer (two multiply-xorshift rounds, the 'lowbias32' constants of C. Wellons) on int64 tensors."""
    x = x & _MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)
