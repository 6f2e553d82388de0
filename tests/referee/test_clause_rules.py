"""How texts are cut, changed and negated; what they are said to claim; when that is true."""

from __future__ import annotations

import numpy as np
import pytest

from nla_engine.referee.claims import claims_of
from nla_engine.referee.clauses import (
    REMOVED,
    SWAPPED,
    changed_texts,
    clauses_of,
    negate,
)
from nla_engine.referee.judge import prompt_of, verdict
from nla_engine.referee.others import other_texts
from nla_engine.referee.truth import Context, Contexts, Fact, Said
from nla_engine.store.sequences import Vocabulary


@pytest.mark.parametrize(
    ("text", "clauses"),
    [
        ("", []),
        ("  one  ", ["one"]),
        ("A b. C d! E?", ["A b.", "C d!", "E?"]),
        ("- a b\n- c\n\n2) d", ["- a b", "- c", "2) d"]),
        ("a; b, and c, d", ["a;", "b,", "and c, d"]),
        ("a, android b", ["a, android b"]),
        ("It costs 3.5 dollars — or less", ["It costs 3.5 dollars", "or less"]),
        ('He says "a. b; c". Then d', ['He says "a. b; c".', "Then d"]),
        ('"Go." He went.', ['"Go."', "He went."]),
    ],
    ids=["empty", "one", "sentences", "list", "comma", "word", "dash", "quoted", "closing"],
)
def test_cutting(text: str, clauses: list[str]) -> None:
    assert clauses_of(text) == clauses


@pytest.mark.parametrize(
    ("clause", "expected"),
    [
        ("The reply is at 3", ("auxiliary", "The reply is not at 3", "The reply is also at 3")),
        ("it has been read", ("auxiliary", "it has not been read", "it has also been read")),
        ("The user asks why", ("verb", "The user does not ask why", "The user also asks why")),
        ("3 × 4 = 12", ("sign", "3 × 4 ≠ 12", "3 × 4 == 12")),
        ('"this is" comes', ("verb", '"this is" does not come', '"this is" also comes')),
        ("It is not so", None),
        ("It isn't, which is odd", None),
        ("A short chat", None),
        ("he has tails", None),
        ('say "it is"', None),
    ],
)
def test_negation(clause: str, expected: tuple[str, str, str] | None) -> None:
    assert negate(clause) == expected


def test_every_change_has_a_control_of_the_same_length(rng: np.random.Generator) -> None:
    for _ in range(200):
        words = [f"w{n}" for n in range(int(rng.integers(2, 20)))]
        cuts = set(rng.integers(1, len(words), int(rng.integers(1, 5))).tolist())
        text = " ".join(word + (";" if n + 1 in cuts else "") for n, word in enumerate(words))
        parts, foreign = clauses_of(text), ["x y", "z"]
        assert len(parts) == len(cuts) + 1 and " ".join(parts) == text
        made = list(changed_texts(text, foreign, rng))
        by = {(each.variant, each.unit): each.text for each in made}
        assert len(by) == len(made)
        for unit, part in enumerate(parts):
            count = len(part.split())
            assert by[REMOVED, unit].rstrip(";") == " ".join(parts[:unit] + parts[unit + 1 :]).rstrip(";")
            control = by[REMOVED + "_control", unit]
            assert len(control.split()) == len(words) - count and control != by[REMOVED, unit]
            assert ((SWAPPED, unit) in by) == (unit < 2) == ((SWAPPED + "_control", unit) in by)
            if unit < 2:
                assert by[SWAPPED, unit] == " ".join([*parts[:unit], foreign[unit], *parts[unit + 1 :]])
                assert foreign[unit] in by[SWAPPED + "_control", unit]


def kinds(text: str) -> list[tuple[str, str]]:
    return [(claim.kind, claim.text) for claim in claims_of(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('The last token read is "4"; next comes "5".', [("read", "4"), ("next", "5")]),
        ("The text ends with “no” and “yes” follows", [("read", "no"), ("next", "yes")]),
        ('followed by "7" or "8"', [("next", "7"), ("next", "8")]),
        ('The last token is (newline); it says "a  b"', [("read", "newline"), ("quote", "a  b")]),
        ("(newline) alone", []),
        ("don't say 'so it is' or v2", [("quote", "so it is")]),
        (
            "17 of 1,702 at 3.5, digit 2 of 4, a 4-digit number",
            [("number", n) for n in ("17", "1,702", "3.5")],
        ),
        ("They met Ada Lovelace in Paris. Then they left.", [("name", "Ada Lovelace"), ("name", "Paris")]),
        (r'The token is "\n"', [("read", "\n")]),
        ('" " " \' “ 9' * 50, None),
    ],
    ids=range(10),
)
def test_what_is_claimed(text: str, expected: list[tuple[str, str]] | None) -> None:
    found = kinds(text)
    assert expected is None or found == expected
    assert all(0 <= claim.start < claim.end <= len(text) for claim in claims_of(text))


def context(text: str, position: int, recent: int = 4) -> Context:
    """Of a text whose tokens are its characters in pairs."""
    pieces = [text[i : i + 2].encode() for i in range(0, len(text), 2)]
    starts = np.cumsum([0, *map(len, pieces)])
    vocabulary = Vocabulary(np.frombuffer(b"".join(pieces), np.uint8), starts)
    return Contexts(vocabulary, np.arange(len(pieces), dtype=np.int32), recent).at(position)


@pytest.mark.parametrize(
    ("said", "holds"),
    [
        ('The last token is "ri"', True),
        ('The last token is "Pari"', True),
        ('The last token is "ari"', False),
        ('The last token is "i"', False),
        ('The last token is "s "', False),
        ('next comes "s"', True),
        ('next comes "s 12"', True),
        ('next comes "12"', False),
        ('It says "Saw  Paris"', True),
        ('It says "12 of"', False),
        ("It was in Paris", True),
        ("It was in Par", False),
        ("about 7", True),
        ("about 12", False),
    ],
)
def test_what_holds(said: str, holds: bool) -> None:
    here = context("7 Saw Paris 12 of", 4)
    assert (here.read, here.next, here.before) == ("ri", "s ", "7 Saw Pari"), here
    (claim,) = claims_of(said)
    assert here.holds(claim) is holds


def test_facts_and_the_end_of_a_text() -> None:
    here = context("at 31 Ada is", 5)
    (claim,) = claims_of('next comes "is"')
    assert here.next is None and here.holds(claim) is None
    facts = list(here.facts())
    assert facts == [Fact("read", "is"), Fact("number", "1"), Fact("name", "Ada")] + [
        Fact("quote", word) for word in ("1", "Ada", "is")
    ]
    text = 'Just read "is", after Ada and 1'
    said = Said(text, claims_of(text))
    assert [fact.text for fact in facts if said.names(fact, here)] == ["is", "1", "Ada", "is"]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes", "yes"),
        (" no.", "no"),
        ("**Yes**, it", "yes"),
        ("No idea", "unclear"),
        ("yesterday", "unclear"),
        ("", "unclear"),
        ("The answer is yes", "unclear"),
    ],
)
def test_answers_that_are_not_yes_or_no_are_unclear(answer: str, expected: str) -> None:
    assert verdict(answer) == expected


def test_a_text_cannot_change_the_prompt() -> None:
    prompt = prompt_of("{clause} {next}", "{context}", "{following}")
    assert prompt.count("{clause} {next}") == prompt.count('"{context}"') == prompt.count("{following}") == 1


def test_other_texts_are_of_other_sequences_and_do_not_depend_on_order(rng: np.random.Generator) -> None:
    count = 60
    rows, sequence = np.arange(count), np.sort(rng.integers(0, 9, count))
    position, like = rng.permutation(count), rng.integers(0, 3, count)
    found = other_texts(rows, sequence, position, 5, like)
    assert (sequence[found] != sequence).all()
    for text, other in enumerate(found):
        possible = (like == like[text]) & (sequence != sequence[text])
        assert not possible.any() or like[other] == like[text]
    order = rng.permutation(count)
    again = other_texts(rows[order], sequence[order], position[order], 5, like[order])
    assert (order[again] == found[order]).all()
    one = other_texts(rows, np.zeros(count, np.int64), position, 5)
    assert (one != rows).all() and (one >= 0).all()
    assert (other_texts(np.zeros(2, np.int64), np.zeros(2, np.int64), np.zeros(2, np.int64), 5) == -1).all()
