"""Sentences that any study can write: what its controls show and what they do not, chosen by numbers and intervals.

A difference is claimed only where the whole 95% interval lies on one side. That there is none is claimed only where
there is an interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from nla_engine.referee.clauses import NEGATED, REMOVED, SWAPPED
from nla_engine.referee.intervals import FEWEST_CLUSTERS, Estimate
from nla_engine.referee.reading import MOST
from nla_engine.referee.table import RECOVERED, TOP1
from nla_engine.studies.clauses import Clause, Cost
from nla_engine.studies.findings import ALL, Finding
from nla_engine.studies.tables import decimal, show

#: Two kinds of explanation whose FVE differs by less look alike to a reader of one explanation.
LITTLE = 0.1
#: A share of the lost KL that is as good as none.
NEGLIGIBLE = 0.01


@dataclass(frozen=True)
class Words:
    """A study's wording. clusters: what the intervals draw, such as "questions".

    places: place -> its label. kinds: kind of clause -> its wording in a sentence, where a table's differs.
    """

    places: Mapping[str, str]
    clusters: str
    kinds: Mapping[str, str]

    @property
    def few(self) -> str:
        """Why a question stays open."""
        return f"fewer than {FEWEST_CLUSTERS} {self.clusters} give no interval"

    def named(self, found: Sequence[Finding]) -> str:
        """The places of these findings, quoted."""
        return join([f"“{self.places[f.place]}”" for f in found])

    def at(self, found: Sequence[Finding], among: Sequence[Finding]) -> str:
        """The word "at" and their places, or "at every place" where more than three were measured and all are meant."""
        if len(found) == len(among) > 3:
            return "at every place"
        return f"at {self.named(found)}"

    def variance(self, findings: Sequence[Finding]) -> str:
        """Whether explanations carry more of their vector than those of other problems."""
        found = measured(findings, "fve")
        above, open_ = split(found, lambda f: f.margin.above(0))
        if not bounded(found):
            return (
                "Whether explanations carry more of their vector than those of other problems cannot be told: "
                f"{self.few}."
            )
        if not above:
            return (
                "At no place do explanations carry measurably more of their vector than explanations of other "
                "problems: nothing that they say of a problem can be trusted on these numbers."
            )
        text = (
            f"Explanations carry more of their own vector than those of other problems {self.at(above, found)} (FVE "
            f"{span(above)})."
        )
        if open_:
            text += f" At {self.named(open_)} no difference could be shown."
        high = max(found, key=lambda f: f.shuffled.value if f.shuffled.known else -math.inf)
        if high.shuffled.above(0):
            text += (
                f" A high FVE alone says less at “{self.places[high.place]}”: there another problem's explanation "
                f"already reaches {show(high.shuffled)}, the part that belongs to the place and not to the problem."
            )
        elif high.shuffled.bounded:
            text += (
                " Another problem's explanation reaches no FVE that could be told from 0 (at best "
                f"{show(high.shuffled)}): what is carried belongs to the problem."
            )
        return text

    def retrieval(self, findings: Sequence[Finding]) -> str:
        """Whether an explanation finds its row among those of its place."""
        found = measured(findings, "top1_place")
        above, open_ = split(found, lambda f: f.margin.above(0))
        if not bounded(found):
            return f"Whether an explanation finds its own row among those of the same place cannot be told: {self.few}."
        if not above:
            return "Among rows of the same place no explanation finds its own row more often than chance."
        text = (
            "Among the rows of its own place, where the place cannot help, the reconstruction finds its row in "
            f"{span(above)} of cases {self.at(above, found)} (chance: at most "
            f"{decimal(max(f.shuffled.value for f in above))})."
        )
        return text + (f" At {self.named(open_)} this is not above chance." if open_ else "")

    def acts(self, findings: Sequence[Finding]) -> str:
        """Whether the model goes on from the reconstruction as from its own vector. "" if it was not asked."""
        found = measured(findings, RECOVERED)
        if not found:
            return ""
        same = measured(findings, TOP1)
        above = [f for f in found if f.margin.above(NEGLIGIBLE) and f.own.above(0)]
        if not bounded(found):
            return (
                f"Whether the model acts on the reconstruction as on the original cannot be told: {self.few}."
            )
        if not above:
            return (
                "That the model acts on the reconstruction was not shown at any place: it loses as much as with the "
                "layer's mean vector, or with the explanation of another problem."
            )
        text = (
            f"With the reconstruction in the row's place the model loses less than with the layer's mean vector, and "
            f"less than with another problem's explanation, {self.at(above, found)}: loss recovered {span(above)} "
            f"(another problem's: {span(above, 'shuffled')})."
        )
        most = [f for f in found if f.own.above(MOST)]
        if most:
            text += f" It acts nearly as on the original {self.at(most, found)}."
        if same:
            text += (
                f" The likeliest next token stays in {span(same)} of cases (another problem's explanation: "
                f"{span(same, 'shuffled')})."
            )
        alike = [f for f in found if f not in above and f.own.above(0) and f.shuffled.above(MOST)]
        if open_ := [f for f in found if f not in above + alike]:
            text += f" At {self.named(open_)} no difference from these could be shown."
        if alike:
            text += (
                f" At {self.named(alike)} another problem's explanation recovers as much: what comes next does not "
                "depend on the problem there."
            )
        return text

    def clauses(self, by_kind: Sequence[Clause]) -> str:
        """Which clauses carry the vector."""
        everywhere = [clause for clause in by_kind if clause.place == ALL and clause.cost(SWAPPED).own.known]
        if not everywhere:
            return "No explanation has two clauses that could be told apart, so none was left out."
        ordered = sorted(everywhere, key=lambda clause: -clause.cost(SWAPPED).own.value)
        first, *further = (clause.cost(SWAPPED).own for clause in ordered)
        told = join(
            [f"{_beside(clause.cost(SWAPPED))} for clauses about {self._about(clause)}" for clause in ordered]
        )
        text = (
            "With one clause taken from another problem's explanation, FVE falls by the following (in parentheses: "
            f"with that clause in the place of other words): {told}."
        )
        if further and first.low > further[0].high:
            text += f" What belongs to the problem stands in the clauses about {self._about(ordered[0])}."
        elif not first.bounded:
            text += f" Whether any of these losses is more than chance cannot be told: {self.few}."
        elif not first.above(0):
            text += (
                " None of these losses can be told from none: that the clauses hold something was not shown."
            )
        elif further:
            text += " The intervals of the first two overlap: which carries more cannot be told."
        return text

    def form(self, by_kind: Sequence[Clause]) -> str:
        """Where the form of a text, not its content, matters to the AR. "" if nowhere."""
        formal = [
            clause
            for clause in by_kind
            if clause.place == ALL
            and clause.cost(REMOVED).own.known
            and clause.cost(REMOVED).own.low > clause.cost(SWAPPED).own.high + LITTLE
        ]
        if not formal:
            return ""
        told = join(
            [
                f"clauses about {self._about(clause)} ({show(clause.cost(REMOVED).own)} left out, "
                f"{show(clause.cost(SWAPPED).own)} swapped, {show(clause.cost(REMOVED).control)} with as many other "
                "words left out)"
                for clause in formal
            ]
        )
        return (
            f"Leaving out costs more than swapping for {told}: part of that loss is the broken form of the text, "
            "which the AR never saw, and not lost information. The swap is the fairer measure."
        )

    def negation(self, by_kind: Sequence[Clause]) -> str:
        """Whether the AR reads a negation. "" if no clause could be negated."""
        found = [clause for clause in by_kind if clause.place == ALL and clause.cost(NEGATED).own.known]
        if not found:
            return ""
        told = join(
            [f"{_beside(clause.cost(NEGATED))} for clauses about {self._about(clause)}" for clause in found]
        )
        text = f"With one clause negated, FVE falls by the following (in parentheses: with a neutral word): {told}."
        if not any(clause.cost(NEGATED).margin.bounded for clause in found):
            return f"{text} Whether a negation costs more than a neutral word cannot be told: {self.few}."
        above = [clause for clause in found if clause.cost(NEGATED).margin.above(0)]
        if not above:
            return text + " That the reconstructor reads a negation as one was not shown."
        about = join([self._about(clause) for clause in above])
        return text + f" In clauses about {about} a negation costs more than a neutral word."

    def _about(self, clause: Clause) -> str:
        return self.kinds.get(clause.clause, clause.clause)


def _beside(cost: Cost) -> str:
    """A loss with its control in parentheses."""
    return f"{show(cost.own)} ({show(cost.control)})"


def measured(findings: Sequence[Finding], measure: str) -> list[Finding]:
    """The findings of one measure that have a value."""
    return [finding for finding in findings if finding.measure == measure and finding.own.known]


def bounded(found: Sequence[Finding]) -> list[Finding]:
    """Those whose difference from other problems has an interval."""
    return [finding for finding in found if finding.margin.bounded]


def split(found: Sequence[Finding], holds: Callable[[Finding], bool]) -> tuple[list[Finding], list[Finding]]:
    """The findings for which `holds` is true, and the others."""
    return [f for f in found if holds(f)], [f for f in found if not holds(f)]


def span(found: Sequence[Finding], field: str = "own") -> str:
    """The value, or "lowest to highest"."""
    values: list[Estimate] = [getattr(f, field) for f in found]
    low, high = (decimal(pick(v.value for v in values)) for pick in (min, max))
    return low if low == high else f"{low} to {high}"


def join(names: Sequence[str]) -> str:
    """Names as a list: a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
