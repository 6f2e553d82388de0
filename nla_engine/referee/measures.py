"""What a patch changes in the model's distribution of the next token.

With P the distribution from the model's own row and Q the one after a patch, in float32 and in nats:

    kl = sum P (log P - log Q)        logprob_change = log Q(next) - log P(next)        top1_same: argmax Q = argmax P
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from nla_engine.models.load import LanguageModel

#: Entries of the logits [n, vocabulary] that are held at once.
_LOGITS = {"cpu": 1 << 23, "cuda": 1 << 28}


@dataclass(frozen=True)
class Measured:
    """float64 [n, m] each: of n lanes at m positions. logprob_change is NaN where there is no next token."""

    kl: np.ndarray
    top1_same: np.ndarray
    logprob_change: np.ndarray


@torch.inference_mode()
def measure(
    lm: LanguageModel, own: torch.Tensor, patched: torch.Tensor, row: np.ndarray, following: np.ndarray
) -> Measured:
    """Compare final states `patched` [n, m, d] with the model's own, [R, m, d].

    row: int64 [n], ascending, which of the R each lane belongs to; following: int64 [R, m], the next tokens, -1: none
    """
    lanes, positions, _ = patched.shape
    out = torch.empty((3, lanes, positions), dtype=torch.float64)
    step = max(_LOGITS[lm.device.type] // (lm.vocab_size * positions), 1)
    for start in range(0, lanes, step):
        rows, place = np.unique(row[start : start + step], return_inverse=True)
        tokens = torch.from_numpy(following[rows]).to(lm.device)
        before = _log_softmax(lm, own[torch.from_numpy(rows).to(lm.device)])
        after = _log_softmax(lm, patched[start : start + step])
        at = torch.from_numpy(place).to(lm.device)
        change = _of(after, tokens[at]) - _of(before, tokens)[at]
        same = after.argmax(-1) == before.argmax(-1)[at]
        before = before[at]
        # A token of probability 0 adds nothing.
        kl = torch.where(before > -torch.inf, before.exp() * (before - after), 0.0).sum(-1)
        out[:, start : start + step] = torch.stack([kl.clamp(min=0.0), same.float(), change]).double().cpu()
    return Measured(*out.numpy())


def _log_softmax(lm: LanguageModel, states: torch.Tensor) -> torch.Tensor:
    """float32 [n, m, columns] of final states [n, m, d]."""
    return lm.logits(states.flatten(0, 1)).float().log_softmax(-1).view(*states.shape[:2], -1)


def _of(logprobs: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """float32 [n, m]: the log-probabilities of these tokens, int64 [n, m]; NaN for -1."""
    found = logprobs.gather(-1, tokens.clamp(min=0)[..., None])[..., 0]
    return found.masked_fill(tokens < 0, torch.nan)
