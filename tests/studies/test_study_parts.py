"""The parts of the multiplication study: problems, places of an answer, changed texts, tables."""

from __future__ import annotations

import csv
import io
import json
import math

import numpy as np
import pytest

from nla_engine.demo.problems import TIMES_KEYS, held_out_pairs
from nla_engine.engine.request import Finish
from nla_engine.errors import RequestError
from nla_engine.referee.intervals import UNKNOWN, Estimate
from nla_engine.store.sequences import StoredSequence, Vocabulary
from nla_engine.studies.multiplication.answers import _read, digit_split, glued
from nla_engine.studies.multiplication.naming import kind_of
from nla_engine.studies.multiplication.problems import draw_problems, parse_phrasings, parse_range
from nla_engine.studies.reread import Explained, choose_partners, plan
from nla_engine.studies.tables import Table, show

TWO_DIGITS = range(10, 100)


def test_problems_are_seeded_and_every_pair_comes_once() -> None:
    problems = draw_problems(300, 4, TWO_DIGITS, TWO_DIGITS)
    assert problems == draw_problems(300, 4, TWO_DIGITS, TWO_DIGITS)
    assert problems != draw_problems(300, 5, TWO_DIGITS, TWO_DIGITS)
    assert len({problem.pair for problem in problems}) == 300
    assert {problem.phrasing for problem in problems} == set(TIMES_KEYS)
    assert any(p.a > p.b for p in problems) and any(p.a < p.b for p in problems)
    assert problems[:50] == draw_problems(50, 4, TWO_DIGITS, TWO_DIGITS)


def test_problems_keep_to_split_and_ranges() -> None:
    held = draw_problems(200, 0, TWO_DIGITS, TWO_DIGITS, split="held_out")
    assert all(problem.pair in held_out_pairs() for problem in held)
    assert not any(
        p.pair in held_out_pairs() for p in draw_problems(200, 0, TWO_DIGITS, TWO_DIGITS, split="trained")
    )
    lopsided = draw_problems(30, 0, range(2, 4), range(50, 60), ("what", "much"))
    assert all(p.a in range(2, 4) and p.b in range(50, 60) for p in lopsided)
    assert len(set(lopsided)) == 30 and len({p.pair for p in lopsided[:20]}) == 20, (
        "each pair once before any twice"
    )
    large = draw_problems(100, 0, range(100_000, 200_000), range(100_000, 200_000))
    assert len({p.pair for p in large}) == 100


def test_more_problems_than_there_are_is_refused() -> None:
    with pytest.raises(RequestError, match="--problems 9.* give 8 different problems"):
        draw_problems(9, 0, range(2, 4), range(2, 4), ("what", "much"))
    assert len(draw_problems(8, 0, range(2, 4), range(2, 4), ("what", "much"))) == 8


@pytest.mark.parametrize("text", ["", "9-", "-9", "9-2", "1-99999999", "a-b", "1-2-3", "٣-9", "1.5"])
def test_bad_ranges_are_refused(text: str) -> None:
    if text == "9-":
        assert parse_range(text, "--first") == range(9, 10)
        return
    with pytest.raises(RequestError, match="--first is"):
        parse_range(text, "--first")


def test_unknown_phrasings_are_refused() -> None:
    assert parse_phrasings("what, much,what") == ("what", "much")
    with pytest.raises(RequestError, match="'add' is unknown; choose from what"):
        parse_phrasings("what,add")


def sequence(
    pieces: list[str | bytes], record: dict[str, object], finish: Finish = Finish.EOS, prompt: int = 2
):
    """A stored sequence of `prompt` prompt tokens and one token per piece of the reply; and the row positions."""
    raw = [b"?"] * prompt + [piece.encode() if isinstance(piece, str) else piece for piece in pieces]
    start = np.cumsum([0, *map(len, raw)])
    size = len(raw)
    stored = StoredSequence(
        0,
        np.arange(size, dtype=np.int32),
        prompt,
        finish,
        slice(100, 100 + size - prompt + 1),
        record,
        json.dumps(record).encode(),
        Vocabulary(np.frombuffer(b"".join(raw), np.uint8), start),
    )
    return stored, np.array([0] * 100 + list(range(prompt - 1, size)))


PRODUCT: dict[str, object] = {"a": 37, "b": 46, "product": 1702, "pair": "37x46", "phrasing": "what"}
END = "<|im_end|>"


def places(
    pieces: list[str | bytes], finish: Finish = Finish.EOS
) -> list[tuple[str, str | None, str | None] | None]:
    """For the prompt's last token and each piece: place, digits read, digits to come."""
    stored, positions = sequence(pieces, PRODUCT, finish)
    reply = _read(stored, positions)
    found = [reply.spots.get(100 + i) for i in range(len(pieces) + 1)]
    return [None if spot is None else (spot.place, spot.read, spot.coming) for spot in found]


def test_places_of_single_digits() -> None:
    assert places(["37", " × ", "46", " =", " ", "1", "7", "0", "2", ".", END]) == [
        *[None] * 5,
        ("before", None, "1"),
        ("first", "1", "7"),
        ("middle", "7", "0"),
        ("middle", "0", "2"),
        ("last", "2", None),
        ("after", None, None),
        ("end", None, None),
    ]


def test_places_where_the_answer_opens_the_reply() -> None:
    """The prompt's last token comes before it. Tokens of three digits; no EOS; the answer occurs twice."""
    found = places(["170", "2", " = 37 × 46, or ", "1702"], Finish.LENGTH)
    assert found == [
        ("before", None, "170"),
        ("first", "170", "2"),
        ("last", "2", None),
        ("after", None, None),
        None,
    ]


def test_places_of_odd_tokens() -> None:
    """One token for the answer; a token glued to its neighbours; a comma in between; broken bytes before it."""
    assert places(["It is", " 1702", END])[1:] == [
        ("before", None, "1702"),
        ("only", "1702", None),
        ("end", None, None),
    ]
    assert places(["is 1", "702. ", "ok", END])[1:3] == [("first", "1", "702"), ("last", "702", None)]
    found = places([b"\xff\xc3", " = ", "1", ",", "702", END])
    assert found[3:] == [("first", "1", "702"), None, ("last", "702", None), ("end", None, None)]
    assert places(["no", " idea", END]) == [None] * 4


def test_a_reply_knows_what_may_be_named() -> None:
    stored, positions = sequence(["40 × 46 = ", "1840", ", so it is ", "16", "56", END], PRODUCT)
    reply = _read(stored, positions)
    assert not reply.correct and reply.answer == 1656
    assert {37, 46, 1702, 40, 1840, 1656} <= reply.known
    assert reply.written == {104: 16, 105: 1656}


def test_digit_splits() -> None:
    assert digit_split(("1", "7", "0", "2")) == "1+1+1+1" and digit_split((" 170", "2")) == "3+1"
    assert digit_split(("1", ",", "702")) == "1+,+3"
    assert glued((" 170", "2")) and not glued(("1", ",", "702"))


@pytest.mark.parametrize(
    ("clause", "kind"),
    [
        ("37 times 46 makes 1702.", "numbers"),
        ('The last token read is "9"; next comes ".".', "tokens"),
        ("37 × 46, and the token is “1”.", "numbers and tokens"),
        ("In the reply, at digit 2 of 4.", "neither"),
    ],
)
def test_kinds(clause: str, kind: str) -> None:
    assert kind_of(clause) == kind


def explained(n: int = 12, same: bool = False) -> list[Explained]:
    return [
        Explained(
            i, i, "first" if i % 2 else "last", "1x1" if same else f"{i // 4}x9", f"A{i}.\nB{i}.\nC{i}."
        )
        for i in range(n)
    ]


def test_partners_are_of_the_same_place_and_another_pair() -> None:
    entries = explained()
    partners = choose_partners(entries, 0)
    assert set(partners) == set(range(12)) and partners == choose_partners(entries, 0)
    for entry in entries:
        other = partners[entry.row]
        assert other.place == entry.place and other.cluster != entry.cluster
    assert choose_partners(explained(same=True), 0) == {}


def test_every_row_is_read_with_its_own_text_and_anothers() -> None:
    entries = explained()
    partners = choose_partners(entries, 0)
    readings = plan(entries, 0)
    assert [(r.row, r.variant) for r in readings] == [(n, v) for n in range(12) for v in ("whole", "another")]
    for own, other in zip(readings[::2], readings[1::2], strict=True):
        assert own.text == entries[own.row].text and own.partner is None
        assert other.partner == partners[own.row].row and other.text == entries[other.partner].text
    alone = plan(explained(same=True), 0)
    assert [r.variant for r in alone] == ["whole"] * 12


def test_tables_show_and_keep_numbers() -> None:
    table = Table(
        "t",
        "A | B",
        "n",
        ("place", "share", "of rows"),
        [("<b>|", Estimate(0.123456789, 0.1, 0.2, 3, 3), 4), ("x", UNKNOWN, 5), ("y", None, math.nan)],
    )
    parsed = list(csv.DictReader(io.StringIO(table.csv())))
    assert parsed[0] == {
        "place": "<b>|",
        "share": "0.123457",
        "share_low": "0.1",
        "share_high": "0.2",
        "of_rows": "4",
    }
    assert parsed[1]["share"] == "" and parsed[2]["of_rows"] == ""
    assert "| <b>\\| | 0.12 [0.10, 0.20] | 4 |" in table.markdown()
    assert "&lt;b&gt;|" in table.html() and "<b>" not in table.html()
    assert show(Estimate(-0.5, -0.6, -0.4, 1, 1)) == "−0.50 [−0.60, −0.40]" and show(-0.0001) == "0"
