"""The numbers of the multiplication study: what its replies, explanations and rows say, with controls.

Reads only what the stages wrote, so that numbers can be computed again without a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nla_engine.demo.claims import Named, read_claims
from nla_engine.referee.intervals import Bootstrap, Estimate, proportion
from nla_engine.studies.findings import (
    ALL,
    FEWEST,
    Contrast,
    Finding,
    ScoredRows,
    compare,
    floats,
    load_scored,
    score_findings,
)
from nla_engine.studies.multiplication.answers import (
    PLACES,
    Reply,
    clusters_of,
    digit_split,
    glued,
    places_of,
)
from nla_engine.studies.multiplication.naming import MEASURES, Facts, TextIndex, chance, named_flags


@dataclass(frozen=True)
class Rows(ScoredRows):
    """The explained rows, with what is true of each and what its explanation names. correct: bool [n], of its reply."""

    correct: np.ndarray
    facts: list[Facts]
    named: list[Named]

    def index(self, mask: np.ndarray) -> tuple[TextIndex, list[Facts]]:
        """The texts and facts of some rows."""
        chosen = np.flatnonzero(mask)
        named = [self.named[i] for i in chosen]
        return TextIndex(named, [str(self.cluster[i]) for i in chosen]), [self.facts[i] for i in chosen]


def load_rows(replies: Sequence[Reply], explained: Path, reread: Path) -> Rows:
    """The explained rows that have a text, with the scores of texts read again."""
    scored = load_scored(explained, reread, places_of(replies), clusters_of(replies))
    by_sequence = {reply.sequence: reply for reply in replies}
    owners = [by_sequence[sequence] for sequence in scored.sequence.tolist()]
    return Rows(
        **vars(scored),
        correct=np.array([reply.correct for reply in owners], bool),
        facts=[Facts.of(reply, row) for reply, row in zip(owners, scored.row.tolist(), strict=True)],
        named=[read_claims(text) for text in scored.text],
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

    among: distinct vectors in the retrieval sample; among_in_place: in the sample of each place.
    """
    everywhere, _ = rows.index(np.ones(len(rows.row), bool))
    out = []
    for place in rows.places(PLACES):
        out += score_findings(rows, place, among, among_in_place, bootstrap)
        mask = rows.at(place)
        cluster = rows.cluster[mask]
        index, facts = rows.index(mask)
        for measure in MEASURES:
            flags = floats(named_flags(index, facts, measure))
            if not np.isfinite(flags).any():
                continue
            shuffled = floats(chance(index, facts, measure))
            anywhere = floats(chance(everywhere, facts, measure))
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
    """Each measure where the model answered right and where it did not; empty if either group is too small."""
    mask = rows.at(ALL)
    for group in (rows.correct, ~rows.correct):
        if len(np.unique(rows.cluster[mask & group])) < FEWEST:
            return []
    out = []
    for place in (ALL, *rows.places(PLACES)):
        mask = rows.at(place)
        index, facts = rows.index(mask)
        columns = {"fve": rows.fve[mask]}
        columns |= {measure: floats(named_flags(index, facts, measure)) for measure in MEASURES}
        for measure, values in columns.items():
            if np.isfinite(values).any():
                groups = (rows.cluster[mask], rows.correct[mask])
                binary = measure in MEASURES
                out.append(compare(place, measure, values, *groups, bootstrap, binary=binary))
    return out


def detection(rows: Rows, bootstrap: Bootstrap) -> list[tuple[Contrast, Estimate]]:
    """FVE of explanations that name the true operands and nothing else, and of those that name another number.

    With each contrast comes the chance that one of the former has the higher FVE (0.5: FVE cannot tell). Places with
    fewer than FEWEST of either are left out.
    """
    out = []
    for place in (ALL, *rows.places(PLACES)):
        mask = rows.at(place)
        index, facts = rows.index(mask)
        true = floats(named_flags(index, facts, "operands")) == 1
        false = floats(named_flags(index, facts, "other")) == 1
        sound = true & ~false
        judged = sound | false
        if min(sound.sum(), false.sum()) < FEWEST:
            continue
        fve, cluster = rows.fve[mask][judged], rows.cluster[mask][judged]
        contrast = compare(place, "fve", fve, cluster, sound[judged], bootstrap, binary=False)
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
    """For true and for other stated pairs. A group with fewer than FEWEST texts is left out.

    A text with other operands but the true product read the product from the vector. One with the product of its own
    operands may have computed it.
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
