"""The measures of explanations that tables hold, each beside its control, as sums over rows.

A quantity is `sum top / sum bottom` over rows. For a mean `bottom` is 1 where the row was measured. A share of a loss
or of claims has a sum below of its own, so that rows with little to lose or to claim weigh little.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nla_engine.referee.claims import NAME, NEXT, NUMBER, QUOTE, READ
from nla_engine.roundtrip.results import ranked_among
from nla_engine.roundtrip.score import fve_nrm, mse_nrm
from nla_engine.roundtrip.texts import GIVEN

#: In a column `control`: the lines of the explanations themselves.
EXPLAINED = "explained"
#: Stands beside the controls, and needs no text.
MEAN_VECTOR = "mean vector"
#: A control counts for the best one if at least this share of the rows has it.
LEAST_SHARE = 0.5
#: column(name): float64 [lines] with NaN for null, or texts
Column = Callable[[str], np.ndarray]


@dataclass(frozen=True)
class Measure:
    """better: 1 if more is better, -1 if less is, 0 if neither. control: what it is; "" where none is needed."""

    key: str
    label: str
    says: str
    better: int
    control: str = ""
    share: bool = False


#: Kinds of claims in words.
KIND_WORDS = {
    QUOTE: "quoted strings",
    NUMBER: "numbers",
    NAME: "names",
    READ: "the token read",
    NEXT: "the next token",
}
_CONTEXT = "in another row's context"
_SHUFFLED, _OTHER = "against another row's vector", "with another row's reconstruction"
_ALL = (
    Measure("fve", "FVE", "part of the vectors' variance that came back through the words", 1, _SHUFFLED),
    Measure("cos", "cos", "between vector and reconstruction", 1, _SHUFFLED),
    Measure("retrieval_top1", "top-1", "own vector is the nearest to the reconstruction", 1, "chance", True),
    Measure("reciprocal_rank", "1 / rank", "mean of 1 / rank of the own vector", 1, "chance"),
    Measure(
        "fve_over_text",
        "FVE over text",
        "FVE minus that of the best text-only control",
        1,
        "the best control",
    ),
    Measure("kl", "KL", "nats by which the next-token distribution moves", -1, _OTHER),
    Measure("loss_recovered", "loss recovered", "1 - KL / KL of the mean vector", 1, _OTHER),
    Measure(
        "loss_over_text",
        "loss over text",
        "loss recovered minus that of the best text-only control",
        1,
        "the best control",
    ),
    Measure("top1_same", "same next token", "the likeliest next token stays", 1, _OTHER, True),
    Measure("logprob_change", "log P change", "of the true next token, in nats", 1, _OTHER),
    Measure("later_kl", "later KL", "the same at later positions", -1, _OTHER),
    Measure("later_loss_recovered", "later loss recovered", "the same at later positions", 1, _OTHER),
    Measure("later_top1_same", "later same token", "the same at later positions", 1, _OTHER),
    Measure("claims_true", "claims true", "claims that hold by rule (precision)", 1, _CONTEXT),
    *(
        Measure(f"claims_true_{kind}", f"claims true: {kind}", f"the same of {words}", 1, _CONTEXT)
        for kind, words in KIND_WORDS.items()
    ),
    Measure("facts_named", "facts named", "facts that the text names (recall)", 1, "by another row's text"),
    Measure(
        "samples_agree",
        "samples agree",
        "other samples that make the same claim",
        1,
        "another row's samples",
    ),
    Measure("judged_true", "judged true", "clauses that the judge calls true", 1, _CONTEXT),
    Measure("closed", "closed", "explanations that were written to their end", 1, "", True),
    Measure("n_tokens", "tokens", "length of an explanation", 0),
)
MEASURES: Mapping[str, Measure] = {measure.key: measure for measure in _ALL}


@dataclass(frozen=True)
class Quantity:
    """float64 [R] each, NaN for rows without. control: (top, bottom); None for what needs none, or has none.

    of: what the control is, where that depends on the run
    """

    top: np.ndarray
    bottom: np.ndarray
    control: tuple[np.ndarray, np.ndarray] | None = None
    of: str = ""

    def at(self, rows: np.ndarray) -> Quantity:
        """Of these rows, int64 [n]."""
        control = None if self.control is None else (self.control[0][rows], self.control[1][rows])
        return Quantity(self.top[rows], self.bottom[rows], control, self.of)

    @property
    def values(self) -> np.ndarray:
        """float64 [R]: of single rows."""
        return self.top / np.where(self.bottom == 0, np.nan, self.bottom)


def controlled(quantities: Mapping[str, Quantity]) -> Iterator[tuple[Measure, Quantity]]:
    """The measures that may be shown: those that need no control, and those that have one on some row."""
    for key, measure in MEASURES.items():
        quantity = quantities.get(key)
        if quantity is None or not np.isfinite(quantity.top).any():
            continue
        if measure.control and (quantity.control is None or not np.isfinite(quantity.control[0]).any()):
            continue
        yield measure, quantity


def of_scores(column: Column, metadata: Mapping[str, Any], row: np.ndarray, size: int) -> dict[str, Quantity]:
    """FVE, cos and rank, if an AR has read the texts. row: int64 [lines], of `size` rows."""
    if "variance" not in metadata:
        return {}
    cos, shuffled, rank = (column(name) for name in ("cos", "cos_shuffled", "retrieval_rank"))
    variance, among = float(metadata["variance"]), ranked_among(metadata)
    ranked = np.where(np.isfinite(rank), 1.0, np.nan)
    chance = float(np.mean(1.0 / np.arange(1, among + 1))) if among else np.nan
    pairs = {
        "fve": (_fve(cos, variance), _fve(shuffled, variance)),
        "cos": (cos, shuffled),
        "retrieval_top1": ((rank == 1) * ranked, ranked / max(among, 1)),
        "reciprocal_rank": (1.0 / rank, ranked * chance),
    }
    return {key: _mean(own, control, row, size) for key, (own, control) in pairs.items()}


def of_texts(column: Column, row: np.ndarray, size: int) -> dict[str, Quantity]:
    """How the texts ended, unless no AV of a run wrote them, and how long they are."""
    status, tokens = column("status"), column("n_tokens").astype(np.float64)
    out = {"n_tokens": _mean(np.where(tokens > 0, tokens, np.nan), None, row, size)}
    if not np.any(status == GIVEN):
        out["closed"] = _mean((status == "ok").astype(np.float64), None, row, size)
    return out


def of_patches(column: Column, names: set[str], row: np.ndarray, size: int) -> dict[str, Quantity]:
    """What patch measured, at the position itself and at later ones."""
    out: dict[str, Quantity] = {}
    for prefix in ("", "later_"):
        if f"{prefix}kl" not in names:
            continue
        for key in (f"{prefix}{name}" for name in ("kl", "top1_same", "logprob_change")):
            if key in MEASURES:
                out[key] = _mean(column(key), column(f"{key}_shuffled"), row, size)
        kl, mean, other = (column(prefix + name) for name in ("kl", "kl_mean", "kl_shuffled"))
        below = _sums(mean + 0 * kl, row, size)
        out[f"{prefix}loss_recovered"] = Quantity(
            _sums(mean - kl, row, size), below, (_sums(mean - other, row, size), below)
        )
    return out


def of_controls(
    column: Column, metadata: Mapping[str, Any], row: np.ndarray, size: int
) -> dict[str, Quantity]:
    """FVE over the text-only control that leaves the least of it, on the rows that have both.

    The mean vector, whose FVE is 0, is one of them: a control that is read badly does not make the explanations good.
    """
    control, fve = column("control"), _fve(column("cos"), float(metadata["variance"]))
    means = {
        name: _means(fve[control == name], row[control == name], size)
        for name in dict.fromkeys(control.tolist())
    }
    own = means.pop(EXPLAINED, np.full(size, np.nan))
    if not means:
        return {}
    means[MEAN_VECTOR] = np.zeros(size)
    over = {name: own - other for name, other in means.items() if _counts(own - other, own)}
    if not over:
        return {}
    best = min(over, key=lambda name: float(np.nanmean(over[name])))
    one = np.where(np.isfinite(over[best]), 1.0, np.nan)
    return {"fve_over_text": Quantity(over[best], one, (means[best] * one, one), best)}


def losses_over(
    control: np.ndarray,
    kl: np.ndarray,
    mean: np.ndarray,
    row: np.ndarray,
    size: int,
    least: float = LEAST_SHARE,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(KL of a control minus that of the explanations, KL of the mean vector), float64 [size] each, by the control.

    The mean vector is one of them: what the explanations recover over it is the loss recovered itself.
    control, kl, mean, row: of each line; several lines of a row count as their mean
    least: share of the explained rows that must have a control
    """

    def of(values: np.ndarray, name: str) -> np.ndarray:
        return _means(values[control == name], row[control == name], size)

    own, below = of(kl, EXPLAINED), of(mean, EXPLAINED)
    names = [name for name in dict.fromkeys(control.tolist()) if name != EXPLAINED]
    top = {name: of(kl, name) - own for name in names} | {MEAN_VECTOR: below - own}
    return {name: (values, below + 0 * values) for name, values in top.items() if _counts(values, own, least)}


def of_patched_controls(column: Column, row: np.ndarray, size: int) -> dict[str, Quantity]:
    """Loss recovered over the text-only control that leaves the least of it, on the rows that have both."""
    over = losses_over(column("control"), column("kl"), column("kl_mean"), row, size)
    if set(over) <= {MEAN_VECTOR}:
        return {}
    best = min(over, key=lambda name: overall(*over[name]))
    top, below = over[best]
    return {"loss_over_text": Quantity(top, below, (over[MEAN_VECTOR][0] - top, below), best)}


def overall(top: np.ndarray, bottom: np.ndarray) -> float:
    """Sum over sum; infinite where there is nothing to divide by, so that it is the least of nothing."""
    below = float(np.nansum(bottom))
    return float(np.nansum(top)) / below if below else np.inf


def _counts(values: np.ndarray, own: np.ndarray, least: float = LEAST_SHARE) -> bool:
    """Whether enough of the explained rows have a control, for it to be the best one."""
    known, both = np.isfinite(own).sum(), np.isfinite(values).sum()
    return bool(both > 0 and both >= least * known)


def of_claims(column: Column, names: set[str], row: np.ndarray, size: int) -> dict[str, Quantity]:
    """Claims that hold, facts that are named, and what a judge called true; a row weighs as its number of them."""
    side, kind, holds, other = (column(name) for name in ("side", "kind", "holds", "holds_control"))
    found = {
        "claims_true": (side == "claim", holds, other),
        **{f"claims_true_{each}": ((side == "claim") & (kind == each), holds, other) for each in KIND_WORDS},
        "facts_named": (side == "fact", holds, other),
    }
    if {"agree", "agree_control"} <= names:
        found["samples_agree"] = (side == "claim", column("agree"), column("agree_control"))
    if {"judged", "judged_control"} <= names:
        asked = kind == "clause"
        verdict, against = (
            np.where(column(name) == None, np.nan, column(name) == "yes").astype(np.float64)  # noqa: E711
            for name in ("judged", "judged_control")
        )
        found["judged_true"] = (asked, verdict, against)
    out = {}
    for key, (of, values, control) in found.items():
        of = of & np.isfinite(values)
        known = of & np.isfinite(control)
        if not of.any():
            continue
        one = np.ones(len(row))
        out[key] = Quantity(
            _sums(values[of], row[of], size),
            _sums(one[of], row[of], size),
            (_sums(control[known], row[known], size), _sums(one[known], row[known], size)),
        )
    return out


def _fve(cos: np.ndarray, variance: float) -> np.ndarray:
    return fve_nrm(mse_nrm(cos), variance)


def _mean(values: np.ndarray, control: np.ndarray | None, row: np.ndarray, size: int) -> Quantity:
    top = _means(values, row, size)
    other = None if control is None else _means(control, row, size)
    ones = (
        None
        if other is None or not np.isfinite(other).any()
        else (other, np.where(np.isfinite(other), 1.0, np.nan))
    )
    return Quantity(top, np.where(np.isfinite(top), 1.0, np.nan), ones)


def _means(values: np.ndarray, row: np.ndarray, size: int) -> np.ndarray:
    """float64 [size]: mean of the finite values of each row, NaN without one."""
    keep = np.isfinite(values)
    count = np.bincount(row[keep], minlength=size)
    return np.bincount(row[keep], values[keep], size) / np.where(count, count, np.nan)


def _sums(values: np.ndarray, row: np.ndarray, size: int) -> np.ndarray:
    """float64 [size]: sum of the finite values of each row, NaN without one."""
    keep = np.isfinite(values)
    count = np.bincount(row[keep], minlength=size)
    return np.where(count, np.bincount(row[keep], values[keep], size), np.nan)
