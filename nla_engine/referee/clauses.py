"""An explanation cut into clauses, and what each becomes when it is left out, swapped or negated: with its control.

Rules that anyone can read. Where none applies there is no such text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from nla_engine.referee.claims import quoted_spans

WHOLE, REMOVED, SWAPPED, NEGATED = "whole", "removed", "swapped", "negated"
CHANGES = (REMOVED, SWAPPED, NEGATED)
#: Behind the name of a change: its control.
CONTROL = "_control"
_CONJUNCTIONS = "and|or|but|so|yet|nor|while|which|who|where|when|because|although|since|then"
_CUT = re.compile(
    r"\s*\n\s*"
    r"|(?<=[.!?…])[\"')\]”’»]*\s+"
    r"|(?<=;)\s+"
    r"|\s+[—–]\s+"
    rf"|(?<=,)\s+(?=(?:{_CONJUNCTIONS})\b)"
)
_NEGATION = re.compile(
    r"\b(?:not|no|never|nothing|none|nobody|nowhere|neither|nor|without|cannot)\b|n['’]t\b", re.IGNORECASE
)
_VERBS = (
    "ask|answer|say|come|follow|contain|describe|mention|refer|indicate|suggest|begin|continue|give|equal|explain|"
    "introduce|seem|appear|want|include|expect|predict|represent|make|read"
)
#: Name, what it finds, what negates it, and a neutral change at the same place.
RULES = (
    (
        "auxiliary",
        re.compile(
            r"\b(is|are|was|were|has(?= been\b)|have(?= been\b)|had(?= been\b)|will|would|can|could|shall|should|may|"
            r"might|must)\b"
        ),
        r"\1 not",
        r"\1 also",
    ),
    ("verb", re.compile(rf"\b({_VERBS})s\b"), r"does not \1", r"also \1s"),
    ("sign", re.compile(r"(?<=\s)=(?=\s)"), "≠", "=="),
)
_TEXT_WORD = re.compile(r"\S+")


@dataclass(frozen=True)
class Changed:
    """A text in which one clause is changed, or random words as its control.

    variant: a name of CHANGES, or that of its control; unit: the clause's number, from 0; clause: its own words
    rule: of a negation; foreign: whether words of another text are in it
    """

    variant: str
    unit: int
    clause: str
    text: str
    rule: str | None = None

    @property
    def foreign(self) -> bool:
        """Whether words of another text stand in it."""
        return self.variant.startswith(SWAPPED)


def clause_spans(text: str) -> list[tuple[int, int]]:
    """The characters [start, end) of each clause; no spaces around them, nothing but spaces and dashes between them."""
    quoted = quoted_spans(text)
    out, start = [], 0
    for match in [*_CUT.finditer(text), None]:
        at, behind = (len(text), len(text)) if match is None else match.span()
        if match is not None:
            at += len(match[0]) - len(match[0].lstrip("\"')]”’»"))  # what closes belongs to the sentence
            if any(a < at < b for a, b in quoted):
                continue
        part = text[start:at]
        if part.strip():
            lead = len(part) - len(part.lstrip())
            out.append((start + lead, start + len(part.rstrip())))
        start = behind
    return out


def clauses_of(text: str) -> list[str]:
    """The clauses of a text, in its order."""
    return [text[start:end] for start, end in clause_spans(text)]


def negate(clause: str) -> tuple[str, str, str] | None:
    """(rule, the clause negated, the clause with a neutral word there); None where no rule applies."""
    hidden = list(clause)
    for start, end in quoted_spans(clause):
        hidden[start:end] = "\0" * (end - start)
    open_ = "".join(hidden)
    if _NEGATION.search(open_):
        return None
    for name, pattern, negation, neutral in RULES:
        if match := pattern.search(open_):
            before, after = clause[: match.start()], clause[match.end() :]
            return name, before + match.expand(negation) + after, before + match.expand(neutral) + after
    return None


def changed_texts(text: str, foreign: list[str] | None, draw: np.random.Generator) -> Iterator[Changed]:
    """Every change of a text and its control, clause by clause. A change without its control is left out.

    foreign: the clauses of another text; draw: gives the places of random words
    """
    spans = clause_spans(text)
    words = [match.span() for match in _TEXT_WORD.finditer(text)]
    starts = np.array([start for start, _ in words])
    for unit, (start, end) in enumerate(spans):
        clause = text[start:end]
        first, last = np.searchsorted(starts, [start, end]).tolist()
        span = _other_span(words, first, last - first, draw) if len(spans) > 1 else None
        if span is not None:
            yield Changed(REMOVED, unit, clause, _without(text, start, end))
            yield Changed(REMOVED + CONTROL, unit, clause, _without(text, *span))
            if foreign is not None and unit < len(foreign):
                yield Changed(SWAPPED, unit, clause, text[:start] + foreign[unit] + text[end:])
                swapped = text[: span[0]] + foreign[unit] + text[span[1] :]
                yield Changed(SWAPPED + CONTROL, unit, clause, swapped)
        if negation := negate(clause):
            rule, negated, neutral = negation
            yield Changed(NEGATED, unit, clause, text[:start] + negated + text[end:], rule)
            yield Changed(NEGATED + CONTROL, unit, clause, text[:start] + neutral + text[end:], rule)


def _other_span(
    words: list[tuple[int, int]], first: int, count: int, draw: np.random.Generator
) -> tuple[int, int] | None:
    """The characters of `count` words in a row that do not begin at word `first`; None if there are none."""
    places = len(words) - count  # starts 0 to places, one of them the clause's own
    if places < 1 or count < 1:
        return None
    start = int(draw.integers(places))
    start += start >= first
    return words[start][0], words[start + count - 1][1]


def _without(text: str, start: int, end: int) -> str:
    """The text without some characters, and without the spaces that would be left at one side of them."""
    before, after = text[:start], text[end:]
    return (before + after.lstrip() if after.strip() else before).strip().rstrip(",;—– ")
