"""Log-probabilities of given tokens and of the most likely ones, from logits. Natural logarithms, temperature 1."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Likelihood:
    """Of n distributions: the log-probability of a token, and the k most likely tokens with theirs, likeliest first.

    chosen: float32 [n], NaN where no token was asked for; top_token: int64 [n, k]; top: float32 [n, k]
    """

    chosen: torch.Tensor
    top_token: torch.Tensor
    top: torch.Tensor


def likelihood(logits: torch.Tensor, token: torch.Tensor, k: int) -> Likelihood:
    """Of log_softmax(logits) [n, V], with sums in float32. token: int64 [n], -1 for none; k may be 0.

    Launches only: no synchronisation.
    """
    wide = logits.float()
    total = wide.logsumexp(-1, keepdim=True)
    chosen = wide.gather(-1, token.clamp(min=0)[:, None]) - total
    best = wide.topk(k, -1) if k else wide[:, :0].sort(-1)
    return Likelihood(chosen[:, 0].masked_fill(token < 0, torch.nan), best.indices, best.values - total)


def rank(logits: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """int64 [n]: 1 + how many tokens are likelier than the given one, int64 [n]; 0 for none (-1)."""
    own = logits.gather(-1, token.clamp(min=0)[:, None])
    return ((logits > own).sum(-1) + 1).masked_fill(token < 0, 0)


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """float32 [n]: of softmax(logits) [n, V], in nats."""
    return torch.special.entr(logits.float().softmax(-1)).sum(-1)
