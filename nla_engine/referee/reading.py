"""What a run shows, in words, from its own numbers: four sentences, each only where measure and control are there.

The words follow from the numbers by rules that anyone can apply:

    most    the whole 95% interval lies above its bar: 0.5 for FVE, 0.9 for the loss recovered and for claims
    part    it lies above 0, and so does that of the difference from the control
    no      neither; or "undecided" where there is no interval
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from nla_engine.referee.intervals import Bootstrap, Estimate
from nla_engine.referee.quantities import MEASURES, Quantity, controlled

NOT_MEASURED = "not measured"
#: Bars of the whole interval for the stronger word.
MOST_FVE, MOST = 0.5, 0.9


@dataclass(frozen=True)
class Finding:
    """One question. verdict: most, part, no, undecided or NOT_MEASURED; says: the sentence with its numbers."""

    question: str
    verdict: str
    says: str


def shown(value: Estimate, digits: int = 3) -> str:
    """`0.919 [0.905, 0.932]`; without brackets where there is no interval."""

    def text(number: float) -> str:
        return f"{number:.{digits}f}".replace("-", "\u2212")

    return text(value.value) + (f" [{text(value.low)}, {text(value.high)}]" if value.bounded else "")


@dataclass(frozen=True)
class _Question:
    """words: by verdict, what stands before the numbers. run: the command that measures it."""

    key: str
    question: str
    bar: float
    words: Mapping[str, str]
    run: str


_QUESTIONS = (
    _Question(
        "fve",
        "Do the words carry the vector?",
        MOST_FVE,
        {
            "most": "The words carry most of the vector",
            "part": "The words carry a part of the vector",
            "no": "It is not shown that the words carry the vector",
        },
        "nla-engine roundtrip (or score)",
    ),
    _Question(
        "fve_over_text",
        "Do they carry more than the text?",
        np.inf,
        {
            "part": "The words carry more than the text does",
            "no": "It is not shown that the words carry more than the text does",
        },
        "nla-engine controls",
    ),
    _Question(
        "loss_recovered",
        "Does the model act on the reconstruction as on the original?",
        MOST,
        {
            "most": "The model acts on the reconstruction nearly as on the original",
            "part": "The model acts on the reconstruction in part as on the original",
            "no": "It is not shown that the model acts on the reconstruction as on the original",
        },
        "nla-engine patch",
    ),
    _Question(
        "claims_true",
        "Is what they claim true?",
        MOST,
        {
            "most": "Nearly all that the words claim and a rule can check is true",
            "part": "What the words claim is true more often than chance, not always",
            "no": "It is not shown that what the words claim is true more often than chance",
        },
        "nla-engine claims",
    ),
)


def findings(quantities: Mapping[str, Quantity], sequence: np.ndarray, seed: int = 0) -> list[Finding]:
    """The answers to the four questions. sequence: int64 [R], whose rows are drawn together."""
    known, draw = {measure.key: quantity for measure, quantity in controlled(quantities)}, Bootstrap(seed)
    out = []
    for asked in _QUESTIONS:
        if asked.key not in known:
            out.append(Finding(asked.question, NOT_MEASURED, f"not measured: run `{asked.run}`"))
            continue
        own, control, over = estimates(known[asked.key], sequence, draw)
        if asked.key == "fve_over_text":  # is a difference from its control already
            over = own
        verdict = _verdict(own, over, asked.bar)
        words = "Too few sequences to decide" if verdict == "undecided" else asked.words[verdict]
        measure = MEASURES[asked.key]
        of = f"{measure.control} ({known[asked.key].of})" if known[asked.key].of else measure.control
        says = f"{words}: {measure.label} {shown(own)}; {of}: {shown(control)}"
        if asked.key == "fve_over_text" and "loss_over_text" in known:
            other = known["loss_over_text"]
            own, control, _ = estimates(other, sequence, draw)
            says += (
                f". By what the model makes of it, loss recovered over text is {shown(own)}; the best control "
                f"({other.of}): {shown(control)}"
            )
        if asked.key == "loss_recovered" and "top1_same" in known:
            own, control, _ = estimates(known["top1_same"], sequence, draw)
            says += f". The likeliest next token stays in {shown(own)} of cases; {_of('top1_same')}: {shown(control)}"
        out.append(Finding(asked.question, verdict, says + "."))
    return out


def estimates(
    quantity: Quantity, sequence: np.ndarray, draw: Bootstrap
) -> tuple[Estimate, Estimate, Estimate]:
    """The quantity, its control, and the one minus the other on the same rows."""
    assert quantity.control is not None
    own = draw.ratio(quantity.top, quantity.bottom, sequence)
    control = draw.ratio(*quantity.control, sequence)
    return own, control, draw.ratio(quantity.top, quantity.bottom, sequence, minus=quantity.control)


def _verdict(own: Estimate, over: Estimate, bar: float) -> str:
    if not (own.bounded and over.bounded):
        return "undecided"
    if own.above(0.0) and over.above(0.0):
        return "most" if own.above(bar) else "part"
    return "no"


def _of(key: str) -> str:
    return MEASURES[key].control
