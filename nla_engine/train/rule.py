"""Texts by rule for a warm start: what can be read off a row's context and off the model's own next tokens.

They say the kind of text, its subject words, its last tokens, and which tokens the model finds likely next. They know
nothing of the vector: an AV that is trained on them learns to say what a vector's context was, in a form that an AR
can read. Reinforcement then rewards whatever brings the vector back.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from nla_engine.errors import RequestError
from nla_engine.roundtrip.verbalize import CLOSE_TAG, OPEN_TAG
from nla_engine.store import CaptureStore, RowFlag
from nla_engine.store.sequences import StoredSequence

#: Tokens that a text quotes, and likely next tokens that it names.
QUOTED, NEXT = 10, 3
#: From these probabilities on a next token is called sure, or is named at all.
_SURE, _LIKELY = 0.8, 0.04
_SUBJECTS = 3
_WORD = re.compile(rb"[A-Za-z][A-Za-z'-]{3,}")
#: Bytes before a row that its kind is told from.
_NEAR = 240
_CODE = re.compile(
    r"^\s*(def |class |import |from \w+ import|return\b|for .*:$|if .*:$|>>> |#include|\}|\w+\(.*\);?$)"
)
#: How chat templates begin a message; the word is its role.
_ROLE = re.compile(rb"<\|im_start\|>(\w+)|<start_of_turn>(\w+)|<\|start_header_id\|>(\w+)")
_SPECIAL = re.compile(r"<\|(.*?)\|>")

_OPENINGS = ("{kind} about {subjects}.", "{subjects}: {kind}.", "This is {kind}; it is about {subjects}.")
_BARE = ("{kind}.", "This is {kind}.")
_SAID = ('It has just said "{said}".', 'Just now: "{said}".', 'So far it ends with "{said}".')
_LAST = ('The last token is "{last}"', 'It stands at "{last}"', 'The token read is "{last}"')
_SURELY = (' and "{next}" comes next.', ', surely followed by "{next}".', '; next is "{next}".')
_MAYBE = (" and next may come {next}.", ", likely followed by {next}.", "; next is perhaps {next}.")
_OPEN = (" and what comes next is open.", ", and much may follow.", "; the next token is open.")


def rule_texts(store: CaptureStore, rows: np.ndarray, seed: int) -> list[str]:
    """One text for each of these rows, int64 [n]. The wording is drawn by seed, sequence and position.

    RequestError if the store does not say which tokens follow, or not what was read.
    """
    if not store.next_token:
        raise RequestError(
            f"{store.path}: keeps no likely next tokens, which texts by rule name: capture it with --next-token "
            f"{NEXT}, or give --texts"
        )
    order = np.argsort(store.column("sequence")[rows], kind="stable")
    found = [""] * len(rows)
    weight = _rarity(store, np.unique(store.column("sequence")[rows]))
    writer = _Rule(store, weight, seed)
    for sequence, places in _by_sequence(store, rows, order):
        for place, text in zip(places.tolist(), writer.texts(sequence, rows[places]), strict=True):
            found[place] = text
    return found


def _by_sequence(
    store: CaptureStore, rows: np.ndarray, order: np.ndarray
) -> Iterator[tuple[StoredSequence, np.ndarray]]:
    """Each sequence with the places of its rows, by position. order: places by the number of the sequence"""
    numbers = store.column("sequence")[rows[order]]
    edges = np.flatnonzero(np.diff(numbers, prepend=-1))
    position = store.column("position")
    for sequence, places in zip(
        store.some_sequences(numbers[edges]), np.split(order, edges[1:]), strict=True
    ):
        yield sequence, places[np.argsort(position[rows[places]], kind="stable")]


def _words(text: bytes) -> Iterator[tuple[str, int]]:
    """Words in lower case, each with the byte at which it ends."""
    for found in _WORD.finditer(text):
        yield found[0].decode().lower(), found.end()


def _rarity(store: CaptureStore, sequences: np.ndarray) -> dict[str, float]:
    """log(sequences / sequences that have the word), by word."""
    held: Counter[str] = Counter()
    for sequence in store.some_sequences(sequences):
        held.update({word for word, _ in _words(_bytes(sequence)[0])})
    return {word: math.log(len(sequences) / count) for word, count in held.items()}


def _bytes(sequence: StoredSequence) -> tuple[bytes, np.ndarray]:
    """The text of a sequence, and at which byte each token ends, int64 [t]."""
    parts = [sequence.vocabulary.raw(token) for token in sequence.tokens.tolist()]
    return b"".join(parts), np.cumsum([len(part) for part in parts])


class _Rule:
    """Writes the texts of rows. rarity: of each word"""

    def __init__(self, store: CaptureStore, rarity: dict[str, float], seed: int) -> None:
        self.rarity, self.seed = rarity, seed
        self.position, self.flags = store.column("position"), store.column("flags")
        self.top, self.logprob = store.column("top_id"), store.column("top_logprob")

    def texts(self, sequence: StoredSequence, rows: np.ndarray) -> Iterator[str]:
        """Those of rows of one sequence, by position."""
        whole, ends = _bytes(sequence)
        words = list(_words(whole))
        counts: Counter[str] = Counter()
        taken = 0
        for row in rows.tolist():
            position = int(self.position[row])
            end = int(ends[position])
            while taken < len(words) and words[taken][1] <= end:
                counts[words[taken][0]] += 1
                taken += 1
            draw = np.random.default_rng([self.seed, sequence.number, position])
            near = whole[max(end - _NEAR, 0) : end].decode(errors="replace")
            kind = kind_of(near, self._where(row, whole[:end]))
            subjects = self._subjects(counts)
            said = sequence.vocabulary.join(sequence.tokens[max(position + 1 - QUOTED, 0) : position + 1])
            last = sequence.vocabulary.text(int(sequence.tokens[position]))
            opening = _one(draw, _OPENINGS if subjects else _BARE).format(kind=kind, subjects=subjects)
            after = self._next(draw, sequence, row)
            parts = (
                opening[0].upper() + opening[1:],
                _one(draw, _SAID).format(said=_shown(said)),
                _one(draw, _LAST).format(last=_shown(last)) + after,
            )
            yield " ".join(parts)

    def _where(self, row: int, before: bytes) -> str:
        """What the row is a part of: a message of the role that the chat template named last, or some text."""
        roles = _ROLE.findall(before)
        if roles:
            return "a reply" if {b"assistant", b"model"} & set(roles[-1]) else "a request"
        return "a reply" if self.flags[row] & RowFlag.GENERATED else "a text"

    def _subjects(self, counts: Counter[str]) -> str:
        """The words that the context has most and other sequences least."""
        weights = {word: count * self.rarity.get(word, 0.0) for word, count in counts.items()}
        best = sorted(weights, key=lambda word: (-weights[word], word))[:_SUBJECTS]
        return ", ".join(word for word in best if weights[word] > 0)

    def _next(self, draw: np.random.Generator, sequence: StoredSequence, row: int) -> str:
        chances = np.exp(self.logprob[row].astype(np.float64))
        tokens = [_shown(sequence.vocabulary.text(int(token))) for token in self.top[row]]
        if chances[0] >= _SURE:
            return _one(draw, _SURELY).format(next=tokens[0])
        likely = [
            token for token, chance in zip(tokens[:NEXT], chances.tolist(), strict=False) if chance >= _LIKELY
        ]
        if not likely:
            return _one(draw, _OPEN)
        named = [f'"{token}"' for token in likely]
        listed = named[0] if len(named) == 1 else f"{', '.join(named[:-1])} or {named[-1]}"
        return _one(draw, _MAYBE).format(next=listed)


def kind_of(near: str, where: str) -> str:
    """The kind of a text in words, by what it ends with. where: what it is a part of"""
    lines = near.split("\n")
    line = lines[-1]
    inside = [each for each in lines if each.strip()]
    if sum(bool(_CODE.match(each)) for each in inside) * 3 > len(inside):
        return f"{where}, in code"
    if re.match(r"\s*\d+[.)]", line):
        return f"{where}, in a numbered list"
    if re.match(r"\s*[-*•] ", line):
        return f"{where}, in a list"
    if re.match(r"\s*(#|\*\*)", line):
        return f"{where}, in a heading"
    if not line.strip():
        return f"{where}, at the start of a line"
    digits = sum(letter.isdigit() for letter in line[-60:])
    if digits * 4 > len(line[-60:]):
        return f"{where}, in numbers"
    if line.count('"') % 2:
        return f"{where}, in quoted words"
    if line.rstrip().endswith("?"):
        return f"{where}, behind a question"
    if line.rstrip()[-1:] in ".!:":
        return f"{where}, at the end of a sentence"
    return f"{where}, inside a sentence"


def _shown(text: str) -> str:
    """A text as it is quoted: line breaks as \\n, special tokens as words in brackets, no tags of an explanation."""
    text = _SPECIAL.sub(r"[\1]", text)
    for tag in (OPEN_TAG, CLOSE_TAG):
        text = text.replace(tag, "")
    return text.replace("\n", "\\n")


def _one(draw: np.random.Generator, wordings: Sequence[str]) -> str:
    return wordings[int(draw.integers(len(wordings)))]
