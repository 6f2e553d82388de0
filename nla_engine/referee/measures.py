"""What a patch changes in the model's distribution of the next token: `ops.divergence` of all lanes, part by part."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from nla_engine.models.load import LanguageModel
from nla_engine.models.logits import logit_pieces
from nla_engine.ops.divergence import divergence

#: Bytes of the logits [n, vocabulary], as float32, that are held at once.
_LOGIT_BYTES = {"cpu": 32 << 20, "cuda": 1 << 30}


@dataclass(frozen=True)
class Measured:
    """float64 [n, m] each: of n lanes at m positions. logprob_change is NaN where there is no next token."""

    kl: np.ndarray
    top1_same: np.ndarray
    logprob_change: np.ndarray


@torch.inference_mode()
def measure(
    lm: LanguageModel,
    own: torch.Tensor,
    patched: torch.Tensor,
    row: np.ndarray,
    following: np.ndarray,
    *,
    plain: bool = False,
) -> Measured:
    """Compare final states `patched` [n, m, d] with the model's own, [R, m, d].

    row: int64 [n], ascending, which of the R each lane belongs to; following: int64 [R, m], the next tokens, -1: none
    plain: in torch on every device
    """
    lanes, positions, _ = patched.shape
    device = lm.device
    out = torch.empty((3, lanes, positions), device=device)
    at = torch.from_numpy(row).to(device)[:, None] * positions + torch.arange(positions, device=device)
    tokens = torch.from_numpy(np.ascontiguousarray(following[row])).to(device)
    for part in logit_pieces(lanes, lm.vocab_size * positions, _LOGIT_BYTES[device.type]):
        first, last = int(row[part.start]), int(row[part.stop - 1]) + 1
        before = lm.logits(own[first:last].flatten(0, 1))
        after = lm.logits(patched[part].flatten(0, 1))
        places = (at[part] - first * positions).flatten()
        found = divergence(before, after, places, tokens[part].flatten(), plain=plain)
        parts = torch.stack([found.kl, found.same, found.change])
        out[:, part] = parts.view(3, -1, positions)
    return Measured(*out.double().cpu().numpy())
