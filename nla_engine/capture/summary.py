"""What a capture reports at its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from nla_engine.store import CaptureStore, RowFlag
from nla_engine.store.format import flagged


@dataclass(frozen=True)
class CaptureSummary:
    """What a store holds after a run; its keys are those of `--json`.

    tokens_generated, stepped_back, seconds and the rates count this run alone. stepped_back: how often a sequence lost
    its keys and values to others, and was read again up to its last token. seconds: all that this run took, from
    loading to the last write; seconds_by_phase: its parts. The rates are those of the last phase, generating or
    reading. workers: processes that ran the model; workers_lost: how many died, and sequences_again: how many sequences
    these had, which were done again; workers_waited: mean seconds that they stood still, by why (`workers.job.Waited`).
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
    workers_waited: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of_store(
        cls,
        store: CaptureStore,
        *,
        skipped: int,
        new_rows: int = 0,
        generated: int = 0,
        stepped_back: int = 0,
        filling: float = 0.0,
        by_phase: Mapping[str, float] | None = None,
        workers: int = 1,
        workers_lost: int = 0,
        sequences_again: int = 0,
        workers_waited: Mapping[str, float] | None = None,
    ) -> CaptureSummary:
        """What the store holds, and what this run did.

        new_rows: of this run; filling: seconds of its last phase; by_phase: of each
        """
        flags, spent = store.column("flags"), dict(by_phase or {})
        return cls(
            store=str(store.path),
            layers=[site.key for site in store.sites],
            codec=store.codec.name,
            codec_error={str(k): round(v["mean"], 6) for k, v in store.codec_error.items() if v},
            sequences=store.sequences,
            rows=store.rows,
            skipped=skipped,
            sink_rows=int(np.count_nonzero(flagged(flags, RowFlag.SINK))),
            nonfinite_rows=int(np.count_nonzero(flagged(flags, RowFlag.NONFINITE))),
            tokens_generated=generated,
            stepped_back=stepped_back,
            seconds=round(sum(spent.values()), 3),
            seconds_by_phase=spent,
            rows_per_second=round(new_rows / filling, 1) if filling else 0.0,
            tokens_per_second=round(generated / filling, 1) if filling else 0.0,
            workers=workers,
            workers_lost=workers_lost,
            sequences_again=sequences_again,
            workers_waited=dict(workers_waited or {}),
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
