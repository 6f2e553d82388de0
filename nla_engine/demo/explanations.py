"""Explanations of the demo: writes the target text of a position, and reads facts back out of any text.

Every fact is a function of (problem, position) alone; only the wording varies. The readers take
model-written, untrusted text: they search, never raise, and return None if they find nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from nla_engine.demo.claims import answer_claims
from nla_engine.demo.problems import RESULT_NAMES, SIGNS, Problem

OPEN_TAG, CLOSE_TAG = "<explanation>", "</explanation>"
WORDINGS = 3

# Special tokens must not appear literally in an explanation: they would end or re-frame the AV's turn.
_LABELS = {
    "<|im_start|>": "(start of turn)",
    "<|im_end|>": "(end of turn)",
    "<|endoftext|>": "(end of text)",
    "\n": "(newline)",
}
_TEXTS = {label: text for text, label in _LABELS.items()}


@dataclass(frozen=True)
class Reading:
    """What has been read at one position.

    part: "opening" (before the question), "question" (inside it; `place` is the question's text so far),
    "header" (from the end of the question to the start of the reply) or "reply".
    place: where the token stands, in words. token, next_token: texts; next_token None if it is open.
    """

    part: str
    place: str
    token: str
    next_token: str | None


def token_label(token: str) -> str:
    """How an explanation writes a token: quoted, or a name in parentheses for a newline or special token."""
    return _LABELS.get(token) or f'"{token}"'


def _sentence_last(reading: Reading) -> str:
    label = token_label(reading.token)
    if reading.next_token is None:
        open_end = "nothing follows" if reading.part == "reply" else "the rest is open"
        return f"The last token read is {label}; {open_end}."
    return f"The last token read is {label}; next comes {token_label(reading.next_token)}."


def _sentence_problem(problem: Problem, wording: int) -> str:
    a, b, result, kind = problem.a, problem.b, problem.result, problem.phrasing.kind
    if wording == 0:
        name = RESULT_NAMES[problem.operation]
        return f"The user asks {kind}: the {name} of {a} and {b}, which is {result}."
    if wording == 1:
        return f"A short chat with {kind}: {a} {SIGNS[problem.operation]} {b} = {result}."
    return f"Arithmetic, {kind}: {a} {problem.operation} {b} makes {result}."


def explain(problem: Problem, reading: Reading, wording: int = 0) -> str:
    """The target explanation, without tags: three short lines (what it is, where it stands, last token)."""
    last = _sentence_last(reading)
    if reading.part == "opening":
        return f"A chat opens and nothing is asked yet.\n{last}"
    if reading.part == "question":
        lead = ("The user asks about arithmetic", "A short chat", "Arithmetic")[wording]
        return f'{lead}. So far the question reads "{reading.place}".\n{last}'
    if reading.part == "header":
        where = f"Now at {reading.place}."
    else:
        where = f"The reply is at {reading.place}." if wording != 2 else f"In the reply, at {reading.place}."
    return f"{_sentence_problem(problem, wording)}\n{where}\n{last}"


def wrap(explanation: str) -> str:
    """The explanation between its tags, as the AV writes it."""
    return f"{OPEN_TAG}\n{explanation}\n{CLOSE_TAG}"


def unwrap(text: str) -> str:
    """The explanation inside the AV's text: from the opening tag on if unclosed, all of it if untagged."""
    body = text.split(OPEN_TAG, 1)[-1]
    return body.split(CLOSE_TAG, 1)[0].strip()


# Lengths are bounded: the text is untrusted.
_TOKEN = re.compile(
    r"(?:last token read is|[Jj]ust read)\s*:?\s?"
    r"(?:(\((?:start of turn|end of turn|end of text|newline)\))|\"([^\n]{1,40}?)\"(?=[;,.]|\s*$|\s*\n))"
)


def token_named(text: str) -> str | None:
    """The token the text says was read last, as it decodes ("<|im_end|>" for "(end of turn)"), or None."""
    match = _TOKEN.search(text)
    if not match:
        return None
    return _TEXTS[match[1]] if match[1] else match[2]


def answer_correct(reply: str, product: int) -> bool:
    """True if the reply claims a result and every result it claims is `product`."""
    claims = answer_claims(reply)
    return bool(claims) and all(claim.value == product for claim in claims)
