"""What a text says about numbers: which it names, which it multiplies, which token it says was read or comes next.

Reads model-written, untrusted text of any wording: it searches, never raises, and every length is bounded. It does not
judge whether a claim is true.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from nla_engine.referee.claims import AND, COMING, COMING_AFTER, COUNTERS

# [0-9], not \d, which also matches other scripts' digits. A letter beside a number makes it a name ("v2", "2nd"), but x
# may be a sign. Decimals are not integers.
_INTEGER = (
    r"(?<![0-9])(?<![0-9][.,])(?<![A-WYZa-wyz_])"
    r"([0-9]{1,3}(?:,[0-9]{3}){1,4}|[0-9]{1,15})"
    r"(?![0-9])(?![.,][0-9])(?![A-WYZa-wyz_])"
)
#: How texts multiply. The story's wording is "37 boxes of 46 pens".
_TIMES = r"×|·|⋅|∗|\*(?!\*)|\\times|\\cdot|[xX](?=\s?[0-9])|times\b|multiplied by\b|boxes of\b"
_OPERATOR = rf"(?:{_TIMES}|\+|[-−–](?=\s?[0-9])|plus\b|minus\b|and\b|by\b)"
_OPERANDS = re.compile(rf"{_INTEGER}\s*{_OPERATOR}\s*{_INTEGER}")
_QUOTES = "\"'`“”‘’«»"
_TOKEN = re.compile(
    rf"[{_QUOTES}]\s?([0-9]{{1,15}})[.,]?\s?[{_QUOTES}]"
    r"|\b(?:token|digit)s?(?: read)?(?:\s?:| is| was)? ([0-9]{1,15})(?![0-9])(?!,[0-9])(?!\.[0-9])(?! (?:out )?of\b)"
)
_CLAIM = re.compile(
    r"(?:=|≈|\b(?:is|are|equals?|gives?|makes?|get)\b|boxed\{|:|^(?!\s*[0-9]+[.)]\s+\S))"
    rf"[\s*_$\\(\[{{]{{0,8}}(-?{_INTEGER})(?!\s*{_OPERATOR})"
)


@dataclass(frozen=True)
class Number:
    """A number in a text: its value, and the characters [start, end) that say it."""

    value: int
    start: int
    end: int


@dataclass(frozen=True)
class Named:
    """What one text names. reads, nexts: digits that it says were just read, or come next."""

    numbers: frozenset[int]
    reads: frozenset[str]
    nexts: frozenset[str]
    operands: tuple[int, int] | None


def read_claims(text: str) -> Named:
    """Everything that a text names."""
    reads, nexts, rest = _tokens_claimed(text)
    return Named(numbers_in(rest), reads, nexts, operands_named(rest))


def numbers_in(text: str) -> frozenset[int]:
    """The whole numbers that a text names: 1,702 is one; decimals, "v2" and "digit 2 of 4" are not."""
    return frozenset(_value(match[1]) for match in re.finditer(_INTEGER, COUNTERS.sub(" ", text)))


def operands_named(text: str) -> tuple[int, int] | None:
    """The first two numbers that the text joins by an operator, "and" or "by", in its order, or None."""
    match = _OPERANDS.search(text)
    return (_value(match[1]), _value(match[2])) if match else None


def answer_claims(reply: str) -> list[Number]:
    """The results that a reply claims, in order: numbers after "=", "is", ":" and the like, or at its start.

    A number that an operator follows is an operand: "It is 37 × 46" claims nothing.
    """
    return [Number(_value(match[1]), *match.span(1)) for match in _CLAIM.finditer(reply)]


def find_answer(reply: str) -> Number | None:
    """The last result that a reply claims, at the first place that claims it. None without a claim."""
    claims = answer_claims(reply)
    return next((claim for claim in claims if claim.value == claims[-1].value), None)


def _value(digits: str) -> int:
    return int(digits.replace(",", ""))


def _tokens_claimed(text: str) -> tuple[frozenset[str], frozenset[str], str]:
    """Digits said to be read, digits said to come next, and the text without claims about a single digit.

    A quoted number, or one after "token" or "digit", is a claim about a token. It is about the next token if a word
    like "next" precedes it in its sentence (after any earlier claim), or "follows" comes right after it.
    """
    reads: set[str] = set()
    nexts: set[str] = set()
    kept, done, coming = [], 0, False
    for match in _TOKEN.finditer(text):
        digits = match[1] or match[2]
        lead = re.split(r"[.!?;\n]", text[max(done, match.start() - 120) : match.start()])[-1]
        clause = lead if match[1] else lead + match[0]
        if not (done and AND.fullmatch(lead)):  # 'followed by "7" or "8"': like the claim before
            coming = bool(COMING.search(clause) or COMING_AFTER.match(text, match.end()))
        (nexts if coming else reads).add(digits)
        kept.append(text[done : match.start()])
        # "17" may also be a number. " ; " keeps the text around a claim from joining into one expression.
        kept.append(match[0] if len(digits) > 1 and digits[0] != "0" else " ; ")
        done = match.end()
    return frozenset(reads), frozenset(nexts), "".join([*kept, text[done:]])
