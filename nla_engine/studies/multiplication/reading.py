"""The study in words: what its controls show and what they do not, chosen by the measured numbers and intervals.

A difference is claimed only where the whole 95% interval lies on one side. That there is none is claimed only where
there is an interval.
"""

from __future__ import annotations

from collections.abc import Callable

from nla_engine.studies.findings import ALL, FEWEST
from nla_engine.studies.multiplication.answers import PLACES
from nla_engine.studies.multiplication.outcome import Outcome
from nla_engine.studies.sentences import LITTLE, Words, bounded, join, measured, span, split
from nla_engine.studies.tables import decimal, show

#: Separation (AUC) from which a threshold on FVE sorts true from false numbers usefully.
USEFUL = 0.9
_WORDS = Words(PLACES, "operand pairs", {"neither": "neither numbers nor tokens"})
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
        lambda outcome: _WORDS.variance(outcome.findings),
        lambda outcome: _WORDS.retrieval(outcome.findings),
        *(_naming(measure) for measure in _NAMES),
        _other,
        _origin,
        _trust,
        _correctness,
        _agreement,
        lambda outcome: _WORDS.acts(outcome.findings),
        lambda outcome: _WORDS.clauses(outcome.by_kind),
        lambda outcome: _WORDS.form(outcome.by_kind),
        lambda outcome: _WORDS.negation(outcome.by_kind),
        _limits,
    ]
    return [text for part in parts if (text := part(outcome))]


def _scope(outcome: Outcome) -> str:
    share = outcome.accuracy[0][2]
    setup = outcome.setup
    models = (
        "the bundled models" if setup.models.bundled else f"{setup.models.base}, layer {setup.models.layer}"
    )
    kept = {
        "held_out": " AV and AR never saw these pairs.",
        "trained": " AV and AR were trained on these pairs: what follows is no test of them.",
    }.get(setup.split, "")
    early = (
        f" {outcome.early_rows:,} of the {outcome.rows:,} rows stand at positions below 50, where released AVs "
        "were not trained."
        if outcome.early_rows and not setup.models.bundled
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


def _naming(measure: str) -> Callable[[Outcome], str]:
    def sentence(outcome: Outcome) -> str:
        found = measured(outcome.findings, measure)
        if not found:
            return ""
        above, open_ = split(found, lambda f: f.margin.above(0))
        name = _NAMES[measure]
        if not bounded(found):
            return (
                f"Whether explanations name {name} more often than those of other problems cannot be told "
                f"({span(found)} against {span(found, 'shuffled')}): {_WORDS.few}."
            )
        if not above:
            return (
                f"Explanations do not name {name} more often than those of other problems at any place "
                f"({span(found)} against {span(found, 'shuffled')}): where they do, it may be chance."
            )
        text = (
            f"Explanations name {name} more often than those of other problems {_WORDS.at(above, found)}: "
            f"{span(above)} against {span(above, 'shuffled')}."
        )
        if open_:
            text += f" At {_WORDS.named(open_)} no difference could be shown."
        weak = [f for f in above if f.own.value < 0.5]
        if weak:
            text += f" At {_WORDS.named(weak)} it is still the smaller part of them."
        return text

    return sentence


def _other(outcome: Outcome) -> str:
    found = measured(outcome.findings, "other")
    if not found:
        return ""
    low, high = min(found, key=lambda f: f.own.value), max(found, key=lambda f: f.own.value)
    if all(f.own.bounded and f.own.high < LITTLE and not f.own.above(0) for f in found):
        return "Hardly an explanation names a number that is not of its problem."
    text = (
        f"Between {show(low.own)} (“{PLACES[low.place]}”) and {show(high.own)} "
        f"(“{PLACES[high.place]}”) of explanations name a number that is neither operand, product nor "
        "anything in the conversation."
    )
    same = [f for f in found if f.margin.bounded and not f.margin.below(0)]
    if not bounded(found):
        text += (
            f" Whether that is rarer than with explanations of other problems cannot be told: {_WORDS.few}."
        )
    elif same:
        text += (
            f" {_WORDS.at(same, found).capitalize()} that is no rarer than with explanations of other problems: such "
            "numbers are no evidence."
        )
    elif len(bounded(found)) == len(found):
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
        places = join([PLACES[c.place] for c in alike])
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


def _limits(outcome: Outcome) -> str:
    text = (
        "What the controls do not show: that words outside numbers are true, or that what the words say of a problem "
        "is what the model uses. Naming is counted by regular expressions on digits; numbers in words are not seen."
    )
    if outcome.setup.models.bundled:
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
