"""What explanations name, compared with explanations of other problems: the control that needs no model.

Every measure is a set: the texts of an index that name the facts of a row. The row's own text is in it or not. The
share of texts of other operand pairs in it is the level of chance: over all of them, not one draw.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from nla_engine.demo.claims import Named, read_claims
from nla_engine.studies.findings import ELSEWHERE
from nla_engine.studies.multiplication.answers import Reply, Spot

#: Measure -> what it asks of a text. Only for "other" is less better.
MEASURES = {
    "operands": "names both true operands",
    "product": "names the true product",
    "read": "names the digit just read",
    "coming": "names the digit about to come",
    "other": "names some other number",
}
_TOKEN = re.compile(r"\btokens?\b|\bcomes next\b|\bnext comes\b|\bfollow", re.IGNORECASE)


@dataclass(frozen=True)
class Facts:
    """What is true of a row. allowed: the numbers that do not count as "other" when a text names them."""

    a: int
    b: int
    product: int
    read: str | None
    coming: str | None
    allowed: frozenset[int]
    cluster: str

    @classmethod
    def of(cls, reply: Reply, row: int) -> Facts:
        record = reply.record
        spot = reply.spots.get(row, Spot(ELSEWHERE))
        partial = {int(digits) for digits in (spot.read, spot.coming) if digits}
        if row in reply.written:
            partial.add(reply.written[row])
        return cls(
            int(str(record["a"])),
            int(str(record["b"])),
            int(str(record["product"])),
            spot.read,
            spot.coming,
            reply.known | partial,
            reply.pair,
        )


class TextIndex:
    """Texts by what they name. cluster: the operand pair of each text."""

    def __init__(self, named: Sequence[Named], clusters: Sequence[str]) -> None:
        self.named = named
        self._numbers: dict[int, set[int]] = defaultdict(set)
        self._reads: dict[str, set[int]] = defaultdict(set)
        self._nexts: dict[str, set[int]] = defaultdict(set)
        self._own: dict[str, list[int]] = defaultdict(list)
        self._bare: set[int] = set()
        for text, (entry, cluster) in enumerate(zip(named, clusters, strict=True)):
            self._own[cluster].append(text)
            for number in entry.numbers:
                self._numbers[number].add(text)
            for digits in entry.reads:
                self._reads[digits].add(text)
            for digits in entry.nexts:
                self._nexts[digits].add(text)
            if not entry.numbers:
                self._bare.add(text)

    def hits(self, measure: str, facts: Facts) -> set[int] | None:
        """The texts for which a measure of MEASURES holds, given the facts of one row. None if not defined there."""
        none: set[int] = set()
        if measure == "operands":
            return self._numbers.get(facts.a, none) & self._numbers.get(facts.b, none)
        if measure == "product":
            return self._numbers.get(facts.product, none)
        if measure == "read":
            return None if facts.read is None else self._reads.get(facts.read, none)
        if measure == "coming":
            return None if facts.coming is None else self._nexts.get(facts.coming, none)
        touched = set().union(*(self._numbers.get(number, none) for number in facts.allowed))
        sound = self._bare | {text for text in touched if self.named[text].numbers <= facts.allowed}
        return set(range(len(self.named))) - sound

    def share_of_others(self, hits: set[int], cluster: str) -> float:
        """Share of the texts of other clusters that are in `hits`. NaN if there are none."""
        own = self._own.get(cluster, [])
        others = len(self.named) - len(own)
        return (len(hits) - sum(text in hits for text in own)) / others if others else math.nan


def named_flags(index: TextIndex, facts: Sequence[Facts], measure: str) -> list[float]:
    """1.0 or 0.0 for each text of an index: does it name the facts of its own row? NaN if not defined."""
    out = []
    for text, entry in enumerate(facts):
        hits = index.hits(measure, entry)
        out.append(math.nan if hits is None else float(text in hits))
    return out


def chance(index: TextIndex, facts: Sequence[Facts], measure: str) -> list[float]:
    """For each row's facts, the share of the index's texts of other operand pairs that name them."""
    out = []
    for entry in facts:
        hits = index.hits(measure, entry)
        out.append(math.nan if hits is None else index.share_of_others(hits, entry.cluster))
    return out


def kind_of(clause: str) -> str:
    """What a clause is about, whether true or not: numbers, tokens, both or neither."""
    named = read_claims(clause)
    tokens = bool(named.reads or named.nexts or _TOKEN.search(clause))
    if named.numbers:
        return "numbers and tokens" if tokens else "numbers"
    return "tokens" if tokens else "neither"
