"""Means with 95% intervals that allow for rows that belong together.

A problem gives several rows, and several problems may ask about the same thing. They form one cluster, and the
bootstrap draws whole clusters, not rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 2000
#: A bootstrap over fewer clusters gives no interval.
FEWEST_CLUSTERS = 5
#: z of a two-sided 95% interval.
Z95 = 1.959963984540054


@dataclass(frozen=True)
class Estimate:
    """A mean over rows of several clusters and its 95% interval; all NaN without rows."""

    value: float
    low: float
    high: float
    rows: int
    clusters: int

    @property
    def known(self) -> bool:
        return math.isfinite(self.value)

    @property
    def bounded(self) -> bool:
        """Whether there is an interval: without one nothing can be claimed, neither a difference nor its absence."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def above(self, limit: float) -> bool:
        """Whether the whole interval lies above."""
        return self.known and self.low > limit

    def below(self, limit: float) -> bool:
        """Whether the whole interval lies below."""
        return self.known and self.high < limit

    def numbers(self) -> list[float | None]:
        """[value, low, high] for JSON: rounded; None if unknown."""
        triple = (self.value, self.low, self.high)
        return [round(number, 6) if math.isfinite(number) else None for number in triple]


UNKNOWN = Estimate(math.nan, math.nan, math.nan, 0, 0)


def interval_note(clusters: str) -> str:
    """What a reader must know about the intervals in a table. clusters: what is drawn, such as "questions"."""
    return (
        f"In brackets: 95% intervals by a bootstrap over {clusters} ({RESAMPLES:,} resamples), or Wilson's where every "
        "value is alike."
    )


def constant(value: float, rows: int) -> Estimate:
    """A number that is known exactly, such as the chance level of a rank."""
    return Estimate(value, value, value, rows, rows)


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson's 95% score interval of a proportion (E. B. Wilson, 1927); (NaN, NaN) for n = 0:

    (p + z^2/2n -+ z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n),  p = successes / n
    """
    if n == 0:
        return math.nan, math.nan
    p, z2 = successes / n, Z95 * Z95
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return (0.0 if successes == 0 else middle - half), (1.0 if successes == n else middle + half)


def proportion(flags: np.ndarray) -> Estimate:
    """Share of true among independent bool [n], with Wilson's interval."""
    n, successes = len(flags), int(np.count_nonzero(flags))
    return Estimate(successes / n, *wilson(successes, n), n, n) if n else UNKNOWN


class Bootstrap:
    """The cluster bootstrap (percentile method): draws clusters with replacement, seeded."""

    def __init__(self, seed: int, resamples: int = RESAMPLES) -> None:
        self.seed, self.resamples = seed, resamples
        self._last = np.zeros((0, 0))

    def mean(self, values: np.ndarray, clusters: np.ndarray, *, binary: bool = False) -> Estimate:
        """Mean of values [n] (NaN: not measured, left out) with clusters [n].

        binary: values are 0 or 1. If all are equal, resampling shows no spread: Wilson's interval over the number of
        clusters is used instead. NaN bounds for fewer than FEWEST_CLUSTERS.
        """
        values, clusters = _measured(values, clusters)
        if not len(values):
            return UNKNOWN
        sums, counts = _per_cluster(values, clusters)
        mean = float(values.mean())
        if binary and mean in (0.0, 1.0):
            return Estimate(mean, *wilson(round(mean) * len(sums), len(sums)), len(values), len(sums))
        if len(sums) < FEWEST_CLUSTERS:
            return Estimate(mean, math.nan, math.nan, len(values), len(sums))
        weights = self._weights(len(sums))
        low, high = np.percentile((weights @ sums) / (weights @ counts), [2.5, 97.5])
        return Estimate(mean, float(low), float(high), len(values), len(sums))

    def margin(
        self, values: np.ndarray, control: np.ndarray, clusters: np.ndarray, *, binary: bool = False
    ) -> Estimate:
        """Mean of values minus control, row by row.

        binary: if all values are equal, the interval runs from the low of `mean(values)` minus the control's high to
        its high minus the control's low: too wide rather than too narrow.
        """
        out = self.mean(values - control, clusters)
        own, other = self.mean(values, clusters, binary=binary), self.mean(control, clusters)
        if binary and own.value in (0.0, 1.0):
            return Estimate(out.value, own.low - other.high, own.high - other.low, out.rows, out.clusters)
        return out

    def least(self, values: np.ndarray, clusters: np.ndarray, bottom: np.ndarray | None = None) -> Estimate:
        """The least of the means of values [m, n] (NaN: not measured), chosen anew in every resample; clusters [n].

        bottom: [m, n]: of the sums of values over these
        """
        values = np.asarray(values, np.float64)
        below = np.where(np.isfinite(values), 1.0, np.nan) if bottom is None else bottom
        known = np.isfinite(values) & np.isfinite(below)
        some = known.any(0)
        if not known.any(1).all():
            return UNKNOWN
        _, index = np.unique(np.asarray(clusters)[some], return_inverse=True)
        size, values, known, below = int(index.max()) + 1, values[:, some], known[:, some], below[:, some]
        sums = np.stack([np.bincount(index[k], v[k], size) for v, k in zip(values, known, strict=True)])
        counts = np.stack([np.bincount(index[k], b[k], size) for b, k in zip(below, known, strict=True)])
        value, rows = float(_quotient(sums.sum(1), counts.sum(1)).min()), int(some.sum())
        if size < FEWEST_CLUSTERS:
            return Estimate(value, math.nan, math.nan, rows, size)
        weights = self._weights(size)
        with np.errstate(invalid="ignore", divide="ignore"):
            means = (weights @ sums.T) / (weights @ counts.T)
        drawn = np.where(np.isfinite(means), means, np.inf).min(1)
        low, high = np.percentile(drawn[np.isfinite(drawn)], [2.5, 97.5])
        return Estimate(value, float(low), float(high), rows, size)

    def ratio(
        self,
        top: np.ndarray,
        bottom: np.ndarray,
        clusters: np.ndarray,
        minus: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> Estimate:
        """Sum of `top` over sum of `bottom`, [n] each; or that minus the same of another pair, `minus`.

        Rows where one of them is NaN are left out. Both pairs see the same resamples, so the difference of two equal
        pairs is exactly 0, with its interval. NaN where the sum below is 0, NaN bounds for few clusters or where a
        resample's sum below is 0.
        """
        pairs = [(top, bottom), *([] if minus is None else [minus])]
        parts = np.array([part for pair in pairs for part in pair], np.float64)
        keep = np.isfinite(parts).all(0)
        parts = parts[:, keep]
        if not parts.shape[1]:
            return UNKNOWN
        names, index = np.unique(np.asarray(clusters)[keep], return_inverse=True)
        sums = np.array([np.bincount(index, part, len(names)) for part in parts])
        value = _minus(_quotient(*sums[place : place + 2].sum(1)) for place in range(0, len(sums), 2))
        if len(names) < FEWEST_CLUSTERS:
            return Estimate(float(value), math.nan, math.nan, parts.shape[1], len(names))
        drawn = self._weights(len(names)) @ sums.T
        resampled = _minus(
            _quotient(drawn[:, place], drawn[:, place + 1]) for place in range(0, len(sums), 2)
        )
        low, high = np.percentile(resampled, [2.5, 97.5])
        return Estimate(float(value), float(low), float(high), parts.shape[1], len(names))

    def difference(self, values: np.ndarray, clusters: np.ndarray, group: np.ndarray) -> Estimate:
        """Mean of values where bool `group` [n] is true, minus the mean of the others. A cluster may lie in both."""
        values, group, index = _finite(values, group, clusters)
        if not group.any() or group.all():
            return UNKNOWN
        size = index.max() + 1
        sums = [np.bincount(index[g], values[g], size) for g in (group, ~group)]
        counts = [np.bincount(index[g], minlength=size).astype(float) for g in (group, ~group)]
        weights = self._weights(size)
        with np.errstate(invalid="ignore", divide="ignore"):
            drawn = (weights @ sums[0]) / (weights @ counts[0]) - (weights @ sums[1]) / (weights @ counts[1])
        drawn = drawn[np.isfinite(drawn)]  # resamples that lack one of the groups are dropped
        low, high = np.percentile(drawn, [2.5, 97.5])
        value = float(values[group].mean() - values[~group].mean())
        return Estimate(value, float(low), float(high), len(values), int(size))

    def separation(self, values: np.ndarray, clusters: np.ndarray, group: np.ndarray) -> Estimate:
        """How often a value of the group lies above one outside (ties count half): the area under the ROC curve."""
        values, group, index = _finite(values, group, clusters)
        if not group.any() or group.all():
            return UNKNOWN
        size = int(index.max() + 1)
        order = np.argsort(values, kind="stable")
        _, level = np.unique(values[order], return_inverse=True)
        starts = np.flatnonzero(np.diff(level, prepend=-1))
        inside, index = group[order], index[order]
        drawn = []
        for weights in (np.ones(size), *self._weights(size)):
            w = weights[index]
            low = np.add.reduceat(np.where(inside, 0.0, w), starts)
            high = np.add.reduceat(np.where(inside, w, 0.0), starts)
            below = np.cumsum(low) - low / 2
            pairs = low.sum() * high.sum()
            if pairs:
                drawn.append(float(high @ below / pairs))
        bounds = np.percentile(drawn[1:], [2.5, 97.5])
        return Estimate(drawn[0], float(bounds[0]), float(bounds[1]), len(values), size)

    def _weights(self, clusters: int) -> np.ndarray:
        """float64 [resamples, clusters]: how often each cluster is drawn."""
        if self._last.shape[1] != clusters:  # the next call usually has as many
            rng = np.random.default_rng(self.seed)
            shares = np.full(clusters, 1 / clusters)
            self._last = rng.multinomial(clusters, shares, self.resamples).astype(np.float64)
        return self._last


def _quotient(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """Element by element; NaN where `bottom` is 0."""
    return np.asarray(top) / np.where(np.asarray(bottom) == 0, np.nan, bottom)


def _minus(values: Iterable[np.ndarray]) -> np.ndarray:
    """The first, or the first minus the second."""
    first, *second = values
    return first - second[0] if second else first


def _measured(values: np.ndarray, clusters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values = np.asarray(values, np.float64)
    keep = np.isfinite(values)
    return values[keep], np.asarray(clusters)[keep]


def _per_cluster(values: np.ndarray, clusters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    _, index = np.unique(clusters, return_inverse=True)
    return np.bincount(index, values), np.bincount(index).astype(np.float64)


def _finite(
    values: np.ndarray, group: np.ndarray, clusters: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Finite values float64 [n], their bool group [n], and the index of their cluster, int64 [n]."""
    keep = np.isfinite(values)
    _, index = np.unique(np.asarray(clusters)[keep], return_inverse=True)
    return np.asarray(values, np.float64)[keep], np.asarray(group, bool)[keep], index


def in_words(value: float | None, low: float | None, high: float | None) -> str:
    """An estimate and its interval, to four digits, for people. None: not known."""
    if value is None:
        return "-"
    return f"{value:.4f} " + ("(no interval)" if low is None or high is None else f"[{low:.4f}, {high:.4f}]")


def with_estimates(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts of a summary, with each of its `estimates` as an entry of its own before `seconds`."""
    items = [(key, value) for key, value in facts.items() if key != "estimates"]
    at = [key for key, _ in items].index("seconds")
    return dict(items[:at]) | facts["estimates"] | dict(items[at:])
