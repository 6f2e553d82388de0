"""Round-trip error: how much of a vector came back, and the controls that show whether that means anything.

With x^ = x / ||x||, v the original and r its reconstruction:

    cos = v^ . r^            mse_nrm = 2 (1 - cos)
    fve_nrm = 1 - mse_nrm / Var,       Var = E ||v^ - mu||^2 = 1 - ||mu||^2,           mu = E v^
    fve_meannorm = 1 - mse_nrm / M,    M = E ||v^ - mu/||mu|| ||^2 = 2 (1 - sqrt(1 - Var))
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

#: Vectors whose directions are nearer than this count as one: bfloat16 arithmetic alone moves a vector that far.
COINCIDENCE = 0.02
#: Retrieval scores that differ by less are tied: float64 sums in another order differ by less.
_TIE = 1e-11


def unit(x: torch.Tensor) -> torch.Tensor:
    """float32 [n, d] -> the same rows at length 1 (norms summed in float64); zero and non-finite rows become NaN."""
    return _directions(x).float()


def _directions(x: torch.Tensor) -> torch.Tensor:
    """`unit` in float64."""
    norm = x.double().square().sum(-1, keepdim=True).sqrt()
    return x / torch.where((norm == 0) | ~norm.isfinite(), torch.nan, norm)


def cosine(v: torch.Tensor, r: torch.Tensor) -> np.ndarray:
    """float64 [n]: cos of the rows of v and r, float32 [n, d]; NaN where either has no direction."""
    products = (unit(v).double() * unit(r).double()).sum(-1)
    return products.clamp(-1.0, 1.0).cpu().numpy()


def mse_nrm(cos: np.ndarray) -> np.ndarray:
    """Squared distance of the two unit vectors: 0 perfect, 2 orthogonal, 4 opposite."""
    return 2.0 * (1.0 - cos)


def best_of(rows: np.ndarray, cos: np.ndarray) -> np.ndarray:
    """bool [n]: the text with the highest cos of each row, the first of equals. rows: int64 [n]; cos: NaN is lowest."""
    order = np.lexsort((-np.where(np.isfinite(cos), cos, -2.0), rows))  # a stable sort
    best = np.zeros(len(rows), bool)
    best[order[np.unique(rows[order], return_index=True)[1]]] = True
    return best


class DirectionVariance:
    """Var of a stream of rows: 1 - ||mean of the unit rows||^2, in float64."""

    def __init__(self) -> None:
        self.rows = 0
        self._sum: torch.Tensor | None = None

    def add(self, x: torch.Tensor) -> None:
        """Add rows [n, d] of any floating-point type; rows without a direction are left out."""
        directions = _directions(x)
        directions = directions[directions.isfinite().all(1)]
        self.rows += len(directions)
        total = directions.sum(0)
        self._sum = total if self._sum is None else self._sum + total

    @property
    def mean(self) -> torch.Tensor:
        """mu, float64 [d]: the mean of the unit rows. There must have been one."""
        assert self._sum is not None
        return self._sum / self.rows

    @property
    def value(self) -> float:
        """NaN without rows. 0 if all rows point the same way: FVE is then undefined."""
        if not self.rows or self._sum is None:
            return math.nan
        mean = self._sum / self.rows
        return max(1.0 - float(mean @ mean), 0.0)


def fve_nrm(mse: np.ndarray, variance: float) -> np.ndarray:
    """Fraction of variance explained; NaN if the variance is 0."""
    return 1.0 - mse / variance if variance > 0 else np.full_like(mse, math.nan)


def fve_meannorm(mse: np.ndarray, variance: float) -> np.ndarray:
    """The same, with always answering the mean direction as the baseline."""
    baseline = 2.0 * (1.0 - math.sqrt(1.0 - variance))
    return 1.0 - mse / baseline if baseline > 0 else np.full_like(mse, math.nan)


@dataclass(frozen=True)
class Controls:
    """A fixed sample of rows that reconstructions are compared with.

    sequences, positions: int64 [m] of the rows; directions: float32 [m, d] unit rows, all finite, on any device.
    distinct: float64 [k, d], k <= m: the directions of the sample, coinciding ones once.
    Both controls of a row depend on its sequence and position, the seed and this sample, in its order, alone: never on
    batches, nor on where rows lie in a store.
    """

    sequences: np.ndarray
    positions: np.ndarray
    directions: torch.Tensor
    distinct: torch.Tensor
    seed: int

    @classmethod
    def of(cls, sequences: np.ndarray, positions: np.ndarray, vectors: torch.Tensor, seed: int) -> Controls:
        directions = _directions(vectors)
        sound = directions.isfinite().all(1)
        kept, directions = sound.cpu().numpy(), directions[sound]
        return cls(sequences[kept], positions[kept], directions.float(), _distinct(directions), seed)

    def __len__(self) -> int:
        return len(self.sequences)

    def shuffled(self, sequences: np.ndarray, positions: np.ndarray, r: torch.Tensor) -> np.ndarray:
        """float64 [n]: cos of each reconstruction r [n, d] with another row's vector, of another sequence if any."""
        partner = self.partners(sequences, positions)
        if not len(self):
            return np.full(len(sequences), np.nan)
        out = cosine(self.directions[torch.from_numpy(partner).to(r.device)], r)
        out[partner < 0] = np.nan
        return out

    def partners(self, sequences: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """int64 [n]: place in the sample of another row for each, of another sequence if any; -1 if there is none."""
        pairs = zip(sequences.tolist(), positions.tolist(), strict=True)
        return np.array([self._partner(sequence, position) for sequence, position in pairs], np.int64)

    def _partner(self, sequence: int, position: int) -> int:
        """Place in the sample of the row's partner, or -1 if the sample holds no other row."""
        count = len(self)
        if not count:
            return -1
        counter = sequence << 128 | position << 64  # the lowest 64 bits count the draws
        start = int(np.random.Generator(np.random.Philox(key=self.seed, counter=counter)).integers(count))
        order = (start + np.arange(count)) % count
        other = self.sequences[order] != sequence
        for candidates in (other, other | (self.positions[order] != position)):
            if candidates.any():
                return int(order[candidates.argmax()])
        return -1

    def rank(self, v: torch.Tensor, r: torch.Tensor) -> np.ndarray:
        """float64 [n]: place of the own vector among the distinct ones of the sample, by nearness to r.

        v, r: [n, d] vectors and their reconstructions. The rank is 1 + the number of vectors that are at least as near
        to r and do not coincide with v. Rows of one vector rank alike; a tie counts against the own vector. NaN if v or
        r has no direction, or if the sample holds no other vector.
        """
        own, read = _directions(v), _directions(r)
        rival = ~_coincide(own @ self.distinct.T)
        mine = (own * read).sum(-1)
        ahead = rival & (read @ self.distinct.T > mine[:, None] - _TIE)
        rank = torch.where(mine.isfinite() & rival.any(1), 1.0 + ahead.sum(1), torch.nan)
        return rank.double().cpu().numpy()


def _coincide(cos: torch.Tensor) -> torch.Tensor:
    """bool: whether unit vectors with these cosines are at most COINCIDENCE apart."""
    return 2.0 - 2.0 * cos <= COINCIDENCE**2


def _distinct(directions: torch.Tensor) -> torch.Tensor:
    """The rows of float64 [m, d] that coincide with none of those taken before them."""
    same = _coincide(directions @ directions.T).cpu().numpy()
    taken = np.zeros(len(same), bool)
    for place, others in enumerate(same):
        taken[place] = not (others[:place] & taken[:place]).any()
    return directions[torch.from_numpy(taken).to(directions.device)]
