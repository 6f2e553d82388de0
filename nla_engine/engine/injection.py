"""How vectors enter sequences: each replaces the embedding of one token of its prompt.

embedding(token at the marker)  becomes  v * scale / ||v||        after the embedding module has run
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from nla_engine.engine.transfer import to_device

#: Stands in token ids for the sequence's own vector.
VECTOR = -1


@dataclass(frozen=True)
class Injection:
    """Where a vector enters a prompt, and with which norm.

    token_ids: the prompt; place: index of the token whose embedding the vector replaces
    scale: L2 norm that every vector is scaled to; None: vectors enter as they are
    """

    token_ids: tuple[int, ...]
    place: int
    scale: float | None

    @property
    def prefix(self) -> tuple[int, ...]:
        """The tokens before the vector: the same for all sequences."""
        return self.token_ids[: self.place]

    @property
    def tail(self) -> tuple[int, ...]:
        """The vector's place and the tokens after it, as a request has them."""
        return (VECTOR, *self.token_ids[self.place + 1 :])

    def scaled(self, vectors: torch.Tensor) -> torch.Tensor:
        """float32 [n, d], finite and not zero -> the same vectors with norm `scale`. Norms are summed in float64."""
        if self.scale is None:
            return vectors
        norm = vectors.double().square().sum(-1, keepdim=True).sqrt()
        return (vectors * (self.scale / norm)).float()


class InjectedVectors:
    """The vectors of the running sequences, one per slot: [slots + 1, d] in the model's dtype."""

    def __init__(self, slots: int, d_model: int, device: torch.device, dtype: torch.dtype) -> None:
        self._table = torch.zeros(slots + 1, d_model, device=device, dtype=dtype)

    def put(self, slots: Sequence[int], vectors: Sequence[torch.Tensor]) -> None:
        """Give these slots their vectors, [d] each, of any float dtype."""
        at = to_device(np.array(slots), self._table.device)
        self._table[at] = torch.stack(list(vectors)).to(self._table.device, self._table.dtype)

    def embed(self, embedding: nn.Module, ids: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        """ids, slot int64 [T], VECTOR among the ids -> embeddings [T, d]."""
        embeds: torch.Tensor = embedding(ids.clamp(min=0))
        return torch.where((ids == VECTOR)[:, None], self._table[slot], embeds)
