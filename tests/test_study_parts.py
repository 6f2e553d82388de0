"""The parts of the multiplication study: problems, places of an answer, changed texts, tables and the reading."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import replace

import numpy as np
import pytest

from nla_engine.demo.problems import TIMES_KEYS, held_out_pairs
from nla_engine.engine.request import Finish
from nla_engine.errors import RequestError
from nla_engine.store.sequences import StoredSequence, Vocabulary
from nla_engine.studies.analysis import ALL, Contrast, Finding, Origin
from nla_engine.studies.answers import _read, digit_split, glued
from nla_engine.studies.clauses import Clause, kind_of
from nla_engine.studies.figures import figures_of
from nla_engine.studies.intervals import UNKNOWN, Estimate
from nla_engine.studies.outcome import Outcome, Setup
from nla_engine.studies.present import csv_tables, section_html, shown_tables
from nla_engine.studies.problems import draw_problems, parse_phrasings, parse_range
from nla_engine.studies.reading import read_outcome
from nla_engine.studies.reread import Explained, choose_partners, clauses, join, plan
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
    with pytest.raises(RequestError, match="'add' is none; choose of what"):
        parse_phrasings("what,add")


def sequence(
    pieces: list[str | bytes], record: dict[str, object], finish: Finish = Finish.EOS, prompt: int = 2
):
    """A stored sequence of `prompt` prompt tokens and one token for each piece of the reply; and the row positions."""
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
    """The prompt's last token comes before it. Tokens of three digits; no EOS; the answer stands twice."""
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


TEXTS = {
    "One.\nTwo.\n\nThree.": ["One.", "Two.", "Three."],
    "One. Two? “Three!” 4 × 5. v1.5 is one.": ["One.", "Two?", "“Three!”", "4 × 5. v1.5 is one."],
    "no sentence": ["no sentence"],
    " \n ": [],
    "": [],
}


@pytest.mark.parametrize("text", TEXTS)
def test_clauses(text: str) -> None:
    parts = clauses(text)
    assert [part for part in parts if part] == TEXTS[text]
    assert "".join(join(text, parts).split()) == "".join(text.split()), "nothing is lost"


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


def test_plan_changes_one_clause_at_a_time() -> None:
    entries = explained()
    readings = plan(entries, lambda entry: entry.row == 5, 0)
    assert [r.row for r in readings] == sorted(r.row for r in readings)
    assert [r.variant for r in readings if r.row == 0] == ["whole", "another"]
    partner = choose_partners(entries, 0)[5].row
    texts = {(r.variant, r.unit): r.text for r in readings if r.row == 5}
    assert texts["whole", None] == "A5.\nB5.\nC5." and texts["another", None] == entries[partner].text
    assert texts["removed", 1] == "A5.\nC5." and texts["alone", 1] == "B5."
    assert texts["swapped", 1] == f"A5.\nB{partner}.\nC5." and len(texts) == 2 + 3 * 3


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


def at(value: float, half: float = 0.02) -> Estimate:
    return Estimate(value, value - half, value + half, 100, 50)


def outcome(**changes: object) -> Outcome:
    """An outcome in which everything works."""
    score = {"fve": (0.8, -0.5), "top1": (0.9, 0.01), "top1_place": (0.9, 0.02)}
    named = {"operands": (0.9, 0.0), "product": (0.7, 0.0), "read": (0.9, 0.1), "coming": (0.8, 0.1)}
    findings = [
        Finding(place, measure, at(own), at(control), at(control), at(own - control, 0.04))
        for place in ("first", "middle", "last", "end")
        for measure, (own, control) in {**score, **named, "other": (0.2, 1.0)}.items()
    ]
    by_kind = [
        Clause(ALL, kind, kind, 90, at(0.8), at(removed), at(swapped), at(0.1))
        for kind, removed, swapped in (("numbers", 1.0, 1.0), ("tokens", 1.0, 0.2))
    ]
    by_number = [replace(entry, clause=f"{i} of 2") for i, entry in enumerate(by_kind, 1)]
    base = Outcome(
        setup=Setup(("m", "v", "r"), False, 20, "10-99", "10-99", "any", 0, 4, 0.7),
        problems=100,
        pairs=100,
        right=60,
        unanswered=0,
        rows=500,
        early_rows=0,
        status_ok=1.0,
        variance=0.7,
        variance_rows=500,
        control_rows=500,
        accuracy=[("all", "all problems", at(0.6))],
        tokenisation=[(4, "1+1+1+1", 100, at(1.0), at(0.0))],
        findings=findings,
        correctness=[Contrast(ALL, "operands", at(0.9), at(0.5), at(0.4))],
        detection=[(Contrast(ALL, "fve", at(0.9), at(0.2), at(0.7)), at(0.95))],
        origins=[Origin("other", 50, at(0.05), at(0.9))],
        agreement=[],
        by_number=by_number,
        by_kind=by_kind,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def reading(**changes: object) -> str:
    return " ".join(read_outcome(outcome(**changes)))


def with_margin(measure: str, value: float, places: tuple[str, ...] = ("first", "middle", "last", "end")):
    """The findings of `outcome`, with another margin of one measure."""
    return [
        replace(f, margin=at(value, 0.04)) if f.measure == measure and f.place in places else f
        for f in outcome().findings
    ]


#: What is changed in `outcome`, what the reading then says, and what it then does not say.
READINGS: dict[str, tuple[dict[str, object], str, str]] = {
    "all carry": (
        {},
        "more of their own vector than those of other problems at every place (FVE 0.80)",
        "At no place",
    ),
    "none carries": (
        {"findings": with_margin("fve", 0.01)},
        "At no place do explanations carry measurably more",
        "carry more of their own",
    ),
    "one does not": (
        {"findings": with_margin("fve", 0.01, ("end",))},
        "At “end of reply” no difference could be shown",
        "At no place",
    ),
    "operands by chance": (
        {"findings": with_margin("operands", 0.03)},
        "do not name both true operands more often",
        "Explanations name both true operands more often than",
    ),
    "others by chance": (
        {"findings": with_margin("other", 0.0)},
        "such numbers are no evidence",
        "That is rarer",
    ),
    "product of the words": ({}, "the verbalizer multiplied by itself", "Which of the two"),
    "product of the vector": (
        {"origins": [Origin("other", 50, at(0.9), at(0.05))]},
        "read from the vector",
        "multiplied by itself",
    ),
    "product of neither": (
        {"origins": [Origin("other", 50, at(0.5), at(0.49))]},
        "Which of the two is the rule",
        "multiplied by itself",
    ),
    "few wrong operands": (
        {"origins": []},
        "fewer than 10 explanations state wrong operands",
        "multiplied by itself",
    ),
    "FVE sorts": ({}, "A threshold on FVE sorts them usefully", "not closely enough"),
    "FVE hints": (
        {"detection": [(outcome().detection[0][0], at(0.7))]},
        "not closely enough to trust",
        "sorts them usefully",
    ),
    "FVE is blind": (
        {"detection": [(outcome().detection[0][0], at(0.51))]},
        "does not tell true numbers from false",
        "usefully",
    ),
    "better when right": (
        {},
        "both true operands more often where the model is right",
        "model answers right cannot",
    ),
    "too few wrong": (
        {"correctness": [], "right": 98},
        "cannot be told: 2 of 100 replies are wrong",
        "where the model is right",
    ),
    "the same when wrong": (
        {"correctness": [Contrast(ALL, "operands", at(0.9), at(0.89), at(0.01))]},
        "both true operands without a difference that could be shown",
        "where the model is right",
    ),
    "one clause carries": (
        {},
        "stands in the clauses about numbers",
        "The intervals of the first two overlap",
    ),
    "form matters": (
        {},
        "Leaving out costs more than swapping for clauses about tokens",
        "Leaving out costs more than swapping for clauses about numbers",
    ),
    "early rows": ({"early_rows": 7}, "7 of the 500 rows stand at positions below 50", "At no place"),
    "texts cut": ({"status_ok": 0.5}, "Only 0.50 of the explanations were closed", "At no place"),
}


@pytest.mark.parametrize("case", READINGS)
def test_the_reading_follows_the_numbers(case: str) -> None:
    changes, says, says_not = READINGS[case]
    text = reading(**changes)
    assert says in text and says_not not in text


def test_what_is_shown_is_escaped_and_complete() -> None:
    hostile = outcome(by_number=[replace(outcome().by_number[0], clause="<script>1 of 1", about="x")])
    markup = section_html(["<script>alert(1)</script>"], shown_tables(hostile), [], None)  # type: ignore[arg-type]
    assert "<script" not in markup and "&lt;script&gt;" in markup
    names = [table.name for table in csv_tables(outcome())]
    assert names == [
        "measures",
        "accuracy",
        "tokenisation",
        "trust",
        "origin",
        "correctness",
        "clauses",
        "clause_kinds",
    ]
    assert [figure.name for figure in figures_of(outcome())] == ["scores", "naming", "clauses", "trust"]


def test_readings_of_a_growing_difference_change_once() -> None:
    """From no margin to a clear one, the claim appears and stays."""
    claims = ["carry more of their own" in reading(findings=with_margin("fve", m / 100)) for m in range(12)]
    assert claims == sorted(claims) and set(claims) == {False, True}
