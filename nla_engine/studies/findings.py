"""What any study measures of its explanations: FVE and retrieval at each place, beside their controls.

Reads only what the stages wrote, so that numbers can be computed again without a model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from nla_engine.referee.intervals import UNKNOWN, Bootstrap, Estimate, constant
from nla_engine.studies.reread import WITH_TEXT

#: All rows of interest together; and the place of all other rows.
ALL, ELSEWHERE = "all places", "elsewhere"
#: Groups with fewer problems, or rows, are not reported.
FEWEST = 10
SCORES = {
    "fve": "FVE",
    "top1": "retrieval top-1, all rows",
    "top1_place": "retrieval top-1, same place",
}


@dataclass(frozen=True)
class Finding:
    """One measure at one place. shuffled: explanations of other clusters at the same place (for retrieval: chance).

    text_only: the same, from explanations at any place. margin: own minus shuffled, row by row.
    """

    place: str
    measure: str
    own: Estimate
    shuffled: Estimate
    text_only: Estimate
    margin: Estimate


@dataclass(frozen=True)
class Contrast:
    """One measure in two groups of rows. difference: first minus second."""

    place: str
    measure: str
    first: Estimate
    second: Estimate
    difference: Estimate


@dataclass(frozen=True)
class ScoredRows:
    """The explained rows of a study that have a text, in the order of the table; every field has one entry per row.

    text: the explanation. place: ELSEWHERE outside the rows of interest. fve, rank: NaN if unknown. another: FVE of
    another cluster's explanation. rank_in_place: among the rows of the same place.
    """

    row: np.ndarray
    sequence: np.ndarray
    text: list[str]
    place: np.ndarray
    cluster: np.ndarray
    fve: np.ndarray
    rank: np.ndarray
    another: np.ndarray
    rank_in_place: np.ndarray

    def at(self, place: str) -> np.ndarray:
        """bool [n]: the rows of a place; every row of interest for ALL."""
        return self.place != ELSEWHERE if place == ALL else self.place == place

    def places(self, known: Iterable[str]) -> list[str]:
        """The known places that occur, in the given order."""
        return [place for place in known if (self.place == place).any()]


def load_scored(
    explained: Path, reread: Path, place_of: Mapping[int, str], cluster_of: Mapping[int, str]
) -> ScoredRows:
    """The explained rows, with the scores of texts read again. place_of: by row; cluster_of: by sequence."""
    names = ["row", "sequence", "explanation", "status", "fve_nrm", "retrieval_rank"]
    table = [e for e in pq.read_table(explained, columns=names).to_pylist() if e["status"] in WITH_TEXT]
    again = pq.read_table(reread, columns=["row", "variant", "fve_nrm", "rank_in_place"]).to_pylist()
    another = {entry["row"]: entry["fve_nrm"] for entry in again if entry["variant"] == "another"}
    in_place = {entry["row"]: entry["rank_in_place"] for entry in again if entry["variant"] == "whole"}
    return ScoredRows(
        row=np.array([entry["row"] for entry in table], np.int64),
        sequence=np.array([entry["sequence"] for entry in table], np.int64),
        text=[entry["explanation"] for entry in table],
        place=np.array([place_of.get(entry["row"], ELSEWHERE) for entry in table]),
        cluster=np.array([cluster_of[entry["sequence"]] for entry in table]),
        fve=floats([entry["fve_nrm"] for entry in table]),
        rank=floats([entry["retrieval_rank"] for entry in table]),
        another=floats([another.get(entry["row"]) for entry in table]),
        rank_in_place=floats([in_place.get(entry["row"]) for entry in table]),
    )


def score_findings(
    rows: ScoredRows, place: str, among: int, among_in_place: Mapping[str, int], bootstrap: Bootstrap
) -> list[Finding]:
    """FVE and both retrievals at one place.

    among: distinct vectors in the retrieval sample; among_in_place: in the sample of each place.
    """
    mask = rows.at(place)
    cluster, fve, another = rows.cluster[mask], rows.fve[mask], rows.another[mask]
    margin = bootstrap.margin(fve, another, cluster)
    own, other = bootstrap.mean(fve, cluster), bootstrap.mean(another, cluster)
    out = [Finding(place, "fve", own, other, UNKNOWN, margin)]
    for measure, rank, size in (
        ("top1", rows.rank[mask], among),
        ("top1_place", rows.rank_in_place[mask], among_in_place.get(place, min(int(mask.sum()), among))),
    ):
        first, level = _first(rank), constant(1 / max(size, 1), size)
        own = bootstrap.mean(first, cluster, binary=True)
        margin = bootstrap.margin(first, np.full(len(first), level.value), cluster, binary=True)
        out.append(Finding(place, measure, own, level, UNKNOWN, margin))
    return out


def compare(
    place: str,
    measure: str,
    values: np.ndarray,
    cluster: np.ndarray,
    group: np.ndarray,
    bootstrap: Bootstrap,
    *,
    binary: bool,
) -> Contrast:
    """Compare values [n] where bool `group` [n] is true with the others. binary: values are 0 or 1."""
    return Contrast(
        place,
        measure,
        bootstrap.mean(values[group], cluster[group], binary=binary),
        bootstrap.mean(values[~group], cluster[~group], binary=binary),
        bootstrap.difference(values, cluster, group),
    )


def floats(values: Sequence[float | None]) -> np.ndarray:
    """float64 [n]; NaN for None."""
    return np.array([math.nan if value is None else value for value in values], np.float64)


def _first(rank: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(rank), rank == 1, np.nan).astype(np.float64)
