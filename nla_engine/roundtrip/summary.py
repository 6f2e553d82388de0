"""The summary of a round trip: means over every scored explanation, read from the finished table."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nla_engine.config import RoundtripOptions
from nla_engine.roundtrip import score
from nla_engine.roundtrip.results import batches, ranked_among, read_metadata


@dataclass(frozen=True)
class RoundtripSummary:
    """The result in numbers; the keys are those of `--json`. Scores are means over every scored explanation.

    With several samples per row, the `_best` keys take the best sample of each row by cos.
    """

    out: str
    layer: int
    rows: int
    explanations: int
    cos: float | None
    cos_std: float | None
    mse_nrm: float | None
    fve_nrm: float | None
    fve_meannorm: float | None
    cos_best: float | None
    fve_nrm_best: float | None
    variance: float
    variance_rows: int
    cos_shuffled: float | None
    retrieval_top1: float | None
    retrieval_median: float | None
    retrieval_sample: int
    retrieval_vectors: int
    status: dict[str, int]
    status_ok: float
    n_tokens: float
    early_rows: int
    seconds: float
    rows_per_second: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def summarise(options: RoundtripOptions, seconds: float = 0.0, new_rows: float = 0.0) -> RoundtripSummary:
    """The summary of a finished result, from its file. seconds, new_rows: time and rows of this run."""
    metadata = read_metadata(options.out)
    names = ["cos", "cos_shuffled", "retrieval_rank", "status", "n_tokens", "best", "early"]
    parts = list(batches(options.out, names))
    data = {name: np.concatenate([part[name] for part in parts]) for name in names}
    cos, variance = data["cos"].astype(np.float64), float(metadata["variance"])
    best, status = data["best"].astype(bool), Counter(map(str, data["status"]))
    mse = score.mse_nrm(cos)

    def mean(values: np.ndarray) -> float | None:
        values = values.astype(np.float64)
        values = values[np.isfinite(values)]
        return round(float(values.mean()), 6) if len(values) else None

    rank = data["retrieval_rank"].astype(np.float64)
    scored = rank[np.isfinite(rank)]
    return RoundtripSummary(
        out=str(options.out),
        layer=int(metadata["layer"]),
        rows=int(best.sum()),
        explanations=len(cos),
        cos=mean(cos),
        cos_std=round(float(np.nanstd(cos)), 6) if np.isfinite(cos).any() else None,
        mse_nrm=mean(mse),
        fve_nrm=mean(score.fve_nrm(mse, variance)),
        fve_meannorm=mean(score.fve_meannorm(mse, variance)),
        cos_best=mean(cos[best]),
        fve_nrm_best=mean(score.fve_nrm(mse[best], variance)),
        variance=round(variance, 6),
        variance_rows=int(metadata["variance_rows"]),
        cos_shuffled=mean(data["cos_shuffled"]),
        retrieval_top1=mean(scored == 1),
        retrieval_median=float(np.median(scored)) if len(scored) else None,
        retrieval_sample=int(metadata["control_rows"]),
        retrieval_vectors=ranked_among(metadata),
        status=dict(status),
        status_ok=round(status["ok"] / len(cos), 6),
        n_tokens=mean(data["n_tokens"]) or 0.0,
        early_rows=int(data["early"][best].sum()),
        seconds=round(seconds, 3),
        rows_per_second=round(new_rows / seconds, 2) if seconds else 0.0,
    )
