"""Vectors on their way into running sequences: kept per slot, written where the pass reads their tokens.

Vectors enter prompts only, so a decode step, and the CUDA graph that holds it, has nothing to do: what they change is
in the keys and values by then.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from nla_engine.engine.transfer import to_device
from nla_engine.models.injection import Injection


def at_scale(vectors: torch.Tensor, injection: Injection) -> torch.Tensor:
    """float [n, d], finite and not zero -> float32 with the injection's norm (1 to match norms).

    Norms are summed in float64.
    """
    scale = 1.0 if injection.norm_match else injection.scale
    if scale is None:
        return vectors.float()
    norm = vectors.double().square().sum(-1, keepdim=True).sqrt()
    return (vectors * (scale / norm)).float()


class Injector:
    """The vectors of the running sequences, float32 [slots + 1, most, d], and how they enter.

    most: vectors per sequence
    """

    def __init__(
        self, injection: Injection, slots: int, most: int, d_model: int, device: torch.device
    ) -> None:
        self.injection, self.most = injection, most
        self._table = torch.zeros(slots + 1, most, d_model, device=device)

    def put(self, slots: Sequence[int], vectors: Sequence[torch.Tensor]) -> None:
        """Give these slots their vectors, [n, d] each with n <= most, of any float dtype, at scale."""
        at = np.array(
            [(slot, k) for slot, given in zip(slots, vectors, strict=True) for k in range(len(given))]
        )
        slot, number = to_device(np.ascontiguousarray(at.T), self._table.device)
        self._table[slot, number] = torch.cat(list(vectors)).to(self._table.device, torch.float32)

    def inject(self, hidden: torch.Tensor, entering: torch.Tensor) -> None:
        """Change hidden [T, d] in place, rounded once.

        entering: int64 [3, m]: token of the pass, slot, number of the vector in the slot
        """
        token, slot, number = entering
        vectors = self._table[slot, number]
        if self.injection.norm_match:
            there = hidden[token].double()
            vectors = vectors * there.square().sum(-1, keepdim=True).sqrt()
        if self.injection.adds:
            vectors = hidden[token].double() + vectors
        hidden[token] = vectors.to(hidden.dtype)
