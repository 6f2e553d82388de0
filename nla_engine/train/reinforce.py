"""Reinforcement: texts that bring the vector back become likelier.

    reward     -mse_nrm - 0.2 * max(0, tokens - free) / (most - free) - 0.5 [not closed] - 0.5 [no opening tag]
    advantage  (reward - mean) / (std + 0.01) over the texts of one vector            (Shao et al. 2024, GRPO)
    loss       mean over tokens of  -advantage * log p + kl * k3
    k3         q/p - log(q/p) - 1, of the chosen token; p: the AV, q: the warm start  (Schulman 2020)

The texts are of the AV as it is, and each is used once, so there is no ratio of probabilities to clip. free: tokens of
a text that cost nothing. The AR is trained along, on the same texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nla_engine.train.pair import TrainedAV
from nla_engine.train.rollouts import Written
from nla_engine.train.supervised import parts

LENGTH_COST, FORM_COST = 0.2, 0.5
#: The part of the longest text that costs nothing.
FREE = 0.75
_LEAST_SPREAD = 0.01


@dataclass(frozen=True)
class Judged:
    """Of n texts: reward and advantage, float32 [n]."""

    reward: torch.Tensor
    advantage: torch.Tensor


def judge(mse: torch.Tensor, written: Sequence[Written], samples: int, most: int) -> Judged:
    """mse: mse_nrm of each text, float32 [n]; the `samples` texts of a vector are together. most: tokens of a text"""
    free = FREE * most
    costs = [
        LENGTH_COST * max(0.0, len(text.ids) - free) / (most - free)
        + FORM_COST * ((text.status != "ok") + (text.status == "untagged"))
        for text in written
    ]
    reward = -mse.float().cpu() - torch.tensor(costs)
    groups = reward.view(-1, samples)
    spread = groups.std(1, correction=0, keepdim=True)
    advantage = (groups - groups.mean(1, keepdim=True)) / (spread + _LEAST_SPREAD)
    return Judged(reward, advantage.flatten())


def av_step(
    av: TrainedAV,
    vectors: torch.Tensor,
    written: Sequence[Written],
    advantage: torch.Tensor,
    *,
    kl: float,
    warm: Mapping[str, torch.Tensor],
    tokens_at_once: int,
) -> float:
    """Gradients of the loss over these texts. vectors: float32 [n, d], one for each text; warm: the trained weights
    of the warm start. Returns the mean k3 per token (0 without `kl`)."""
    ids = [text.ids for text in written]
    total, start = sum(map(len, ids)), len(av.prompt.token_ids)
    apart = torch.zeros((), device=av.lm.device)
    for part in parts([start + len(each) for each in ids], tokens_at_once):
        places = part.tolist()
        some = [ids[place] for place in places]
        of_part = vectors[torch.from_numpy(part)]
        weights = np.repeat(advantage.numpy()[part], [len(each) for each in some])
        log_p = av.log_probs(of_part, some)
        loss = -(torch.from_numpy(weights).to(log_p.device) * log_p).sum()
        if kl:
            with torch.no_grad():
                log_q = av.log_probs(of_part, some, warm)
            k3 = (log_q - log_p).exp() - (log_q - log_p) - 1
            loss = loss + kl * k3.sum()
            apart += k3.detach().sum()
        (loss / total).backward()
    return float(apart) / total
