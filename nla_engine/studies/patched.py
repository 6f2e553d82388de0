"""What the model makes of reconstructions in the place of its vectors, at each place. Reads the table of `patch`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from nla_engine.referee.intervals import UNKNOWN, Bootstrap, Estimate
from nla_engine.referee.table import CHANGE, KL, RECOVERED, TOP1, named
from nla_engine.referee.variants import MEAN, RECONSTRUCTION, SHUFFLED, VARIANTS
from nla_engine.studies.findings import ALL, Finding, ScoredRows

#: Measures that are findings, each beside that of another problem's explanation.
PATCHES = {
    KL: "KL to the model's own next-token distribution",
    RECOVERED: "loss recovered",
    TOP1: "same next token",
}
_COLUMNS = (KL, TOP1, CHANGE)
#: Columns by name, float64 [n], in the order of the explained rows.
Columns = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Patched:
    """A mean of one measure over the rows of a place, with one kind of vector (a name of VARIANTS) in their place."""

    place: str
    measure: str
    variant: str
    value: Estimate


def load_patched(table: Path, row: np.ndarray) -> Columns:
    """The columns of a table of `patch` for these rows, int64 [n]; NaN for rows that it lacks."""
    names = [named(measure, variant) for measure in _COLUMNS for variant in VARIANTS]
    found = pq.read_table(table, columns=["row", *names])
    place = {int(each): at for at, each in enumerate(row)}
    at = np.array([place.get(int(each), -1) for each in found["row"].to_numpy()], np.int64)
    out = {}
    for name in names:
        values = np.array([np.nan if each is None else each for each in found[name].to_pylist()], np.float64)
        out[name] = np.full(len(row), np.nan)
        out[name][at[at >= 0]] = values[at >= 0]
    return out


def patch_findings(rows: ScoredRows, columns: Columns, place: str, bootstrap: Bootstrap) -> list[Finding]:
    """The measures of PATCHES at one place. Less is better of KL, so its margin is below 0 where the words help."""
    mask = rows.at(place)
    cluster = rows.cluster[mask]
    of = {name: values[mask] for name, values in columns.items()}
    if not np.isfinite(of[KL]).any():
        return []
    kl, other, mean = of[KL], of[named(KL, SHUFFLED)], of[named(KL, MEAN)]
    own_same, other_same = of[TOP1], of[named(TOP1, SHUFFLED)]
    own, shuffled = (mean - kl, mean + 0 * kl), (mean - other, mean + 0 * other)
    return [
        Finding(
            place,
            KL,
            bootstrap.mean(kl, cluster),
            bootstrap.mean(other, cluster),
            UNKNOWN,
            bootstrap.margin(kl, other, cluster),
        ),
        Finding(
            place,
            RECOVERED,
            bootstrap.ratio(*own, cluster),
            bootstrap.ratio(*shuffled, cluster),
            UNKNOWN,
            bootstrap.ratio(*own, cluster, minus=shuffled),
        ),
        Finding(
            place,
            TOP1,
            bootstrap.mean(own_same, cluster, binary=True),
            bootstrap.mean(other_same, cluster, binary=True),
            UNKNOWN,
            bootstrap.margin(own_same, other_same, cluster, binary=True),
        ),
    ]


def patched_means(
    rows: ScoredRows, columns: Columns, places: Iterable[str], bootstrap: Bootstrap
) -> list[Patched]:
    """Every measure with every vector, at all places together and at each."""
    out = []
    for place in (ALL, *places):
        mask = rows.at(place)
        cluster = rows.cluster[mask]
        for measure in _COLUMNS:
            for variant in VARIANTS:
                values = columns[named(measure, variant)][mask]
                mean = bootstrap.mean(values, cluster, binary=measure == TOP1)
                out.append(Patched(place, measure, variant, mean))
        below = columns[named(KL, MEAN)][mask]
        for variant in (RECONSTRUCTION, SHUFFLED):
            kl = columns[named(KL, variant)][mask]
            out.append(
                Patched(place, RECOVERED, variant, bootstrap.ratio(below - kl, below + 0 * kl, cluster))
            )
    return out
