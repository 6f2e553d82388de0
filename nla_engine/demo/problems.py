"""The problems of the demo models: two operands of 0..99, several phrasings, one reply form per phrasing.

The split is by unordered pair: if 37 and 46 are held out, neither "37 x 46" nor "46 x 37", in any phrasing
or operation, is ever shown to the verbalizer and the reconstructor. The base model is trained on all pairs,
as a real language model has seen the text it is asked about.
"""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass

OPERAND_LIMIT = 100
HELD_OUT_SHARE = 0.1
SPLIT_SEED = 20240  # fixed: another seed for training must not move pairs between the two halves

SIGNS = {"times": "×", "plus": "+", "minus": "-"}
RESULT_NAMES = {"times": "product", "plus": "sum", "minus": "difference"}


@dataclass(frozen=True)
class Phrasing:
    """One way to ask and to answer; `question` and `reply` hold the fields {a}, {b} and {r} (the result).

    The reply form is a function of the phrasing, so that the greedy reply of a good model is determined.
    """

    key: str
    operation: str
    kind: str  # what an explanation calls the question
    question: str
    reply: str


# The reply forms name the operands late, or again: the residual stream then needs them until the end.
PHRASINGS = {
    phrasing.key: phrasing
    for phrasing in (
        Phrasing("what", "times", "a what-is question", "What is {a} × {b}?", "{a} × {b} = {r}."),
        Phrasing("command", "times", "a command", "Multiply {a} by {b}.", "{r} = {a} × {b}."),
        Phrasing(
            "find",
            "times",
            "a find request",
            "Find the product of {a} and {b}.",
            "The product of {a} and {b} is {r}.",
        ),
        Phrasing("formula", "times", "a bare formula", "{a} × {b} = ?", "It is {r}."),
        Phrasing(
            "much", "times", "a how-much question", "How much is {a} times {b}?", "{r} is {a} times {b}."
        ),
        Phrasing(
            "story",
            "times",
            "a word problem",
            "I have {a} boxes of {b} pens. How many pens?",
            "{r} pens, as {a} × {b} = {r}.",
        ),
        Phrasing("what_plus", "plus", "a what-is question", "What is {a} + {b}?", "{a} + {b} = {r}."),
        Phrasing("add", "plus", "a command", "Add {a} and {b}.", "{r} = {a} + {b}."),
        Phrasing("what_minus", "minus", "a what-is question", "What is {a} - {b}?", "{a} - {b} = {r}."),
    )
}
TIMES_KEYS = tuple(key for key, phrasing in PHRASINGS.items() if phrasing.operation == "times")
OTHER_KEYS = tuple(key for key, phrasing in PHRASINGS.items() if phrasing.operation != "times")


@functools.cache
def held_out_pairs() -> frozenset[tuple[int, int]]:
    """The unordered pairs, smaller operand first, that AV and AR never see: 505 of 5,050."""
    pairs = [(a, b) for a in range(OPERAND_LIMIT) for b in range(a, OPERAND_LIMIT)]
    random.Random(SPLIT_SEED).shuffle(pairs)
    return frozenset(pairs[: round(len(pairs) * HELD_OUT_SHARE)])


@dataclass(frozen=True)
class Problem:
    """Two operands (0..99) in the order of the question, and the key of the phrasing."""

    a: int
    b: int
    phrasing_key: str = "what"

    def __post_init__(self) -> None:
        if not (0 <= self.a < OPERAND_LIMIT and 0 <= self.b < OPERAND_LIMIT):
            raise ValueError(f"operands {self.a} and {self.b} must lie in 0..{OPERAND_LIMIT - 1}")
        if self.phrasing_key not in PHRASINGS:
            raise ValueError(f"phrasing {self.phrasing_key!r} is none of {', '.join(PHRASINGS)}")

    @property
    def phrasing(self) -> Phrasing:
        return PHRASINGS[self.phrasing_key]

    @property
    def operation(self) -> str:
        return self.phrasing.operation

    @property
    def result(self) -> int:
        """The product (or sum, or difference a - b)."""
        if self.operation == "times":
            return self.a * self.b
        return self.a + self.b if self.operation == "plus" else self.a - self.b

    @property
    def question(self) -> str:
        return self.phrasing.question.format(a=self.a, b=self.b)

    @property
    def reply(self) -> str:
        return self.phrasing.reply.format(a=self.a, b=self.b, r=self.result)

    @property
    def split(self) -> str:
        """ "held_out" or "trained", by the unordered pair."""
        return "held_out" if (min(self.a, self.b), max(self.a, self.b)) in held_out_pairs() else "trained"


def all_problems(keys: tuple[str, ...], split: str | None = None) -> list[Problem]:
    """Every ordered pair in every phrasing of `keys`, in a fixed order; `split` keeps one half only."""
    problems = (
        Problem(a, b, key) for key in keys for a in range(OPERAND_LIMIT) for b in range(OPERAND_LIMIT)
    )
    return [problem for problem in problems if split is None or problem.split == split]


def sample_problems(n: int, seed: int, split: str, keys: tuple[str, ...] = TIMES_KEYS) -> list[Problem]:
    """n problems of one split without repetition (all of them if there are fewer), seeded."""
    problems = all_problems(keys, split)
    random.Random(seed).shuffle(problems)
    return problems[:n]


def held_out_problems(n: int, seed: int = 0) -> list[Problem]:
    """n multiplications, phrasings mixed, whose operand pairs AV and AR never saw."""
    return sample_problems(n, seed, "held_out")


def prompt_record(problem: Problem) -> dict[str, object]:
    """The problem as one record of a prompts file: chat messages, plus the facts to check a reply against."""
    return {
        "messages": [{"role": "user", "content": problem.question}],
        "a": problem.a,
        "b": problem.b,
        "product": problem.result,
        "split": problem.split,
    }


def follow_ups(problem: Problem) -> list[tuple[str, str]]:
    """Second turns as (question, reply): they need the operands of the first turn and do not repeat them."""
    a, b, sign, result = problem.a, problem.b, SIGNS[problem.operation], problem.result
    swapped = b - a if problem.operation == "minus" else result
    return [
        ("Which numbers?", f"{a} and {b}."),
        ("Say it again.", f"{a} {sign} {b} = {result}."),
        ("Now swap them.", f"{b} {sign} {a} = {swapped}."),
        ("Now add them.", f"{a} + {b} = {a + b}."),
        ("Now multiply them.", f"{a * b} = {a} × {b}."),
    ]
