"""The table of clauses: what its columns are called, and its summary in numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nla_engine.referee.clauses import CHANGES, CONTROL, NEGATED, WHOLE
from nla_engine.referee.intervals import Bootstrap, with_estimates
from nla_engine.roundtrip.results import SCHEMA, read_metadata

_OWN = SCHEMA.names[: SCHEMA.names.index("best")]
SCORED = ("cos", "cos_lost", "mse_nrm", "fve_nrm", "fve_lost")
KL = ("kl", "kl_added")
#: Measures of the summary, each for every change and its control.
LOST = ("fve_lost", "cos_lost", "kl_added")


def schema_of(with_kl: bool) -> pa.Schema:
    """The columns of the table, without those of the prompt records."""
    fields = [SCHEMA.field(name) for name in _OWN]
    fields += [
        pa.field("variant", pa.string()),
        pa.field("unit", pa.int32()),
        pa.field("units", pa.int32()),
        pa.field("clause", pa.string()),
        pa.field("rule", pa.string()),
        pa.field("partner", pa.int64()),
        pa.field("text", pa.string()),
    ]
    return pa.schema([*fields, *(pa.field(name, pa.float64()) for name in SCORED + (KL if with_kl else ()))])


@dataclass(frozen=True)
class ClausesSummary:
    """The result in numbers; the keys are those of `--json`. Estimates are [value, low, high], by sequences.

    negated: share of clauses to which a rule applies; estimates: by name, as docs/claims.md lists them
    """

    out: str
    layer: int
    rows: int
    explanations: int
    clauses: int
    clauses_per_text: float | None
    negated: float | None
    variance: float
    variance_rows: int
    estimates: dict[str, list[float | None]]
    seconds: float
    seconds_by_phase: dict[str, float]
    texts_per_second: float

    def to_dict(self) -> dict[str, Any]:
        return with_estimates(asdict(self))


def summarise(out: Path, seconds: Mapping[str, float], new_texts: int, working: float) -> ClausesSummary:
    """The summary of a finished table, from its file. working: seconds in which the new texts were read."""
    made = read_metadata(out)
    measures = [name for name in LOST if name in pq.read_schema(out).names]
    whole = ["fve_nrm", "cos"] + (["kl"] if "kl_added" in measures else [])
    table = pq.read_table(
        out, columns=["row", "sequence", "sample", "variant", "unit", "units", *whole, *measures]
    )
    columns = {name: table[name].to_numpy() for name in ("row", "sequence", "sample", "variant", "units")}
    columns |= {name: table[name].to_numpy().astype(np.float64) for name in ("unit", *whole, *measures)}
    bootstrap = Bootstrap(int(made["run"]["seed"]))
    first = columns["variant"] == WHOLE
    clauses = int(columns["units"][first].sum())
    estimates = {
        name: bootstrap.mean(columns[name][first], columns["sequence"][first]).numbers() for name in whole
    }
    for change in CHANGES:
        own, control = columns["variant"] == change, columns["variant"] == change + CONTROL
        for name in ("row", "sample", "unit"):
            assert np.array_equal(columns[name][own], columns[name][control]), (
                f"{out}: a change without control"
            )
        cluster = columns["sequence"][own]
        for measure in measures:
            values, beside = columns[measure][own], columns[measure][control]
            kept = np.isfinite(values) & np.isfinite(beside)
            values, beside = (np.where(kept, each, np.nan) for each in (values, beside))
            name = f"{measure}_{change}"
            estimates[name] = bootstrap.mean(values, cluster).numbers()
            estimates[name + CONTROL] = bootstrap.mean(beside, cluster).numbers()
            estimates[name + "_margin"] = bootstrap.margin(values, beside, cluster).numbers()
    texts = int(first.sum())
    return ClausesSummary(
        out=str(out),
        layer=int(made["layer"]),
        rows=len(np.unique(columns["row"])),
        explanations=texts,
        clauses=clauses,
        clauses_per_text=round(clauses / texts, 4) if texts else None,
        negated=round(float((columns["variant"] == NEGATED).sum()) / clauses, 6) if clauses else None,
        variance=round(float(made["variance"]), 6),
        variance_rows=int(made["variance_rows"]),
        estimates=estimates,
        seconds=round(sum(seconds.values()), 3),
        seconds_by_phase=dict(seconds),
        texts_per_second=round(new_texts / working, 2) if working else 0.0,
    )
