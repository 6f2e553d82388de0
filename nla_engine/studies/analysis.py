"""From the files of a study to its numbers: every measure at every place, beside its controls.

Reads what the stages wrote and nothing else, so that numbers can be made again without a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from nla_engine.demo.claims import Named, read_claims
from nla_engine.studies.answers import PLACES, Reply, digit_split, glued
from nla_engine.studies.intervals import UNKNOWN, Bootstrap, Estimate, constant, proportion
from nla_engine.studies.naming import MEASURES, Facts, TextIndex, chance, named_flags

#: Fewer problems, or rows, than this in a group, and nothing is said about the group.
FEWEST = 10
SCORES = {
    "fve": "FVE",
    "top1": "retrieval top-1, all rows",
    "top1_place": "retrieval top-1, same place",
}
ALL = "all places"


@dataclass(frozen=True)
class Finding:
    """One measure at one place. shuffled: explanations of other pairs at the same place (for retrieval: chance).

    text_only: the same, from explanations at any place. margin: own less shuffled, row by row.
    """

    place: str
    measure: str
    own: Estimate
    shuffled: Estimate
    text_only: Estimate
    margin: Estimate


@dataclass(frozen=True)
class Contrast:
    """One number in two groups of rows. difference: the first less the second."""

    place: str
    measure: str
    first: Estimate
    second: Estimate
    difference: Estimate


@dataclass(frozen=True)
class Rows:
    """The explained rows of a study, one greedy explanation each, in the order of the table.

    place [n] ("elsewhere" outside the answer), cluster [n] (operand pair), correct [n], fve [n], rank [n] (NaN
    unknown); facts, named: one each. another [n]: FVE of another problem's explanation; rank_in_place [n].
    """

    row: np.ndarray
    place: np.ndarray
    cluster: np.ndarray
    correct: np.ndarray
    fve: np.ndarray
    rank: np.ndarray
    another: np.ndarray
    rank_in_place: np.ndarray
    facts: list[Facts]
    named: list[Named]

    def at(self, place: str) -> np.ndarray:
        """bool [n]: the rows of a place; all places of the answer for ALL."""
        return np.isin(self.place, PLACES) if place == ALL else self.place == place

    def places(self) -> list[str]:
        """The places that occur, in reading order."""
        return [place for place in PLACES if (self.place == place).any()]

    def index(self, mask: np.ndarray) -> tuple[TextIndex, list[Facts]]:
        """The texts and facts of some rows."""
        chosen = np.flatnonzero(mask)
        named = [self.named[i] for i in chosen]
        return TextIndex(named, [str(self.cluster[i]) for i in chosen]), [self.facts[i] for i in chosen]


def load_rows(replies: Sequence[Reply], explained: Path, reread: Path) -> Rows:
    """The explained rows that have a text, with what was read again of them."""
    names = ["row", "sequence", "explanation", "status", "fve_nrm", "retrieval_rank"]
    table = pq.read_table(explained, columns=names).to_pylist()
    table = [entry for entry in table if entry["status"] in ("ok", "unclosed", "untagged")]
    owner = {reply.sequence: reply for reply in replies}
    again = pq.read_table(reread, columns=["row", "variant", "fve_nrm", "rank_in_place"]).to_pylist()
    another = {entry["row"]: entry["fve_nrm"] for entry in again if entry["variant"] == "another"}
    in_place = {entry["row"]: entry["rank_in_place"] for entry in again if entry["variant"] == "whole"}
    facts = [Facts.of(owner[entry["sequence"]], entry["row"]) for entry in table]
    spots = [owner[entry["sequence"]].spots.get(entry["row"]) for entry in table]
    return Rows(
        row=np.array([entry["row"] for entry in table], np.int64),
        place=np.array([spot.place if spot else "elsewhere" for spot in spots]),
        cluster=np.array([entry.cluster for entry in facts]),
        correct=np.array([owner[entry["sequence"]].correct for entry in table], bool),
        fve=_floats([entry["fve_nrm"] for entry in table]),
        rank=_floats([entry["retrieval_rank"] for entry in table]),
        another=_floats([another.get(entry["row"]) for entry in table]),
        rank_in_place=_floats([in_place.get(entry["row"]) for entry in table]),
        facts=facts,
        named=[read_claims(entry["explanation"]) for entry in table],
    )


def accuracy(replies: Sequence[Reply]) -> list[tuple[str, str, Estimate]]:
    """(kind, group, share of right products): all problems, by phrasing and by the product's digits."""
    right = np.array([reply.correct for reply in replies])
    out = [("all", "all problems", proportion(right))]
    kinds: dict[str, Callable[[Reply], str]] = {
        "phrasing": lambda reply: str(reply.record["phrasing"]),
        "digits of the product": lambda reply: str(len(str(reply.record["product"]))),
    }
    for kind, group_of in kinds.items():
        groups = np.array([group_of(reply) for reply in replies])
        out += [(kind, str(group), proportion(right[groups == group])) for group in np.unique(groups)]
    return out


def tokenisation(replies: Sequence[Reply]) -> list[tuple[int, str, int, Estimate, Estimate]]:
    """(digits of the answer, how it was cut, replies, share among that many digits, share with glued characters)."""
    answered = [reply for reply in replies if reply.answer is not None]
    cut = [(len(str(abs(reply.answer or 0))), digit_split(reply.pieces)) for reply in answered]
    out = []
    for digits, split in sorted(set(cut), key=lambda entry: (entry[0], -cut.count(entry))):
        same = np.array([entry == (digits, split) for entry in cut])
        long = np.array([entry[0] == digits for entry in cut])
        sticking = np.array([glued(reply.pieces) for reply in answered])[same]
        out.append((digits, split, int(same.sum()), proportion(same[long]), proportion(sticking)))
    return out


def findings(
    rows: Rows, among: int, among_in_place: Mapping[str, int], bootstrap: Bootstrap
) -> list[Finding]:
    """Every score and every naming measure at every place.

    among: distinct vectors of the retrieval sample; among_in_place: of those of each place.
    """
    everywhere, _ = rows.index(np.ones(len(rows.row), bool))
    out = []
    for place in rows.places():
        mask = rows.at(place)
        cluster = rows.cluster[mask]

        fve, another = rows.fve[mask], rows.another[mask]
        margin = bootstrap.margin(fve, another, cluster)
        found = (bootstrap.mean(fve, cluster), bootstrap.mean(another, cluster), UNKNOWN, margin)
        out.append(Finding(place, "fve", *found))
        for measure, rank, size in (
            ("top1", rows.rank[mask], among),
            ("top1_place", rows.rank_in_place[mask], among_in_place.get(place, min(int(mask.sum()), among))),
        ):
            first, level = _first(rank), constant(1 / max(size, 1), size)
            own = bootstrap.mean(first, cluster, binary=True)
            margin = bootstrap.margin(first, np.full(len(first), level.value), cluster, binary=True)
            out.append(Finding(place, measure, own, level, UNKNOWN, margin))
        index, facts = rows.index(mask)
        for measure in MEASURES:
            flags = _floats(named_flags(index, facts, measure))
            if not np.isfinite(flags).any():
                continue
            shuffled = _floats(chance(index, facts, measure))
            anywhere = _floats(chance(everywhere, facts, measure))
            out.append(
                Finding(
                    place,
                    measure,
                    bootstrap.mean(flags, cluster, binary=True),
                    bootstrap.mean(shuffled, cluster),
                    bootstrap.mean(anywhere, cluster),
                    bootstrap.margin(flags, shuffled, cluster, binary=True),
                )
            )
    return out


def correctness(rows: Rows, bootstrap: Bootstrap) -> list[Contrast]:
    """Each measure where the model answered right and where it did not; empty if either group is too small to tell."""
    mask = rows.at(ALL)
    for group in (rows.correct, ~rows.correct):
        if len(np.unique(rows.cluster[mask & group])) < FEWEST:
            return []
    out = []
    for place in (ALL, *rows.places()):
        mask = rows.at(place)
        index, facts = rows.index(mask)
        columns = {"fve": rows.fve[mask]}
        columns |= {measure: _floats(named_flags(index, facts, measure)) for measure in MEASURES}
        for measure, values in columns.items():
            if np.isfinite(values).any():
                out.append(
                    _contrast(place, measure, values, rows.cluster[mask], rows.correct[mask], bootstrap)
                )
    return out


def detection(rows: Rows, bootstrap: Bootstrap) -> list[tuple[Contrast, Estimate]]:
    """FVE of explanations that name the true operands and nothing else, and of those that name another number.

    With each contrast the chance that a sound one has the higher FVE (0.5: FVE cannot tell). Places with fewer than
    FEWEST of either are left out.
    """
    out = []
    for place in (ALL, *rows.places()):
        mask = rows.at(place)
        index, facts = rows.index(mask)
        true = _floats(named_flags(index, facts, "operands")) == 1
        false = _floats(named_flags(index, facts, "other")) == 1
        sound = true & ~false
        judged = sound | false
        if min(sound.sum(), false.sum()) < FEWEST:
            continue
        fve, cluster = rows.fve[mask][judged], rows.cluster[mask][judged]
        contrast = _contrast(place, "fve", fve, cluster, sound[judged], bootstrap)
        out.append((contrast, bootstrap.separation(fve, cluster, sound[judged])))
    return out


@dataclass(frozen=True)
class Origin:
    """Where a named product comes from: texts (at any place) that state an operand pair, by whether it is true.

    true_product: they name the true product. stated_product: they name the product of the pair that they state.
    """

    pair: str
    texts: int
    true_product: Estimate
    stated_product: Estimate


def origins(rows: Rows, bootstrap: Bootstrap) -> list[Origin]:
    """For true and for other stated pairs; a group with fewer than FEWEST texts is left out.

    A text with other operands but the true product read the product from the vector; one with the product of its own
    operands may have multiplied by itself.
    """
    groups: dict[str, list[tuple[str, bool, bool]]] = {"true": [], "other": []}
    for i in np.flatnonzero(rows.at(ALL)):
        facts, named = rows.facts[i], rows.named[i]
        if named.operands is None:
            continue
        x, y = named.operands
        group = "true" if {x, y} == {facts.a, facts.b} else "other"
        groups[group].append((facts.cluster, facts.product in named.numbers, x * y in named.numbers))
    out = []
    for pair, texts in groups.items():
        if len(texts) >= FEWEST:
            cluster = np.array([entry[0] for entry in texts])
            true, stated = (np.array([entry[k] for entry in texts], np.float64) for k in (1, 2))
            means = [bootstrap.mean(flags, cluster, binary=True) for flags in (true, stated)]
            out.append(Origin(pair, len(texts), *means))
    return out


def _contrast(
    place: str,
    measure: str,
    values: np.ndarray,
    cluster: np.ndarray,
    group: np.ndarray,
    bootstrap: Bootstrap,
) -> Contrast:
    return Contrast(
        place,
        measure,
        bootstrap.mean(values[group], cluster[group], binary=measure in MEASURES),
        bootstrap.mean(values[~group], cluster[~group], binary=measure in MEASURES),
        bootstrap.difference(values, cluster, group),
    )


def _first(rank: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(rank), rank == 1, np.nan).astype(np.float64)


def _floats(values: Sequence[float | None]) -> np.ndarray:
    return np.array([math.nan if value is None else value for value in values], np.float64)
