"""The measures of all sides over the same rows, and their differences, with paired intervals over sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from nla_engine.comparison.matching import Matched
from nla_engine.referee.evidence import Evidence
from nla_engine.referee.intervals import Bootstrap, Estimate
from nla_engine.referee.quantities import MEASURES, Measure, Quantity, controlled
from nla_engine.roundtrip.results import ranked_among

#: Relative difference of two Var that is rounding.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Line:
    """One measure of every side, on the rows where all have it. controls: None where the measure needs none.

    over: of each pair of sides (a, b), b minus a. row_values: float64 [sides, n], of single rows, NaN without
    """

    measure: Measure
    values: Sequence[Estimate]
    controls: Sequence[Estimate | None]
    over: Mapping[tuple[int, int], Estimate]
    row_values: np.ndarray


@dataclass(frozen=True)
class Compared:
    """rows: the columns of the shared rows, [n] each; texts: of each side and row; lines: the measures.

    left_out: rows of each side that another lacks; absent: measure -> why it is not compared
    """

    sides: Sequence[Evidence]
    rows: Mapping[str, np.ndarray]
    texts: Sequence[Sequence[Sequence[str]]]
    lines: Sequence[Line]
    absent: Mapping[str, str]
    left_out: Sequence[int]
    notes: Sequence[str]

    @property
    def names(self) -> list[str]:
        return [side.name for side in self.sides]

    @property
    def size(self) -> int:
        return len(self.rows["sequence"])

    @property
    def sequences(self) -> int:
        return len(np.unique(self.rows["sequence"]))

    def line(self, key: str) -> Line | None:
        """The line of a measure, if there is one."""
        return next((line for line in self.lines if line.measure.key == key), None)


def compute(sides: Sequence[Evidence], matched: Matched, seed: int) -> Compared:
    """All measures that every side has with its control."""
    rows = {name: values[matched.rows[0]] for name, values in sides[0].rows.items()}
    sequence, draw = rows["sequence"], Bootstrap(seed)
    found: list[dict[str, Quantity]] = [
        {measure.key: quantity.at(at) for measure, quantity in controlled(side.quantities)}
        for side, at in zip(sides, matched.rows, strict=True)
    ]
    absent = _unlike(sides)
    lines = []
    for key, measure in MEASURES.items():
        have = [key in quantities for quantities in found]
        if not any(have):
            continue
        if not all(have):
            lacking = [side.name for side, there in zip(sides, have, strict=True) if not there]
            absent.setdefault(key, f"not in {', '.join(lacking)}, or without its control there")
        if key in absent:
            continue
        line = _line(measure, [quantities[key] for quantities in found], sequence, draw)
        if line is None:
            absent[key] = "no row has it on every side"
        else:
            lines.append(line)
    texts = [
        [side.texts[place] for place in at.tolist()] for side, at in zip(sides, matched.rows, strict=True)
    ]
    notes = []
    if matched.other_stores:
        notes.append("The tables are of several stores, whose rows have the same tokens and norms.")
    if len(np.unique(sequence)) < 5:
        notes.append("Fewer than 5 sequences: no intervals.")
    return Compared(sides, rows, texts, lines, absent, matched.left_out, notes)


def _line(
    measure: Measure, quantities: Sequence[Quantity], sequence: np.ndarray, draw: Bootstrap
) -> Line | None:
    """On the rows where every side has the measure."""
    keep = np.isfinite([part for q in quantities for part in (q.top, q.bottom)]).all(0)
    if not keep.any():
        return None
    kept = [quantity.at(np.flatnonzero(keep)) for quantity in quantities]
    clusters = sequence[keep]
    values = [_value(measure, quantity, clusters, draw) for quantity in kept]
    controls = [
        None if q.control is None or not measure.control else draw.ratio(*q.control, clusters) for q in kept
    ]
    over = {
        (a, b): draw.ratio(kept[b].top, kept[b].bottom, clusters, minus=(kept[a].top, kept[a].bottom))
        for a, b in combinations(range(len(kept)), 2)
    }
    row_values = np.array([np.where(keep, quantity.values, np.nan) for quantity in quantities])
    return Line(measure, values, controls, over, row_values)


def _value(measure: Measure, quantity: Quantity, clusters: np.ndarray, draw: Bootstrap) -> Estimate:
    """A share of which all are alike gets Wilson's interval: resampling would show no spread."""
    if measure.share:
        return draw.mean(quantity.values, clusters, binary=True)
    return draw.ratio(quantity.top, quantity.bottom, clusters)


def _unlike(sides: Sequence[Evidence]) -> dict[str, str]:
    """Measures that cannot be compared, and why: sides of several layers, other Var, ranks among other numbers."""
    out: dict[str, str] = {}
    layers = {side.site for side in sides}
    scores = [side.given.get("scores") or side.given.get("controls") or {} for side in sides]
    if len(layers) > 1:
        out["cos"] = "cos of different layers cannot be compared; FVE can"
    known = [float(each["variance"]) for each in scores if "variance" in each]
    if len(layers) == 1 and known and max(known) - min(known) > _ROUNDING * max(known):
        told = ", ".join(f"{value:.6g}" for value in known)
        for key in ("fve", "fve_over_text"):
            out[key] = f"scaled by different Var ({told}): score again with the same --variance"
    ranks = {ranked_among(each) for each in scores if "variance" in each}
    if len(ranks) > 1:
        told = ", ".join(f"{count:,}" for count in sorted(ranks))
        for key in ("retrieval_top1", "reciprocal_rank"):
            out[key] = f"ranked among different numbers of vectors ({told}): score again on the same rows"
    patches = [patch for side in sides if (patch := side.patch) is not None]
    for what, differ in (
        ("the weights of the captured model", {str(each.get("weights")) for each in patches}),
        ("--norm", {str(each["run"].get("norm")) for each in patches}),
        ("--horizon", {str(each["run"].get("horizon")) for each in patches}),
    ):
        if len(differ) > 1:
            keys = [key for key in MEASURES if key.startswith("later_")]
            if what != "--horizon":
                keys += ["kl", "loss_recovered", "loss_over_text", "top1_same", "logprob_change"]
            for key in keys:
                out.setdefault(key, f"patched with another value of {what}: patch again alike")
    return out


def to_dict(compared: Compared) -> dict[str, Any]:
    """For JSON. Differences are those of the later side minus the earlier one."""
    names = compared.names
    return {
        "sides": [
            {"name": side.name, **about(side), "rows_left_out": left}
            for side, left in zip(compared.sides, compared.left_out, strict=True)
        ],
        "rows": compared.size,
        "sequences": compared.sequences,
        "measures": {
            line.measure.key: {
                "rows": line.values[0].rows,
                "values": dict(zip(names, (value.numbers() for value in line.values), strict=True)),
                "controls": {
                    name: control.numbers()
                    for name, control in zip(names, line.controls, strict=True)
                    if control is not None
                },
                "differences": [
                    {"of": names[b], "minus": names[a], "value": estimate.numbers()}
                    for (a, b), estimate in line.over.items()
                ],
            }
            for line in compared.lines
        },
        "left_out": dict(compared.absent),
        "notes": list(compared.notes),
    }


def about(side: Evidence) -> dict[str, Any]:
    """Where a side comes from: tables, models, layer, and what may differ between runs of one pair."""
    made = side.given.get("scores") or side.metadata
    run = made.get("run", {})
    return {
        "tables": [str(path) for path in side.paths],
        "layer": side.site.key,
        "store_id": side.store,
        "av": made.get("av"),
        "ar": made.get("ar"),
        **{name: run.get(name) for name in ("dtype", "precision", "temperature", "samples", "seed")},
    }
