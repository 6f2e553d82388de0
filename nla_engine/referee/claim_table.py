"""The table of claims: what its columns are called, and its summary in numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nla_engine.referee.claims import KINDS
from nla_engine.referee.clauses import CONTROL
from nla_engine.referee.intervals import Bootstrap, with_estimates
from nla_engine.referee.judge import NO, UNCLEAR, YES
from nla_engine.roundtrip.results import SCHEMA, read_metadata

CLAIM, FACT = "claim", "fact"
#: Kind of the lines that a judge has judged; all kinds that rules judge, together.
CLAUSE, ALL = "clause", "all"
_OWN = [name for name in SCHEMA.names[: SCHEMA.names.index("best")] if name != "norm"]
#: A measure of each line, and its control: float64 [n].
Pair = tuple[np.ndarray, np.ndarray]
JUDGED = ("prompt", "answer", "judged")


def schema_of(judged: bool) -> pa.Schema:
    """The columns of the table, without those of the prompt records."""
    fields = [
        *(SCHEMA.field(name) for name in _OWN),
        pa.field("side", pa.string()),
        pa.field("kind", pa.string()),
        pa.field("said", pa.string()),
        pa.field("start", pa.int32()),
        pa.field("end", pa.int32()),
        pa.field("holds", pa.bool_()),
        pa.field("partner", pa.int64()),
        pa.field("holds" + CONTROL, pa.bool_()),
        pa.field("agree", pa.float32()),
        pa.field("agree" + CONTROL, pa.float32()),
    ]
    if judged:
        fields += [pa.field(name + side, pa.string()) for side in ("", CONTROL) for name in JUDGED]
    return pa.schema(fields)


@dataclass(frozen=True)
class ClaimsSummary:
    """The result in numbers; the keys are those of `--json`. Estimates are [value, low, high], by sequences.

    claims, facts: counts by kind; estimates: by name, as docs/claims.md lists them
    """

    out: str
    rows: int
    explanations: int
    claims: dict[str, int]
    facts: dict[str, int]
    estimates: dict[str, list[float | None]]
    seconds: float
    seconds_by_phase: dict[str, float]
    texts_per_second: float

    def to_dict(self) -> dict[str, Any]:
        return with_estimates(asdict(self))


def summarise(out: Path, seconds: Mapping[str, float], new_texts: int, working: float) -> ClaimsSummary:
    """The summary of a finished table, from its file. working: seconds in which the new texts were checked."""
    made = read_metadata(out)
    bootstrap = Bootstrap(int(made["run"]["seed"]))
    judged = "judged" in pq.read_schema(out).names
    names = ["sequence", "side", "kind", "holds", "holds" + CONTROL, "agree", "agree" + CONTROL]
    table = pq.read_table(out, columns=names + (["judged", "judged" + CONTROL] if judged else []))
    sequence = table["sequence"].to_numpy()
    side, kind = (np.array(table[name].to_pylist(), object) for name in ("side", "kind"))

    def numbers(name: str) -> np.ndarray:
        return table[name].cast(pa.float64()).to_numpy().astype(np.float64)

    estimates: dict[str, list[float | None]] = {}

    def measure(name: str, pair: Pair, mask: np.ndarray, binary: bool) -> None:
        values, control = pair
        kept = mask & np.isfinite(values) & np.isfinite(control)
        own, other, cluster = values[kept], control[kept], sequence[kept]
        estimates[name] = bootstrap.mean(own, cluster, binary=binary).numbers()
        estimates[name + CONTROL] = bootstrap.mean(other, cluster, binary=binary).numbers()
        estimates[name + "_margin"] = bootstrap.margin(own, other, cluster, binary=binary).numbers()

    holds = numbers("holds"), numbers("holds" + CONTROL)
    agree = numbers("agree"), numbers("agree" + CONTROL)
    ruled = kind != CLAUSE
    for each in (ALL, *KINDS):
        mine = ruled if each == ALL else kind == each
        measure(f"precision_{each}", holds, mine & (side == CLAIM), True)
        measure(f"recall_{each}", holds, mine & (side == FACT), True)
        if np.isfinite(agree[0]).any():
            measure(f"agree_{each}", agree, mine & (side == CLAIM), False)
    if judged:
        own, other = (np.array(table["judged" + side].to_pylist(), object) for side in ("", CONTROL))
        asked = (own != None) & (other != None)  # noqa: E711
        for answer in (YES, NO, UNCLEAR):
            measure(f"judged_{answer}", ((own == answer) * 1.0, (other == answer) * 1.0), asked, True)
    return ClaimsSummary(
        out=str(out),
        rows=int(made["rows"]),
        explanations=int(made["explanations"]),
        claims=dict(Counter(kind[side == CLAIM].tolist())),
        facts=dict(Counter(kind[side == FACT].tolist())),
        estimates=estimates,
        seconds=round(sum(seconds.values()), 3),
        seconds_by_phase=dict(seconds),
        texts_per_second=round(new_texts / working, 2) if working else 0.0,
    )
