"""Var of the vectors of a layer, or of any Parquet file: the number that fve_nrm is scaled by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nla_engine.errors import StoreError
from nla_engine.roundtrip.score import DirectionVariance
from nla_engine.store import LayerReader
from nla_engine.store.exchange.vectors import read_vectors
from nla_engine.store.views.draw import draw_rows

#: Rows of a layer that Var is measured on, at most, and rows read at once.
VARIANCE_ROWS = 100_000
_BLOCK = 4096


@dataclass(frozen=True)
class VectorVariance:
    """variance: Var of the directions of `variance_rows` rows: all `rows` but those that are zero or not finite."""

    file: str
    column: str
    d_model: int
    variance: float
    variance_rows: int
    rows: int
    zero_rows: int
    nonfinite_rows: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def layer_variance(layer: LayerReader, seed: int, device: torch.device) -> DirectionVariance:
    """Var of the rows of a layer, or of VARIANCE_ROWS of them that the seed draws."""
    rows = draw_rows(layer.in_order(np.arange(len(layer))), VARIANCE_ROWS, seed)
    variance = DirectionVariance()
    for start in range(0, len(rows), _BLOCK):
        variance.add(layer.torch(rows[start : start + _BLOCK], device))
    return variance


def measure_variance(
    file: Path, column: str, progress: Callable[[int, int], None] = lambda done, total: None
) -> VectorVariance:
    """Read the file once, in batches; sums are float64. progress(rows done, rows in all)

    Raises StoreError for a file or column that holds no vectors of one length, or no row with a direction; ReadError.
    """
    if not file.is_file():
        what = "is a directory: give one Parquet file" if file.is_dir() else "no such file"
        raise StoreError(f"{file}: {what}")
    variance = DirectionVariance()
    rows = zero = nonfinite = width = 0
    for batch in read_vectors(file, column, others=False):
        vectors = batch.vectors.astype(np.float64)
        if width and vectors.shape[1] != width:
            raise StoreError(f"{file}: '{column}' is not of one length in every row")
        width = vectors.shape[1]
        finite = np.isfinite(vectors).all(1)
        largest = np.abs(vectors[finite]).max(1, keepdims=True)
        some = largest[:, 0] > 0
        # The square of a large or small number may not be finite: a direction is the same at any length.
        variance.add(torch.from_numpy(vectors[finite][some] / largest[some]))
        rows += len(vectors)
        zero += int((~some).sum())
        nonfinite += int((~finite).sum())
        progress(rows, batch.total)
    if not variance.rows:
        raise StoreError(
            f"{file}: holds no row with a direction: {zero:,} are zero, {nonfinite:,} not finite"
        )
    return VectorVariance(str(file), column, width, variance.value, variance.rows, rows, zero, nonfinite)
