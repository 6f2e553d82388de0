"""The study in words: what its controls show and what they do not, chosen by the measured numbers and intervals.

A sentence that claims a difference is written only where the whole 95% interval lies on one side, and one that claims
there is none only where there is an interval. Knows no files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from nla_engine.studies.analysis import ALL, FEWEST, Finding
from nla_engine.studies.answers import PLACE_TITLES
from nla_engine.studies.intervals import FEWEST_CLUSTERS, Estimate
from nla_engine.studies.outcome import Outcome
from nla_engine.studies.tables import decimal, show

#: Two kinds of explanation whose FVE differs by less are alike for a reader who looks at one explanation.
LITTLE = 0.1
#: Separation (AUC) from which a threshold on FVE sorts true from false numbers usefully.
USEFUL = 0.9
_FEW = f"fewer than {FEWEST_CLUSTERS} operand pairs give no interval"
_NAMES = {
    "operands": "both true operands",
    "product": "the true product",
    "read": "the digit just read",
    "coming": "the digit about to come",
}


def read_outcome(outcome: Outcome) -> list[str]:
    """Paragraphs in plain words. Which ones, and what they claim, depends on the outcome alone."""
    parts: list[Callable[[Outcome], str]] = [
        _scope,
        _variance,
        _retrieval,
        *(_naming(measure) for measure in _NAMES),
        _other,
        _origin,
        _trust,
        _correctness,
        _agreement,
        _clauses,
        _form,
        _limits,
    ]
    return [text for part in parts if (text := part(outcome))]


def _scope(outcome: Outcome) -> str:
    share = outcome.accuracy[0][2]
    setup = outcome.setup
    models = "the bundled models" if setup.bundled else f"{setup.models[0]}, layer {setup.layer}"
    kept = {
        "held_out": " AV and AR never saw these pairs.",
        "trained": " AV and AR were trained on these pairs: what follows is no test of them.",
    }.get(setup.split, "")
    early = (
        f" {outcome.early_rows:,} of the {outcome.rows:,} rows stand at positions below 50, where released AVs "
        "were not trained."
        if outcome.early_rows and not setup.bundled
        else ""
    )
    closed = (
        f" Only {decimal(outcome.status_ok)} of the explanations were closed by their tag: many texts are cut."
        if outcome.status_ok < 0.95
        else ""
    )
    return (
        f"{outcome.problems:,} multiplications of {outcome.pairs:,} operand pairs by {models}; {outcome.right:,} "
        f"right ({show(share)}), {outcome.unanswered:,} without a stated result; {outcome.rows:,} rows "
        f"explained.{kept}{early}{closed}"
    )


def _variance(outcome: Outcome) -> str:
    found = _of(outcome, "fve")
    above, open_ = _split(found, lambda f: f.margin.above(0))
    if not _bounded(found):
        return f"Whether explanations carry more of their vector than those of other problems cannot be told: {_FEW}."
    if not above:
        return (
            "At no place do explanations carry measurably more of their vector than explanations of other "
            "problems: nothing that they say of a problem can be trusted on these numbers."
        )
    text = (
        f"Explanations carry more of their own vector than those of other problems {_at(above, found)} (FVE "
        f"{_span(above)})."
    )
    if open_:
        text += f" At {_places(open_)} no difference could be shown."
    high = max(found, key=lambda f: f.shuffled.value if f.shuffled.known else -math.inf)
    if high.shuffled.above(0):
        text += (
            f" A high FVE alone says less at “{PLACE_TITLES[high.place]}”: there another problem's explanation "
            f"already reaches {show(high.shuffled)}, the part that belongs to the place and not to the problem."
        )
    elif high.shuffled.bounded:
        text += (
            " Another problem's explanation reaches no FVE that could be told from 0 (at best "
            f"{show(high.shuffled)}): what is carried belongs to the problem."
        )
    return text


def _retrieval(outcome: Outcome) -> str:
    found = _of(outcome, "top1_place")
    above, open_ = _split(found, lambda f: f.margin.above(0))
    if not _bounded(found):
        return (
            f"Whether an explanation finds its own row among those of the same place cannot be told: {_FEW}."
        )
    if not above:
        return "Among rows of the same place no explanation finds its own row more often than chance."
    text = (
        "Among the rows of its own place, where the place cannot help, the reconstruction finds its row in "
        f"{_span(above)} of cases {_at(above, found)} (chance: at most "
        f"{decimal(max(f.shuffled.value for f in above))})."
    )
    return text + (f" At {_places(open_)} this is not above chance." if open_ else "")


def _naming(measure: str) -> Callable[[Outcome], str]:
    def sentence(outcome: Outcome) -> str:
        found = _of(outcome, measure)
        if not found:
            return ""
        above, open_ = _split(found, lambda f: f.margin.above(0))
        name = _NAMES[measure]
        if not _bounded(found):
            return (
                f"Whether explanations name {name} more often than those of other problems cannot be told "
                f"({_span(found)} against {_span(found, 'shuffled')}): {_FEW}."
            )
        if not above:
            return (
                f"Explanations do not name {name} more often than those of other problems at any place "
                f"({_span(found)} against {_span(found, 'shuffled')}): where they do, it may be chance."
            )
        text = (
            f"Explanations name {name} more often than those of other problems {_at(above, found)}: "
            f"{_span(above)} against {_span(above, 'shuffled')}."
        )
        if open_:
            text += f" At {_places(open_)} no difference could be shown."
        weak = [f for f in above if f.own.value < 0.5]
        if weak:
            text += f" At {_places(weak)} it is still the smaller part of them."
        return text

    return sentence


def _other(outcome: Outcome) -> str:
    found = _of(outcome, "other")
    if not found:
        return ""
    low, high = min(found, key=lambda f: f.own.value), max(found, key=lambda f: f.own.value)
    if all(f.own.bounded and f.own.high < LITTLE and not f.own.above(0) for f in found):
        return "Hardly an explanation names a number that is not of its problem."
    text = (
        f"Between {show(low.own)} (“{PLACE_TITLES[low.place]}”) and {show(high.own)} "
        f"(“{PLACE_TITLES[high.place]}”) of explanations name a number that is neither operand, product nor "
        "anything in the conversation."
    )
    same = [f for f in found if f.margin.bounded and not f.margin.below(0)]
    if not _bounded(found):
        text += f" Whether that is rarer than with explanations of other problems cannot be told: {_FEW}."
    elif same:
        text += (
            f" {_at(same, found).capitalize()} that is no rarer than with explanations of other problems: such "
            "numbers are no evidence."
        )
    elif len(_bounded(found)) == len(found):
        text += (
            " That is rarer than with explanations of other problems everywhere, but a reader of one text cannot "
            "see which."
        )
    return text


def _origin(outcome: Outcome) -> str:
    other = next((entry for entry in outcome.origins if entry.pair == "other"), None)
    if other is None:
        return (
            "Whether a named product was read from the vector or computed from the named operands cannot be "
            f"told: fewer than {FEWEST} explanations state wrong operands."
        )
    true, stated = other.true_product, other.stated_product
    numbers = (
        f"Of {other.texts:,} explanations that state wrong operands, {show(true)} name the true product and "
        f"{show(stated)} the product of the operands they state."
    )
    if stated.known and true.known and stated.low > true.high:
        return (
            f"{numbers} There the product follows the words and not the vector: the verbalizer multiplied by itself. "
            "That an explanation names the right product is therefore, by itself, no evidence that the vector holds it."
        )
    if stated.known and true.known and true.low > stated.high:
        return f"{numbers} The product is thus read from the vector rather than computed from the operands named."
    return f"{numbers} Which of the two is the rule cannot be told."


def _trust(outcome: Outcome) -> str:
    if not outcome.detection:
        return (
            f"Whether FVE tells true numbers from false ones cannot be told: fewer than {FEWEST} explanations of "
            "one of the two kinds at every place."
        )
    contrast, auc = outcome.detection[0]
    numbers = (
        f"Explanations with the true operands and no other number have FVE {show(contrast.first)}, those with "
        f"another number {show(contrast.second)}; the former lie higher in {show(auc)} of comparisons."
    )
    if not auc.bounded:
        return f"{numbers} Whether FVE tells true numbers from false ones cannot be told from so few operand pairs."
    if not auc.above(0.5):
        return f"{numbers} FVE does not tell true numbers from false ones here."
    if auc.value >= USEFUL:
        return f"{numbers} A threshold on FVE sorts them usefully."
    text = f"{numbers} FVE goes with truth, but not closely enough to trust a single explanation by it."
    alike = [c for c, _ in outcome.detection[1:] if c.difference.known and c.difference.high < LITTLE]
    if alike:
        places = _join([PLACE_TITLES[c.place] for c in alike])
        text += (
            f" At {places} the two kinds differ by less than {LITTLE:g}: a false number costs next to nothing "
            "there."
        )
    return text


def _correctness(outcome: Outcome) -> str:
    if not outcome.correctness:
        few, kind = (outcome.wrong, "wrong") if outcome.wrong <= outcome.right else (outcome.right, "right")
        return (
            "Whether explanations name more of the truth when the model answers right cannot be told: "
            f"{few:,} of {outcome.problems:,} replies are {kind}, and {FEWEST} operand pairs of each kind, with a "
            "stated result, are the least to compare."
        )
    everywhere = {entry.measure: entry for entry in outcome.correctness if entry.place == ALL}
    parts = []
    for measure, name in {**_NAMES, "other": "another number"}.items():
        entry = everywhere.get(measure)
        if entry is None:
            continue
        if entry.difference.above(0) or entry.difference.below(0):
            word = "more" if entry.difference.value > 0 else "less"
            parts.append(
                f"{name} {word} often where the model is right ({show(entry.first)} against {show(entry.second)})"
            )
        else:
            parts.append(f"{name} without a difference that could be shown ({show(entry.difference)})")
    return "Explanations name " + "; ".join(parts) + "."


def _agreement(outcome: Outcome) -> str:
    if not outcome.agreement:
        return ""
    entry, count = outcome.agreement[0], outcome.setup.samples
    text = (
        f"Two samples of one row state the same operands in {show(entry.same_pair)} of cases (of different "
        f"problems: {show(entry.chance)}). Where all {count} agree the operands are true in "
        f"{show(entry.right_unanimous)}, where they do not, in {show(entry.right_divided)}."
    )
    agreed, divided = entry.right_unanimous, entry.right_divided
    if not (agreed.known and divided.known):
        return text + " One of the two groups is empty, so agreement cannot be judged as a sign of truth."
    if agreed.low > divided.high:
        return (
            text
            + " Agreement is a sign of truth that needs no ground truth to see"
            + (", but no proof." if agreed.value < 0.99 else ".")
        )
    if divided.low > agreed.high:
        return text + " Agreement goes with being wrong here."
    return text + " That agreement means truth could not be shown."


def _clauses(outcome: Outcome) -> str:
    everywhere = [clause for clause in outcome.by_kind if clause.place == ALL and clause.swapped.known]
    if not everywhere:
        return "No explanation has two clauses that could be told apart, so none was left out."
    ordered = sorted(everywhere, key=lambda clause: -clause.swapped.value)
    told = _join([f"{show(clause.swapped)} for clauses about {_about(clause.clause)}" for clause in ordered])
    text = f"With one clause taken from another problem's explanation, FVE falls by {told}."
    if len(ordered) > 1 and ordered[0].swapped.low > ordered[1].swapped.high:
        text += f" What belongs to the problem stands in the clauses about {_about(ordered[0].clause)}."
    elif not ordered[0].swapped.bounded:
        text += f" Whether any of these losses is more than chance cannot be told: {_FEW}."
    elif not ordered[0].swapped.above(0):
        text += " None of these losses can be told from none: that the clauses hold something was not shown."
    elif len(ordered) > 1:
        text += " The intervals of the first two overlap: which carries more cannot be told."
    return text


def _form(outcome: Outcome) -> str:
    formal = [
        clause
        for clause in outcome.by_kind
        if clause.place == ALL and clause.removed.known and clause.removed.low > clause.swapped.high + LITTLE
    ]
    if not formal:
        return ""
    told = _join(
        [
            f"clauses about {_about(clause.clause)} ({show(clause.removed)} left out, {show(clause.swapped)} swapped)"
            for clause in formal
        ]
    )
    return (
        f"Leaving out costs more than swapping for {told}: part of that loss is the broken form of the text, "
        "which the AR never saw, and not lost information. The swap is the fairer measure."
    )


def _limits(outcome: Outcome) -> str:
    text = (
        "What the controls do not show: that the model uses what the words say, or that words outside numbers "
        "are true. Naming is counted by regular expressions on digits; numbers in words are not seen."
    )
    if outcome.setup.bundled:
        text += (
            " The bundled AV was trained to write operands, product and tokens in a fixed form, so that it names "
            "them at all is no discovery; that it names the right ones on pairs it never saw is what the "
            "controls test."
        )
    digits = [f for f in outcome.findings if f.measure in ("read", "coming")]
    if digits:
        worst = max(digits, key=lambda f: f.shuffled.value)
        text += (
            " There are ten digits, and some are commoner: by chance alone a text names the right one in up to "
            f"{show(worst.shuffled)} of cases."
        )
    return text


def _of(outcome: Outcome, measure: str) -> list[Finding]:
    return [finding for finding in outcome.findings if finding.measure == measure and finding.own.known]


def _bounded(found: Sequence[Finding]) -> list[Finding]:
    """Those whose difference from other problems has an interval."""
    return [finding for finding in found if finding.margin.bounded]


def _split(found: Sequence[Finding], holds: Callable[[Finding], bool]) -> tuple[list[Finding], list[Finding]]:
    return [f for f in found if holds(f)], [f for f in found if not holds(f)]


def _places(found: Sequence[Finding]) -> str:
    return _join([f"“{PLACE_TITLES[f.place]}”" for f in found])


def _at(found: Sequence[Finding], measured: Sequence[Finding]) -> str:
    """Their names, or "at every place" where more than three were measured and all are meant."""
    if len(found) == len(measured) > 3:
        return "at every place"
    return f"at {_places(found)}"


def _span(found: Sequence[Finding], field: str = "own") -> str:
    """The value, or "lowest to highest"."""
    values: list[Estimate] = [getattr(f, field) for f in found]
    low, high = (decimal(pick(v.value for v in values)) for pick in (min, max))
    return low if low == high else f"{low} to {high}"


def _about(kind: str) -> str:
    return {"neither": "neither numbers nor tokens"}.get(kind, kind)


def _join(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
