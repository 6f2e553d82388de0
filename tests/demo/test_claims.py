"""What texts say about numbers: plain wordings, ugly ones, and texts made to break a regular expression."""

from __future__ import annotations

import time

import numpy as np
import pytest

from nla_engine.demo.claims import answer_claims, find_answer, numbers_in, operands_named, read_claims

NUMBERS = {
    "37 × 46 = 1702": {37, 46, 1702},
    "1,702 and 12,345,678": {1702, 12345678},
    "3.14, v2, Qwen2, 2nd, x_7 and 7_": set(),
    "37x46": {37, 46},
    "at digit 2 of 4 of the product": set(),
    "step 3 out of 10, a 4-digit product, 2 digits": set(),
    "(37)*[46]={1702}.": {37, 46, 1702},
    "９ and ٣ and ²": set(),
    "1" * 16: set(),
    "0": {0},
    "ends.\n1702\n": {1702},
    "": set(),
}


@pytest.mark.parametrize("text", NUMBERS)
def test_numbers(text: str) -> None:
    assert numbers_in(text) == NUMBERS[text]


TOKENS = {
    'The last token read is "9"; next comes "7".': ({"9"}, {"7"}),
    'Next comes "7"; the last token read is "9".': ({"9"}, {"7"}),
    'Final token "1" is mid-number, likely followed by "7" or "8".': ({"1"}, {"7", "8"}),
    "The digit 4 was read. “3” comes next": ({"4"}, {"3"}),
    "after `17` one expects '0'": ({"17"}, {"0"}),
    "digit 2 of 4": (set(), set()),
    'the phrase "37 × 46" and "next"': (set(), set()),
    'The text ends in "5". The reader expects more. The token is "6".': ({"5", "6"}, set()),
    '"""""" next "" token': (set(), set()),
}


@pytest.mark.parametrize("text", TOKENS)
def test_tokens(text: str) -> None:
    named = read_claims(text)
    assert (named.reads, named.nexts) == TOKENS[text]


def test_a_claim_of_one_digit_names_no_number() -> None:
    named = read_claims('32 times 93 makes 2976. The last token read is "9"; next comes "17".')
    assert named.numbers == {32, 93, 2976, 17} and named.operands == (32, 93)
    assert read_claims('3 "4" × 5').operands is None, "a claim was taken out of the middle of an expression"


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("the product of 37 and 46", (37, 46)),
        ("37 \\times 46", (37, 46)),
        ("37 multiplied by 46", (37, 46)),
        ("37 boxes of 46 pens", (37, 46)),
        ("1,200*5", (1200, 5)),
        ("**37** × 46", None),
        ("37, 46", None),
        ("37 and nothing", None),
    ],
)
def test_operands(text: str, pair: tuple[int, int] | None) -> None:
    assert operands_named(text) == pair


ANSWERS = {
    "37 × 46 = 1702.": 1702,
    "1702 = 37 × 46.": 1702,
    "It is 1702.": 1702,
    "The answer is **1,702**.": 1702,
    r"So \(37 \times 46 = \boxed{1702}\).": 1702,
    "1. 40 × 46 = 1840\n2. 4 × 46 = 184\n3. 1840 - 184 = 1656": 1656,
    "1702": 1702,
    "5 - 9 = -4.": -4,
    "It is 37 × 46.": None,
    "1. First, think about 37.": None,
    "I cannot say.": None,
    "": None,
}


@pytest.mark.parametrize("reply", ANSWERS)
def test_answers(reply: str) -> None:
    found = find_answer(reply)
    assert (None if found is None else found.value) == ANSWERS[reply]
    if found is not None:
        assert int(reply[found.start : found.end].replace(",", "")) == found.value


def test_an_answer_stands_where_it_is_claimed_first() -> None:
    reply = "1702 pens, as 37 × 46 = 1702."
    assert [claim.start for claim in answer_claims(reply)] == [0, 24]
    found = find_answer(reply)
    assert found is not None and found.start == 0


def test_no_text_breaks_the_readers(rng: np.random.Generator) -> None:
    letters = list("0123456789.,'\"× x*=-()\\\nnextdigit token{}is\ud800é")
    for _ in range(300):
        text = "".join(rng.choice(letters, rng.integers(0, 120)))
        read_claims(text), answer_claims(text), find_answer(text)


@pytest.mark.parametrize(
    "text", ["1," * 50_000, '"1' * 50_000, "9 × " * 30_000, "= (" * 40_000, "token " * 30_000]
)
def test_long_texts_take_little_time(text: str) -> None:
    start = time.process_time()
    read_claims(text), answer_claims(text)
    assert time.process_time() - start < 20
