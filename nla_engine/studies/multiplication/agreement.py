"""Do several samples of one row's explanation say the same, and is what they agree on true? Reads files only."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from nla_engine.demo.claims import Named, read_claims
from nla_engine.referee.intervals import Bootstrap, Estimate
from nla_engine.studies.findings import ALL
from nla_engine.studies.multiplication.answers import PLACES, Reply

Pair = tuple[int, int]


@dataclass(frozen=True)
class Agreement:
    """At one place. same_pair: two samples of a row state the same operand pair (unordered). chance: two samples of
    different problems do. overlap: Jaccard index of the numbers of two samples. unanimous: all samples of a row state
    one pair. right, right_unanimous, right_divided: the stated pair is true: of all samples, of those of unanimous
    rows, of those of rows where samples differ."""

    place: str
    rows: int
    same_pair: Estimate
    chance: Estimate
    overlap: Estimate
    unanimous: Estimate
    right: Estimate
    right_unanimous: Estimate
    right_divided: Estimate


@dataclass(frozen=True)
class _Row:
    place: str
    cluster: str
    truth: Pair
    samples: list[Named]

    @property
    def pairs(self) -> list[Pair | None]:
        return [_unordered(sample.operands) for sample in self.samples]


def agreement(replies: Sequence[Reply], samples: Path, bootstrap: Bootstrap) -> list[Agreement]:
    """Agreement at all places together and at each."""
    rows = _load(replies, samples)
    places = [place for place in PLACES if any(row.place == place for row in rows)]
    return [
        _measure(place, [row for row in rows if place in (ALL, row.place)], bootstrap)
        for place in (ALL, *places)
    ]


def _load(replies: Sequence[Reply], samples: Path) -> list[_Row]:
    owner = {reply.sequence: reply for reply in replies}
    texts: dict[tuple[int, int], list[str]] = defaultdict(list)
    for entry in pq.read_table(samples, columns=["row", "sequence", "explanation"]).to_pylist():
        texts[entry["row"], entry["sequence"]].append(entry["explanation"])
    out = []
    for (row, sequence), written in texts.items():
        reply = owner[sequence]
        truth = _unordered((int(str(reply.record["a"])), int(str(reply.record["b"]))))
        assert truth is not None
        named = [read_claims(text) for text in written]
        out.append(_Row(reply.spots[row].place, reply.pair, truth, named))
    return out


def _measure(place: str, rows: list[_Row], bootstrap: Bootstrap) -> Agreement:
    cluster = np.array([row.cluster for row in rows])

    def mean(values: list[float], binary: bool = True) -> Estimate:
        return bootstrap.mean(np.array(values), cluster, binary=binary)

    same, overlap, unanimous, right = [], [], [], []
    for row in rows:
        pairs = row.pairs
        same.append(_share([x is not None and x == y for x, y in combinations(pairs, 2)]))
        overlap.append(
            float(np.mean([_jaccard(x.numbers, y.numbers) for x, y in combinations(row.samples, 2)]))
        )
        unanimous.append(float(pairs[0] is not None and len(set(pairs)) == 1))
        right.append(_share([pair == row.truth for pair in pairs]))
    agreed = np.array(unanimous) == 1
    chances = _chance(rows)
    return Agreement(
        place,
        len(rows),
        mean(same),
        mean(chances, binary=False),
        mean(overlap),
        mean(unanimous),
        mean(right),
        mean([value if flag else math.nan for value, flag in zip(right, agreed, strict=True)]),
        mean([math.nan if flag else value for value, flag in zip(right, agreed, strict=True)]),
    )


def _chance(rows: list[_Row]) -> list[float]:
    """For each row: how often one of its samples and one of another cluster's state the same pair, over all such."""
    everywhere: Counter[Pair | None] = Counter()
    by_cluster: dict[str, Counter[Pair | None]] = defaultdict(Counter)
    for row in rows:
        everywhere.update(row.pairs)
        by_cluster[row.cluster].update(row.pairs)
    total = sum(everywhere.values())
    out = []
    for row in rows:
        own = by_cluster[row.cluster]
        others = total - sum(own.values())
        hits = [everywhere[pair] - own[pair] if pair is not None else 0 for pair in row.pairs]
        out.append(float(np.mean(hits)) / others if others else math.nan)
    return out


def _unordered(pair: Pair | None) -> Pair | None:
    return None if pair is None else (min(pair), max(pair))


def _jaccard(x: frozenset[int], y: frozenset[int]) -> float:
    return len(x & y) / len(x | y) if x | y else 1.0


def _share(flags: list[bool]) -> float:
    return sum(flags) / len(flags)
