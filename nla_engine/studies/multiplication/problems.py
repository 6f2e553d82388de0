"""The multiplications that a study asks: operands from two ranges, in several phrasings, seeded.

Uses the wordings of the demo's questions, which any chat model understands, and the demo's split of operand pairs.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from nla_engine.demo.problems import OPERAND_LIMIT, PHRASINGS, TIMES_KEYS, held_out_pairs
from nla_engine.errors import RequestError


@dataclass(frozen=True)
class Multiplication:
    """Two operands in the order of the question, and the key of its phrasing."""

    a: int
    b: int
    phrasing: str

    @property
    def pair(self) -> tuple[int, int]:
        """The unordered pair, smaller operand first."""
        return min(self.a, self.b), max(self.a, self.b)

    def record(self, number: int) -> dict[str, object]:
        """The problem as a record of a prompts file. `pair` names its unordered pair, for statistics."""
        return {
            "messages": [
                {"role": "user", "content": PHRASINGS[self.phrasing].question.format(a=self.a, b=self.b)}
            ],
            "problem": number,
            "a": self.a,
            "b": self.b,
            "product": self.a * self.b,
            "phrasing": self.phrasing,
            "pair": "{}x{}".format(*self.pair),
        }


def draw_problems(
    count: int, seed: int, a: range, b: range, phrasings: tuple[str, ...] = TIMES_KEYS, split: str = "any"
) -> list[Multiplication]:
    """`count` different problems. No unordered pair repeats before every pair has come once.

    a, b: the values of the first and second operand. split: "held_out" or "trained" keeps the pairs that the bundled
    verbalizer and reconstructor never saw, or saw. RequestError if the ranges hold fewer problems.
    """
    rng = random.Random(seed)
    out: list[Multiplication] = []
    seen: set[Multiplication] = set()
    for pairs in _rounds(rng, a, b, split):
        before = len(out)
        for low, high in pairs:
            orders = [(x, y) for x, y in {(low, high), (high, low)} if x in a and y in b]
            choices = [Multiplication(x, y, key) for x, y in sorted(orders) for key in phrasings]
            problem = rng.choice(choices)
            if problem in seen:
                left = [choice for choice in choices if choice not in seen]
                if not left:
                    continue
                problem = rng.choice(left)
            seen.add(problem)
            out.append(problem)
            if len(out) == count:
                return out
        if len(out) == before:
            break
    raise RequestError(
        f"--problems {count}: operands {_span(a)} times {_span(b)} ({split.replace('_', ' ')} pairs, {len(phrasings)} "
        f"phrasings) give {len(out)} different problems: ask for fewer or widen --first, --second or --phrasings"
    )


def _rounds(rng: random.Random, a: range, b: range, split: str) -> Iterator[Iterator[tuple[int, int]]]:
    """Endless rounds, each over every unordered pair once, in random order."""
    if split != "any" or len(a) * len(b) <= 1_000_000:
        pairs = sorted(
            {(min(x, y), max(x, y)) for x in a for y in b if split == "any" or _split(x, y) == split}
        )
        while True:
            rng.shuffle(pairs)
            yield iter(pairs)
    while True:  # too many to list: drawn one by one
        yield _drawn(rng, a, b)


def _drawn(rng: random.Random, a: range, b: range) -> Iterator[tuple[int, int]]:
    drawn: set[tuple[int, int]] = set()
    while len(drawn) < len(a) * len(b) // 4:
        x, y = rng.choice(a), rng.choice(b)
        pair = (min(x, y), max(x, y))
        if pair not in drawn:
            drawn.add(pair)
            yield pair


def _split(x: int, y: int) -> str:
    return "held_out" if (min(x, y), max(x, y)) in held_out_pairs() else "trained"


def parse_range(text: str, flag: str) -> range:
    """The values of "10-99" or "7". RequestError names the flag."""
    low, _, high = text.partition("-")
    if (
        not (low.isascii() and low.isdigit())
        or (high and not (high.isascii() and high.isdigit()))
        or "-" in high
    ):
        raise RequestError(f"{flag} is {text!r}: it must be a range of whole numbers such as 10-99")
    out = range(int(low), int(high or low) + 1)
    if not out or out[-1] >= 10**7:
        raise RequestError(f"{flag} is {text!r}: it must rise, and end below 10,000,000")
    return out


def parse_phrasings(text: str) -> tuple[str, ...]:
    """Keys of phrasings from "what,command". RequestError for an unknown one."""
    keys = tuple(dict.fromkeys(key.strip() for key in text.split(",")))
    if unknown := [key for key in keys if key not in TIMES_KEYS]:
        raise RequestError(
            f"--phrasings: {unknown[0]!r} is unknown; choose from {', '.join(TIMES_KEYS)}, joined by commas"
        )
    return keys


def check_bundled(a: range, b: range) -> None:
    """RequestError for operands that the bundled models cannot multiply."""
    for flag, values in (("--first", a), ("--second", b)):
        if values[-1] >= OPERAND_LIMIT:
            raise RequestError(
                f"{flag} reaches {values[-1]}: the bundled models know operands below {OPERAND_LIMIT}; "
                "give others with --model, --av, --ar and --layer"
            )


def _span(values: range) -> str:
    return f"{values[0]}-{values[-1]}"
