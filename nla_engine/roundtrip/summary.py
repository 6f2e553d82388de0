"""The summary of a run of stage 2: counts, and means over every scored explanation, read from the finished table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nla_engine.config import AskOptions, ExplainOptions, ScoreOptions, ScoringOptions
from nla_engine.roundtrip import score
from nla_engine.roundtrip.prefixes import fve_by_sentences
from nla_engine.roundtrip.results import batches, of_layer, ranked_among, read_metadata
from nla_engine.roundtrip.texts import GIVEN

#: Phases of a run. Explaining includes scoring, which runs beside it; finishing measures Var and ends the table.
LOADING, PREPARING, STARTING, EXPLAINING, SCORING, ASKING, FINISHING = (
    "loading",
    "preparing",
    "starting",
    "explaining",
    "scoring",
    "asking",
    "finishing",
)
#: Of a summary: left out if there is nothing to say.
_RARE = (
    "further_layers",
    "fve_by_sentences",
    "fve_by_sentences_shuffled",
    "workers",
    "workers_lost",
    "parts_again",
    "workers_waited",
)
_NO_SECONDS: Mapping[str, float] = {}


@dataclass(frozen=True)
class RoundtripSummary:
    """The result in numbers; the keys are those of `--json`. Scores are means over every scored explanation.

    fve_by_sentences: of a table of prefixes; its other means are those of whole texts. With it comes its control,
    against the vector of another row.
    further_layers: of the others that the AR gives from the same text: their means.
    With several samples per row, the `_best` keys take the best sample of each row by cos. seconds: all that this run
    took, loading included; rows_per_second: of the phases in which rows are explained or scored, and the table ended.
    workers: processes that had the models, if there were several; workers_lost: how many died; parts_again: parts of
    the rows that these had, which were done again; workers_waited: mean seconds that they stood still, by why
    (`workers.job.Waited`).
    """

    out: str
    layer: int | str
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
    status_ok: float | None
    n_tokens: float | None
    early_rows: int
    seconds: float
    seconds_by_phase: dict[str, float]
    rows_per_second: float
    further_layers: dict[str, dict[str, float | None]] = field(default_factory=dict)
    fve_by_sentences: dict[str, float] = field(default_factory=dict)
    fve_by_sentences_shuffled: dict[str, float] = field(default_factory=dict)
    workers: int = 0
    workers_lost: int = 0
    parts_again: int = 0
    workers_waited: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key not in _RARE or value}


@dataclass(frozen=True)
class ExplainSummary:
    """The result of an AV alone in numbers; the keys are those of `--json`."""

    out: str
    layer: int | str
    rows: int
    explanations: int
    status: dict[str, int]
    status_ok: float | None
    n_tokens: float | None
    early_rows: int
    seconds: float
    seconds_by_phase: dict[str, float]
    rows_per_second: float
    workers: int = 0
    workers_lost: int = 0
    parts_again: int = 0
    workers_waited: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key not in _RARE or value}


@dataclass(frozen=True)
class AskSummary:
    """The answers of an oracle in numbers; the keys are those of `--json`. rows: those that are in a prompt."""

    out: str
    layer: int | str
    rows: int
    questions: int
    prompts: int
    answers: int
    status: dict[str, int]
    status_ok: float
    n_tokens: float
    seconds: float
    seconds_by_phase: dict[str, float]
    answers_per_second: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def summarise_answers(options: AskOptions, seconds: Mapping[str, float], new_answers: int) -> AskSummary:
    """The summary of a finished table of answers, from its file.

    seconds: of each phase of this run; new_answers: answers that it added
    """
    rows: set[int] = set()
    questions: set[str] = set()
    status: Counter[str] = Counter()
    tokens = 0
    for part in batches(options.out, ["rows", "question", "status", "n_tokens"]):
        rows.update(np.concatenate(part["rows"]).tolist())
        questions.update(part["question"].tolist())
        status.update(part["status"].tolist())
        tokens += int(part["n_tokens"].sum())
    answers = status.total()
    return AskSummary(
        out=str(options.out),
        layer=read_metadata(options.out)["layer"],
        rows=len(rows),
        questions=len(questions),
        prompts=answers // options.samples,
        answers=answers,
        status=dict(status),
        status_ok=round(status["ok"] / answers, 6),
        n_tokens=round(tokens / answers, 6),
        seconds=round(sum(seconds.values()), 3),
        seconds_by_phase=dict(seconds),
        answers_per_second=round(new_answers / asking, 2) if (asking := seconds.get(ASKING, 0.0)) else 0.0,
    )


def summarise_texts(
    options: ExplainOptions, seconds: Mapping[str, float] = _NO_SECONDS, new_rows: float = 0.0
) -> ExplainSummary:
    """The summary of a finished result without scores, from its file.

    seconds: of each phase of this run; new_rows: rows that it added
    """
    return ExplainSummary(**_counts(options.out, _columns(options.out, []), seconds, new_rows))


def summarise(
    options: ScoringOptions, seconds: Mapping[str, float] = _NO_SECONDS, new_rows: float = 0.0
) -> RoundtripSummary:
    """The summary of a finished result, from its file. seconds: of each phase of this run; new_rows: its rows."""
    metadata = read_metadata(options.out)
    prefixes = isinstance(options, ScoreOptions) and options.prefixes
    more = ["of_text", "sentences", "whole"] if prefixes else []
    data = _columns(options.out, ["cos", "cos_shuffled", "retrieval_rank", "best", *more])
    curves: list[dict[str, float]] = [{}, {}]
    if prefixes:
        pairs = ({**data, "cos": data[name]} for name in ("cos", "cos_shuffled"))
        curves = [fve_by_sentences(columns, float(metadata["variance"])) for columns in pairs]
    whole = data["whole"].astype(bool) if prefixes else np.ones(len(data["row"]), bool)
    if prefixes:
        data = {name: column[whole] for name, column in data.items()}
        data["best"] = score.best_of(data["row"], data["cos"].astype(np.float64))
    cos, variance = data["cos"].astype(np.float64), float(metadata["variance"])
    best = data["best"].astype(bool)
    mse = score.mse_nrm(cos)
    rank = data["retrieval_rank"].astype(np.float64)
    scored = rank[np.isfinite(rank)]
    return RoundtripSummary(
        **_counts(options.out, data, seconds, new_rows),
        cos=_mean(cos),
        cos_std=round(float(np.nanstd(cos)), 6) if np.isfinite(cos).any() else None,
        mse_nrm=_mean(mse),
        fve_nrm=_mean(score.fve_nrm(mse, variance)),
        fve_meannorm=_mean(score.fve_meannorm(mse, variance)),
        cos_best=_mean(cos[best]),
        fve_nrm_best=_mean(score.fve_nrm(mse[best], variance)),
        variance=round(variance, 6),
        variance_rows=int(metadata["variance_rows"]),
        cos_shuffled=_mean(data["cos_shuffled"]),
        retrieval_top1=_mean(scored == 1),
        retrieval_median=float(np.median(scored)) if len(scored) else None,
        retrieval_sample=int(metadata["control_rows"]),
        retrieval_vectors=ranked_among(metadata),
        further_layers={
            layer: _of_layer(options.out, int(layer), float(about["variance"]), whole)
            for layer, about in metadata.get("further_layers", {}).items()
        },
        fve_by_sentences=curves[0],
        fve_by_sentences_shuffled=curves[1],
    )


def _of_layer(out: Path, layer: int, variance: float, whole: np.ndarray) -> dict[str, float | None]:
    """The means of a further layer, over the lines of whole texts, bool [n]."""
    names = ("cos", "fve_nrm", "cos_shuffled", "retrieval_rank")
    columns = [of_layer(name, layer) for name in names]
    parts = list(batches(out, columns))
    cos, fve, shuffled, rank = (
        np.concatenate([part[name].astype(np.float64) for part in parts])[whole] for name in columns
    )
    return {
        "cos": _mean(cos),
        "fve_nrm": _mean(fve),
        "cos_shuffled": _mean(shuffled),
        "retrieval_top1": _mean(rank[np.isfinite(rank)] == 1),
        "variance": round(variance, 6),
    }


def _columns(out: Path, scores: list[str]) -> dict[str, np.ndarray]:
    """Columns of the whole table: those that every table has and that are counted, and some scores."""
    names = ["row", "status", "n_tokens", "early", *scores]
    parts = list(batches(out, names))
    return {name: np.concatenate([part[name] for part in parts]) for name in names}


def _counts(
    out: Path, data: dict[str, np.ndarray], seconds: Mapping[str, float], new_rows: float
) -> dict[str, Any]:
    """What is known without an AR. status_ok: None for texts that no AV of a run wrote."""
    status = Counter(map(str, data["status"]))
    working = sum(seconds.get(phase, 0.0) for phase in (EXPLAINING, SCORING, FINISHING))
    rows, first = np.unique(data["row"], return_index=True)
    return {
        "out": str(out),
        "layer": read_metadata(out)["layer"],
        "rows": len(rows),
        "explanations": status.total(),
        "status": dict(status),
        "status_ok": None if status[GIVEN] else round(status["ok"] / status.total(), 6),
        "n_tokens": _mean(data["n_tokens"]),
        "early_rows": int(data["early"][first].sum()),
        "seconds": round(sum(seconds.values()), 3),
        "seconds_by_phase": dict(seconds),
        "rows_per_second": round(new_rows / working, 2) if working else 0.0,
    }


def _mean(values: np.ndarray) -> float | None:
    values = values.astype(np.float64)
    values = values[np.isfinite(values)]
    return round(float(values.mean()), 6) if len(values) else None
