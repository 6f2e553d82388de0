"""Explanations: what an AV said of some vectors, and what an AR made of it again."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from nla_engine.interactive.vectors import Scores
from nla_engine.roundtrip.score import fve_nrm, mse_nrm
from nla_engine.store.shown import plural, shortened, table_html
from nla_engine.store.views.frames import library

if TYPE_CHECKING:
    import pandas
    import polars

#: Texts that are shown of many, and the most characters of one on a line.
_SHOWN, _CHARACTERS = 10, 100
#: Of scores without a control.
_ALONE = (
    "one vector alone has no cos_shuffled and no rank: explain it together with some rows of the store, "
    "np.vstack([vector, rows])"
)


@dataclass(frozen=True, repr=False, eq=False)
class Explanations:
    """m texts of n vectors, those of a vector side by side: m = n unless `samples` says more. Its length is m.

    vectors: float32 [n, d], as they were given
    vector: int64 [m], which of them each text explains; sample: int64 [m], which of its texts it is
    texts, statuses: m texts, and `ok`, `unclosed`, `untagged`, `zero_vector` or `nonfinite_vector`
    n_tokens: int64 [m]
    reconstructions: float32 [m, d], NaN where there is none; None without an AR
    scores: None without an AR
    variance: Var of fve; None: not known. variance_rows: vectors that it was measured on; 0: it was given
    layer: the one that AV and AR were made for; None: they do not say
    about: what made them: models and options
    """

    vectors: np.ndarray
    vector: np.ndarray
    sample: np.ndarray
    texts: list[str]
    statuses: list[str]
    n_tokens: np.ndarray
    reconstructions: np.ndarray | None = None
    scores: Scores | None = None
    variance: float | None = None
    layer: int | None = None
    about: dict[str, Any] = field(default_factory=dict)
    variance_rows: int = 0

    @property
    def cos(self) -> np.ndarray | None:
        """float64 [m]: cosine of each vector and its reconstruction. None without an AR."""
        return None if self.scores is None else self.scores.cos

    @property
    def fve(self) -> np.ndarray | None:
        """float64 [m]: fraction of variance explained, 1 - 2 (1 - cos) / Var. None if cos or Var is not known."""
        if self.scores is None or self.variance is None:
            return None
        return fve_nrm(mse_nrm(self.scores.cos), self.variance)

    def __len__(self) -> int:
        return len(self.texts)

    def _columns(self) -> dict[str, Any]:
        """The names are those of the table of `roundtrip`."""
        columns = {
            "vector": self.vector,
            "sample": self.sample,
            "explanation": self.texts,
            "status": self.statuses,
            "n_tokens": self.n_tokens,
        }
        if self.scores is not None:
            columns |= {
                "best": self.scores.best,
                "cos": self.scores.cos,
                "cos_shuffled": self.scores.cos_shuffled,
                "retrieval_rank": self.scores.retrieval_rank,
            }
        if self.fve is not None:
            columns["fve_nrm"] = self.fve
        return columns

    def to_pandas(self) -> pandas.DataFrame:
        """A row per text. RequestError without pandas."""
        return library("pandas").DataFrame(self._columns())

    def to_polars(self) -> polars.DataFrame:
        """A row per text. RequestError without polars."""
        return library("polars").DataFrame(self._columns())

    def _title(self) -> str:
        n, m = len(self.vectors), len(self.texts)
        of = plural(n, "vector") if n == m else f"{plural(n, 'vector')}, {plural(m, 'text')}"
        parts = [of] + ([] if self.layer is None else [f"layer {self.layer}"])
        parts += [
            f"{name} {_mean(x):.3f}" for name, x in (("cos", self.cos), ("fve", self.fve)) if x is not None
        ]
        parts += [f"{count:,} {name}" for name, count in Counter(self.statuses).items() if name != "ok"]
        return "Explanations of " + "; ".join(parts)

    def _scores_of(self, place: int) -> dict[str, str]:
        return {
            name: f"{values[place]:.3f}"
            for name, values in (("cos", self.cos), ("fve", self.fve))
            if values is not None
        }

    def __repr__(self) -> str:
        lines = [self._title()]
        for place in range(min(len(self), _SHOWN)):
            scored = "".join(f"  {name} {value}" for name, value in self._scores_of(place).items())
            status = "" if self.statuses[place] == "ok" else f"  {self.statuses[place]}"
            text = shortened(" ".join(self.texts[place].split()), _CHARACTERS)
            lines.append(f"  {self.vector[place]}{scored}{status}  {text}")
        if len(self) > _SHOWN:
            lines.append(f"  and {len(self) - _SHOWN:,} more")
        if self._uncontrolled():
            lines.append(f"  {_ALONE}")
        return "\n".join(lines)

    def _uncontrolled(self) -> bool:
        """Whether there are scores and none has a control."""
        scores = self.scores
        return scores is not None and bool(
            np.isfinite(scores.cos).any() and np.isnan(scores.cos_shuffled).all()
        )

    def _repr_html_(self) -> str:
        names = ["vector", *(self._scores_of(0) if len(self) else ()), "status", "explanation"]
        rows = [
            [self.vector[place], *self._scores_of(place).values(), self.statuses[place], self.texts[place]]
            for place in range(min(len(self), 2 * _SHOWN))
        ]
        more = f", the first {len(rows)} here" if len(rows) < len(self) else ""
        alone = f"; {_ALONE}" if self._uncontrolled() else ""
        return table_html(self._title() + more + alone, names, rows)


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")
