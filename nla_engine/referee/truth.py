"""Whether a claim is true of the text that the model had read, and whether a text names what is in it: by rules.

The context of a row is the text of the tokens up to and at its position, with the next token behind it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from nla_engine.referee.claims import (
    LABELS,
    NAME,
    NEXT,
    NUMBER,
    QUOTE,
    READ,
    Claim,
    names_in,
    numbers_in,
    plain,
    words_in,
)
from nla_engine.store.sequences import Vocabulary

#: Bytes behind the position that a claim about what comes next may cover.
_AHEAD = 1000
#: Borders of turns and texts, which are no words.
_SPECIAL = re.compile(r"<\|[a-z_]{1,30}\|>|<(?:start|end)_of_turn>|</?s>|<[be]os>")


@dataclass(frozen=True)
class Fact:
    """Something of the context that a text may name, in the context's own words. kind: as that of a `Claim`."""

    kind: str
    text: str


@dataclass(frozen=True)
class Context:
    """What is true at one row. before: the text up to and at its position; after: some of what follows, "" at the end.

    read: the token at the position; next: the one behind it, None if there is none; recent: the last tokens up to it
    """

    before: str
    read: str
    next: str | None
    after: str
    recent: str

    @cached_property
    def whole(self) -> str:
        """With the next token, spaces taken as one."""
        return plain(self.before + (self.next or ""))

    @cached_property
    def numbers(self) -> frozenset[str]:
        """Those up to the position, and as the next token makes them."""
        return numbers_in(self.before) | numbers_in(self.before + (self.next or ""))

    def holds(self, claim: Claim) -> bool | None:
        """Whether a claim is true here. None if there is nothing to compare it with."""
        if claim.kind == READ:
            return _is_token(claim, self.read) or (
                not claim.label and _covers(claim.text, self.read) and _ends(self.before, claim.text.strip())
            )
        if claim.kind == NEXT:
            if self.next is None:
                return None
            return _is_token(claim, self.next) or (
                not claim.label
                and _covers(claim.text, self.next)
                and self.after.lstrip().startswith(claim.text.strip())
            )
        if claim.kind == NUMBER:
            return claim.key[1] in self.numbers
        if claim.kind == NAME:
            return re.search(rf"(?<!\w){re.escape(plain(claim.text))}(?!\w)", self.whole) is not None
        return plain(claim.text) in self.whole

    def facts(self) -> Iterator[Fact]:
        """What a text may name of it: both tokens, and numbers, names and words of the last tokens."""
        if self.read:
            yield Fact(READ, self.read)
        if self.next:
            yield Fact(NEXT, self.next)
        recent = _SPECIAL.sub("\n", self.recent)
        for kind, found in ((NUMBER, numbers_in), (NAME, names_in), (QUOTE, words_in)):
            for text in sorted(found(recent)):
                yield Fact(kind, text)


class Said:
    """What one text says, to be asked for facts. claims: as `claims_of` gives them."""

    def __init__(self, text: str, claims: Sequence[Claim]) -> None:
        self.claims = claims
        self._numbers = numbers_in(text)
        self._words = frozenset(
            word
            for claim in claims
            if not claim.label and claim.kind in (QUOTE, READ, NEXT)
            for word in words_in(claim.text)
        )
        self._text = plain(text)

    def names(self, fact: Fact, context: Context) -> bool:
        """Whether the text names a fact of this context."""
        if fact.kind in (READ, NEXT):
            return any(claim.kind == fact.kind and context.holds(claim) for claim in self.claims)
        if fact.kind == NUMBER:
            return fact.text in self._numbers
        if fact.kind == NAME:
            return re.search(rf"(?<!\w){re.escape(plain(fact.text))}(?!\w)", self._text) is not None
        return fact.text in self._words


class Contexts:
    """The contexts of the rows of one sequence. tokens: int32 [t]; recent: how many tokens `Context.recent` has."""

    def __init__(self, vocabulary: Vocabulary, tokens: np.ndarray, recent: int) -> None:
        self._vocabulary, self._tokens, self._recent = vocabulary, tokens, recent
        pieces = [vocabulary.raw(int(token)) for token in tokens]
        self._bytes = b"".join(pieces)
        self._ends = np.cumsum([len(piece) for piece in pieces]).tolist()

    def at(self, position: int) -> Context:
        """That of one position."""
        end, follows = self._ends[position], position + 1 < len(self._tokens)
        return Context(
            self._bytes[:end].decode(errors="replace"),
            self._vocabulary.text(int(self._tokens[position])),
            self._vocabulary.text(int(self._tokens[position + 1])) if follows else None,
            self._bytes[end : end + _AHEAD].decode(errors="replace"),
            self.last(position, self._recent),
        )

    def last(self, position: int, count: int) -> str:
        """The text of the last `count` tokens up to a position."""
        first = position - count
        start = self._ends[first] if first >= 0 else 0
        return self._bytes[start : self._ends[position]].decode(errors="replace")


def _is_token(claim: Claim, token: str) -> bool:
    if claim.label:
        return LABELS[claim.text].fullmatch(token.strip(" \t")) is not None
    return claim.text == token or (claim.text.strip() == token.strip() != "")


def _covers(text: str, token: str) -> bool:
    """Whether a text is long enough to say a token and more."""
    return len(text.strip()) > len(token.strip()) > 0


def _ends(before: str, text: str) -> bool:
    """Whether a text ends with these words, whole ones."""
    found = before.rstrip()
    if not found.endswith(text):
        return False
    ahead = found[: len(found) - len(text)][-1:]
    return not (ahead.isalnum() and text[:1].isalnum())
