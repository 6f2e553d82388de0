"""What ends a table of stage 2: measures over all its rows, and the rate of the run that wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from nla_engine.config import ScoringOptions, StageTwoOptions
from nla_engine.progress import Phases
from nla_engine.roundtrip.layers import explained_variance, measured_of
from nla_engine.roundtrip.results import ResultTable
from nla_engine.roundtrip.score import Controls
from nla_engine.roundtrip.summary import EXPLAINING, SCORING
from nla_engine.sites import Site
from nla_engine.store import CaptureStore


def finish_table(
    table: ResultTable,
    metadata: dict[str, Any],
    options: StageTwoOptions,
    store: CaptureStore,
    layer: Site,
    controls: Mapping[Site, Controls],
    device: torch.device,
) -> None:
    """Measure what is measured over all rows, and join the table. controls: by layer; empty if nothing is scored."""
    if not controls or not isinstance(options, ScoringOptions):
        table.finish(metadata, store=store)
        return
    measured = {
        number: measured_of(options, store, number, control, device) for number, control in controls.items()
    }
    variances = {number: float(about["variance"]) for number, about in measured.items()}
    metadata = metadata | measured.pop(layer)
    if measured:
        metadata["further_layers"] = {str(number): about for number, about in measured.items()}
    table.finish(metadata, lambda part: explained_variance(part, layer, variances), store)


def speed_of(phases: Phases, rows: int, device: torch.device) -> dict[str, Any]:
    """Rows per second of a run, which added so many, and on what."""
    seconds = sum(phases.seconds().get(phase, 0.0) for phase in (EXPLAINING, SCORING))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"speed": {"rows_per_second": round(rows / seconds if seconds else 0.0, 2), "device": name}}
