"""The vectors that take a row's place: its reconstruction, and the controls that show whether that means anything."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from nla_engine.config.patch import RAW, ROW
from nla_engine.roundtrip.score import Controls, unit

#: Of each text its reconstruction, and that of another row; of each row the layer's mean direction, zero, and the row
#: as the store holds it.
RECONSTRUCTION, SHUFFLED, MEAN, ZERO, STORED = "", "shuffled", "mean", "zero", "stored"
VARIANTS = (RECONSTRUCTION, MEAN, SHUFFLED, ZERO, STORED)


@dataclass(frozen=True)
class Lane:
    """Which vectors stand for which rows. row: int64 [n], counted in the rows asked for; vectors: float32 [n, d].

    of_text: int64 [t], which of the n belongs to each text
    """

    variant: str
    row: np.ndarray
    vectors: torch.Tensor
    of_text: np.ndarray


class Variants:
    """Makes the vectors of any rows; those of a row depend on its sequence and position, the seed and
    the sample alone.

    norm: of reconstructions, as the option gives it. The mean direction gets the same norm; with raw, that of the row.
    mean: float32 [d], the mean of the layer's directions, at any length
    sample: sequences and positions, int64 [m], of reconstructions, float32 [m, d], that stand for those of other rows
    controls: the sample without those that have no direction
    """

    def __init__(
        self,
        norm: str,
        mean: torch.Tensor,
        sample: tuple[np.ndarray, np.ndarray, torch.Tensor],
        seed: int,
    ) -> None:
        sequences, positions, vectors = sample
        sound = unit(vectors).isfinite().all(1)
        kept = sound.cpu().numpy()
        self.norm, self.mean, self._vectors = norm, unit(mean[None]), vectors[sound]
        self.controls = Controls.of(sequences[kept], positions[kept], self._vectors, seed)

    def of(
        self,
        sequences: np.ndarray,
        positions: np.ndarray,
        norms: np.ndarray,
        stored: torch.Tensor,
        texts: np.ndarray,
        reconstructed: torch.Tensor,
        named: torch.Tensor | None = None,
    ) -> list[Lane]:
        """Every variant, those of the texts first.

        sequences, positions: int64 [R], of the rows; norms: float32 [R]; stored: float32 [R, d]
        texts: int64 [t], which of the rows each text belongs to; reconstructed: float32 [t, d]
        named: float32 [t, d], the other rows' reconstructions; where they have no direction, those of the sample
        """
        partner = self.controls.partners(sequences[texts], positions[texts])
        others = self._vectors[torch.from_numpy(partner).to(stored.device)]
        if named is not None:
            others = torch.where(unit(named).isfinite().all(1, keepdim=True), named, others)
        of_rows = torch.from_numpy(norms).to(stored.device)[:, None]
        fixed = of_rows if self.norm in (ROW, RAW) else torch.full_like(of_rows, float(self.norm))
        of_texts = fixed[torch.from_numpy(texts).to(stored.device)]
        each, numbers = np.arange(len(texts)), np.arange(len(sequences))
        return [
            Lane(RECONSTRUCTION, texts, self._scaled(reconstructed, of_texts), each),
            Lane(SHUFFLED, texts, self._scaled(others, of_texts), each),
            Lane(MEAN, numbers, self.mean * fixed, texts),
            Lane(ZERO, numbers, torch.zeros_like(stored), texts),
            Lane(STORED, numbers, stored, texts),
        ]

    def _scaled(self, vectors: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
        return vectors if self.norm == RAW else unit(vectors) * norms
