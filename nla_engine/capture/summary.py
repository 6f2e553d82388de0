"""What a capture reports at its end."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class CaptureSummary:
    """What a store holds after a run; its keys are those of `--json`.

    tokens_generated, stepped_back, seconds and the rates count this run alone. stepped_back: how often a sequence lost
    its keys and values to others, and was read again up to its last token. seconds: all that this run took, from
    loading to the last write; seconds_by_phase: its parts. The rates are those of the last phase, generating or
    reading. workers: processes that ran the model; workers_lost: how many died, and sequences_again: how many sequences
    these had, which were done again.
    """

    store: str
    layers: list[int | str]
    codec: str
    codec_error: dict[str, float]
    sequences: int
    rows: int
    skipped: int
    sink_rows: int
    nonfinite_rows: int
    tokens_generated: int
    stepped_back: int
    seconds: float
    seconds_by_phase: dict[str, float]
    rows_per_second: float
    tokens_per_second: float
    workers: int = 1
    workers_lost: int = 0
    sequences_again: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
