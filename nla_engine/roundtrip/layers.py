"""The layers that a run scores: its own, and the further ones that an AR gives from the same text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from nla_engine.config import ScoringOptions
from nla_engine.errors import RequestError
from nla_engine.roundtrip import score
from nla_engine.roundtrip.pair import Pair
from nla_engine.roundtrip.results import nullable, of_layer
from nla_engine.roundtrip.score import Controls
from nla_engine.roundtrip.variance import layer_variance
from nla_engine.sites import Site
from nla_engine.store import CaptureStore


def controls_of(
    store: CaptureStore,
    layer: Site,
    sample: np.ndarray,
    options: ScoringOptions,
    pair: Pair,
    announce: Callable[[str], None],
) -> dict[Site, Controls]:
    """Those of the layer, and of the further ones that the AR gives, as far as the store holds them.

    sample: int64 [m], the rows that they are made of
    """
    sequences, positions = (store.column(name)[sample] for name in ("sequence", "position"))
    further = [number for number in pair.ar.further if number in store.layers]
    if missing := sorted(set(pair.ar.further) - set(further)):
        announce(f"the AR also gives layer {', '.join(map(str, missing))}, which the store lacks: not scored")
    if further and options.variance is not None:
        raise RequestError(
            f"--variance is that of one layer, and the AR also gives layer {', '.join(map(str, further))}: leave it out"
        )
    return {
        site: Controls.of(sequences, positions, store.layer(site).torch(sample, pair.device), options.seed)
        for site in (layer, *map(Site, further))
    }


def measured_of(
    options: ScoringOptions, store: CaptureStore, layer: Site, controls: Controls, device: torch.device
) -> dict[str, Any]:
    """For the metadata: Var of a layer, the number of rows it was measured on (0 if it was given), and its controls."""
    variance, rows = options.variance, 0
    if variance is None:
        measured = layer_variance(store.layer(layer), options.seed, device)
        variance, rows = measured.value, measured.rows
    return {
        "variance": variance,
        "variance_rows": rows,
        "control_rows": len(controls),
        "control_vectors": len(controls.distinct),
    }


def explained_variance(
    part: pa.Table, layer: Site, variances: Mapping[Site, float]
) -> dict[str, list[float | None]]:
    """The columns that need Var. layer: the table's own; variances: of each layer."""
    columns = {}
    for number, variance in variances.items():
        ending = "" if number == layer else of_layer("", number)
        mse = part[f"mse_nrm{ending}"].to_numpy()  # NaN where there is no score
        columns[f"fve_nrm{ending}"] = nullable(score.fve_nrm(mse, variance))
        columns[f"fve_meannorm{ending}"] = nullable(score.fve_meannorm(mse, variance))
    return columns
