"""Made-up requests to a chat model: many kinds, short and long, the same every time. No data set is needed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

_SUBJECTS = (
    "the tides", "a honeybee colony", "how bread rises", "the water cycle", "an old lighthouse", "the planet Saturn",
    "a compass", "glass making", "the history of paper", "why leaves change colour", "a steam engine", "coral reefs",
    "the game of chess", "a violin", "how vaccines work", "the Silk Road", "earthquakes", "a bicycle's gears",
    "photosynthesis", "the metric system", "a bakery at dawn", "sleep", "the invention of the telephone", "volcanoes",
)  # fmt: skip
_PEOPLE = (
    "Ada",
    "Bruno",
    "Chen",
    "Dalia",
    "Emeka",
    "Freya",
    "Goran",
    "Hana",
    "Ivo",
    "Jamila",
    "Kenji",
    "Lucia",
)
_PLACES = (
    "Lisbon",
    "Nairobi",
    "Osaka",
    "Quito",
    "Tromsø",
    "Adelaide",
    "Kraków",
    "Halifax",
    "Pune",
    "Marrakesh",
)
_DEEDS = (
    "missed the last train and walked home along the river",
    "found a letter from 1952 behind the kitchen cupboard",
    "repaired the clock that nobody had wound for years",
    "counted forty-one herons before the fog came in",
    "lost a bet about the weather and had to cook for everyone",
    "taught the neighbour's parrot to say good morning",
    "drew a map of every fountain in the old town",
    "carried nine boxes of books up four flights of stairs",
)
_FUNCTIONS = (
    "reverses a linked list", "checks whether a word is a palindrome", "merges two sorted lists",
    "counts the vowels in a text", "finds the largest prime below n", "parses a date such as 2024-03-09",
)  # fmt: skip


def chats(count: int) -> list[str]:
    """`count` user messages, of 5 to about 700 words; request i is the same for every count."""
    return [_message(np.random.default_rng(i)) for i in range(count)]


def chat_file(path: Path, count: int) -> Path:
    """The same as a prompt file, with one {"messages": [...]} per line."""
    records = ({"messages": [{"role": "user", "content": text}]} for text in chats(count))
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return path


def _message(rng: np.random.Generator) -> str:
    subject, other = rng.choice(_SUBJECTS, 2, replace=False)
    person = rng.choice(_PEOPLE)
    a, b = rng.integers(3, 100, 2)
    kinds = (
        f"Explain {subject} in two sentences.",
        f"Write a short poem about {subject}.",
        f"List three facts about {subject}.",
        f"What is {a} plus {b}? Answer with the number alone.",
        f"{person} has {a} marbles and gives away {min(a, b)}. How many are left?",
        f"Write a Python function that {rng.choice(_FUNCTIONS)}.",
        f"Compare {subject} with {other}: one thing they share, one in which they differ.",
        f"Who in this text went furthest, and why do you think so?\n\n{_story(rng)}",
        f"Summarise in one sentence:\n\n{_story(rng)}",
        f"Translate into French: {person} {rng.choice(_DEEDS)}.",
        f"Is {subject} mentioned in this text? Answer yes or no.\n\n{_story(rng)}",
        f"Give {person} one piece of advice about {subject}, then say goodbye.",
    )
    return str(rng.choice(kinds))


def _story(rng: np.random.Generator) -> str:
    """2 to 40 sentences; short stories are more frequent."""
    sentences = int(np.exp(rng.uniform(np.log(2), np.log(40))))
    return " ".join(
        f"In {rng.choice(_PLACES)}, {rng.choice(_PEOPLE)} {rng.choice(_DEEDS)} on day {rng.integers(1, 366)}."
        for _ in range(sentences)
    )
