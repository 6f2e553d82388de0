"""Vectors of any origin: a layer's rows, own arithmetic, a probe's direction. Their form, checked, and their scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nla_engine.errors import RequestError
from nla_engine.roundtrip import score
from nla_engine.roundtrip.chosen import CONTROL_ROWS
from nla_engine.roundtrip.score import Controls
from nla_engine.store.views.draw import draw_rows


def as_vectors(given: Any) -> np.ndarray:
    """float32 [n, d] of floating-point numbers [d] or [n, d]: an array, a tensor, a layer, or lists of them.

    RequestError for other types and shapes, for no vectors, and for numbers that float32 does not hold.
    """
    if isinstance(given, list | tuple) and given and all(isinstance(each, torch.Tensor) for each in given):
        shapes = {tuple(each.shape) for each in given}
        if len(shapes) > 1:
            raise RequestError(
                f"the vectors have shapes {', '.join(map(str, sorted(shapes)))}: give them one width"
            )
        given = torch.stack([each.detach() for each in given])
    if isinstance(given, torch.Tensor):
        wide = given.detach().to("cpu", torch.float64 if given.dtype == torch.float64 else torch.float32)
        given = wide.numpy() if given.dtype.is_floating_point else np.empty(0, str(given.dtype).split(".")[1])
    try:
        array = np.asarray(given)
    except ValueError as error:
        raise RequestError(f"the vectors are no array [n, d]: {error}") from None
    if array.dtype.kind != "f":
        raise RequestError(f"the vectors are {array.dtype}: give floating-point numbers, [d] or [n, d]")
    if array.ndim not in (1, 2) or not array.size:
        raise RequestError(f"the vectors have shape {array.shape}: give [d] or [n, d], at least one vector")
    array = np.atleast_2d(array)
    with np.errstate(over="ignore", under="ignore"):
        vectors = np.ascontiguousarray(array, np.float32)
    lost = np.isfinite(array).all(1) & (~np.isfinite(vectors).all(1) | (array.any(1) & ~vectors.any(1)))
    if lost.any():
        raise RequestError(f"vector {np.argmax(lost)} has numbers beyond what float32 holds: scale it")
    return vectors


@dataclass(frozen=True)
class ArrayRows:
    """Vectors by number, as stage 2 reads those of a layer. array: float32 [n, d]"""

    array: np.ndarray

    def torch(self, rows: np.ndarray, device: torch.device) -> torch.Tensor:
        """float32 [n, d] on the device."""
        return torch.from_numpy(self.array[rows]).to(device)

    def norm_at(self, rows: np.ndarray) -> np.ndarray:
        """L2 norms, float64 [n]: the square of a large number may not be finite in float32."""
        return np.sqrt(np.square(self.array[rows], dtype=np.float64).sum(1))


@dataclass(frozen=True)
class Scores:
    """How near each reconstruction is to its vector, and its controls, as in the table of a round trip.

    cos, cos_shuffled, retrieval_rank: float64 [m], NaN where there is none; best: bool [m], of a vector's texts
    among: how many distinct vectors a rank is among
    """

    cos: np.ndarray
    cos_shuffled: np.ndarray
    retrieval_rank: np.ndarray
    best: np.ndarray
    among: int

    @classmethod
    def of(
        cls, vectors: np.ndarray, sequences: np.ndarray, positions: np.ndarray, read: np.ndarray, seed: int
    ) -> Scores:
        """vectors, read: float32 [m, d], each text's vector and its reconstruction (NaN: none).

        sequences, positions: int64 [m], together equal for the texts of one vector; a vector is held against one of
        another sequence, if there is one
        """
        places = np.stack([sequences, positions], 1)
        _, first, rows = np.unique(places, axis=0, return_index=True, return_inverse=True)  # in their order
        place = draw_rows(first, CONTROL_ROWS, seed)
        vectors_of = torch.from_numpy(vectors[place])
        controls = Controls.of(sequences[place], positions[place], vectors_of, seed)
        v, r = torch.from_numpy(vectors), torch.from_numpy(read)
        cos = score.cosine(v, r)
        return cls(
            cos,
            controls.shuffled(sequences, positions, r),
            controls.rank(v, r),
            score.best_of(rows.ravel(), cos),
            len(controls.distinct),
        )
