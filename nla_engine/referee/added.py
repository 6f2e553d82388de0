"""What explanations add to the text: their FVE over that of the best control, from the table of controls.

Values of a row's several explanations are averaged first. Over a control, on the rows that have both:

    over = mean of (FVE of the explanations - FVE of the control)

and over the best control: the least of these, and of the FVE itself. The latter is that over the mean vector, which has
FVE 0 without any text, so that bad controls add nothing. Intervals draw whole sequences; the best is chosen anew in
every draw.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nla_engine.errors import RequestError
from nla_engine.referee.intervals import FEWEST_CLUSTERS, Bootstrap, Estimate
from nla_engine.referee.quantities import EXPLAINED, LEAST_SHARE
from nla_engine.roundtrip.results import batches, read_metadata

#: In the metadata of a table, under made_by.
CONTROLS = "controls"
#: Stands for the mean vector where no control does better. It needs no text.
MEAN = "mean"


@dataclass(frozen=True)
class Scored:
    """Means of one kind of text. over: the explanations over it; None for the explanations themselves."""

    rows: int
    fve_nrm: float
    cos: float
    cos_shuffled: float
    retrieval_top1: float
    n_tokens: float
    over: Estimate | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        names = ("fve_nrm", "cos", "cos_shuffled", "retrieval_top1", "n_tokens")
        found = {name: _rounded(getattr(self, name)) for name in names}
        return {"rows": self.rows, **found} | ({} if self.over is None else {"over": self.over.numbers()})


@dataclass(frozen=True)
class Added:
    """explained: the explanations; controls: by name; best: the control that leaves the least, or MEAN; None without
    scores.

    over_text: the explanations over the best control
    """

    explained: Scored
    controls: dict[str, Scored]
    best: str | None
    over_text: Estimate

    @classmethod
    def read(cls, path: Path) -> Added:
        """From a table of controls. RequestError if it is another one."""
        metadata = read_metadata(path)
        if metadata.get("made_by") != CONTROLS:
            raise RequestError(f"{path}: is not the table of controls: give the one that `controls` wrote")
        names = ["row", "sequence", "control", "fve_nrm", "cos", "cos_shuffled", "retrieval_rank", "n_tokens"]
        parts = list(batches(path, names))
        data = {name: np.concatenate([part[name] for part in parts]) for name in names}
        return cls.of(data, int(metadata["run"]["seed"]))

    @classmethod
    def of(cls, data: dict[str, np.ndarray], seed: int) -> Added:
        """From the columns of the table, [n] each."""
        rows, first, index = np.unique(data["row"], return_index=True, return_inverse=True)
        sequence, control = data["sequence"][first], data["control"].astype(str)
        boot = Bootstrap(seed)
        names = [name for name in dict.fromkeys(control.tolist()) if name != EXPLAINED]
        fve = {
            name: _by_row(data["fve_nrm"], index, control == name, len(rows)) for name in (EXPLAINED, *names)
        }
        over = {name: fve[EXPLAINED] - fve[name] for name in names}
        scored = {
            name: _scored(
                data, control == name, fve[name], boot.mean(over[name], sequence) if name in over else None
            )
            for name in (EXPLAINED, *names)
        }
        known = np.isfinite(fve[EXPLAINED]).sum()
        fit = [name for name in names if known and np.isfinite(over[name]).sum() >= LEAST_SHARE * known]
        compared = {name: over[name] for name in fit} | {MEAN: fve[EXPLAINED]}
        means = {name: float(np.nanmean(values)) for name, values in compared.items()} if known else {}
        best = min(means, key=lambda name: means[name]) if means and fit else None
        values = np.stack(list(compared.values())) if best else np.full((1, len(rows)), np.nan)
        return cls(
            scored[EXPLAINED], {name: scored[name] for name in names}, best, boot.least(values, sequence)
        )

    def says(self) -> list[str]:
        """What these numbers show, and what they cannot."""
        if self.best is None:
            return ["No control has texts for half of the rows: what the explanations add is not known."]
        over, name = self.over_text, self.best
        if name == MEAN:
            control, name = 0.0, "the mean vector, since no control text does better"
        else:
            control = self.controls[name].fve_nrm
        figures = f"FVE {self.explained.fve_nrm:.3f}, best control {self.best} {control:.3f}"
        if not over.bounded:
            head = (
                f"What the explanations add cannot be told ({figures}): fewer than {FEWEST_CLUSTERS} sequences give no "
                "interval."
            )
        elif over.above(0):
            head = (
                f"The explanations carry more than any control does: {over.value:.3f} of FVE over {name} "
                f"(95% interval {over.low:.3f} to {over.high:.3f}; {figures})."
            )
        elif over.below(0):
            head = (
                f"The explanations carry less than {name}, without the row's vector: {over.value:.3f} of "
                f"FVE (95% interval {over.low:.3f} to {over.high:.3f}; {figures})."
            )
        else:
            head = (
                f"That the explanations carry more than {name}, without the row's vector, was not shown: "
                f"{over.value:.3f} of FVE (95% interval {over.low:.3f} to {over.high:.3f}; {figures})."
            )
        out = [head]
        if self.best == MEAN:
            out.append(
                "No control text does better than no text at all: either the text says nothing of these vectors, or "
                "this AR cannot read the controls. Which of the two is not known; a better --reader can tell more."
            )
        if left := [n for n, c in self.controls.items() if c.rows < LEAST_SHARE * self.explained.rows]:
            out.append(
                f"Fewer than half of the rows have {', '.join(left)}: not counted for the best control."
            )
        return [
            *out,
            "This is about these controls, read by this AR. An AR trained on other words reads copied tokens badly, so "
            "a weak control may show its style and not its content. A better reader could say more.",
            "It does not show that the words are true, or that a person could read the vector from them: meaningless "
            "words that AV and AR agree on add as much.",
        ]


def _by_row(values: np.ndarray, index: np.ndarray, mine: np.ndarray, rows: int) -> np.ndarray:
    """float64 [rows]: the mean of each row's values of one kind; NaN without any."""
    values = values.astype(np.float64)
    mine = mine & np.isfinite(values)
    count = np.bincount(index[mine], minlength=rows)
    total = np.bincount(index[mine], values[mine], rows)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _scored(data: dict[str, np.ndarray], mine: np.ndarray, fve: np.ndarray, over: Estimate | None) -> Scored:
    rank = data["retrieval_rank"][mine].astype(np.float64)
    return Scored(
        int(np.isfinite(fve).sum()),
        _mean(fve),
        _mean(data["cos"][mine]),
        _mean(data["cos_shuffled"][mine]),
        _mean((rank[np.isfinite(rank)] == 1).astype(np.float64)),
        _mean(data["n_tokens"][mine]),
        over,
    )


def _mean(values: np.ndarray) -> float:
    values = values.astype(np.float64)
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else float("nan")


def _rounded(value: float) -> float | None:
    return round(value, 6) if np.isfinite(value) else None
