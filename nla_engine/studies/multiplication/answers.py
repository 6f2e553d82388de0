"""Where the answer is in each reply: which row read its first, its middle, its last digit, and what came after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from nla_engine.demo.claims import Number, find_answer, numbers_in
from nla_engine.engine.request import Finish
from nla_engine.store import CaptureStore
from nla_engine.store.sequences import StoredSequence

#: Places of a row in or beside the answer, in reading order, and their labels. "only": an answer of one token.
PLACES = {
    "before": "token before",
    "first": "first digit",
    "middle": "middle digits",
    "last": "last digit",
    "only": "whole answer",
    "after": "token after",
    "end": "end of reply",
}


@dataclass(frozen=True)
class Spot:
    """A row's relation to the answer. read, coming: digits of the answer token just read, and of the next."""

    place: str
    read: str | None = None
    coming: str | None = None


@dataclass(frozen=True)
class Reply:
    """One problem's reply. answer: the number it claims, or None. pieces: the texts of the tokens that hold the answer.

    spots: row of the store -> its place. known: numbers that a true text may name: operands, product and every number
    of the conversation. written: row -> the answer as written so far, which a text may name too.
    """

    sequence: int
    record: dict[str, object]
    answer: int | None
    pieces: tuple[str, ...]
    spots: dict[int, Spot]
    known: frozenset[int]
    written: dict[int, int]

    @property
    def correct(self) -> bool:
        return self.answer == self.record["product"]

    @property
    def pair(self) -> str:
        """Its unordered operand pair: the cluster of its rows."""
        return str(self.record["pair"])


def read_replies(store: CaptureStore) -> list[Reply]:
    """Every sequence of a store whose prompts are `Multiplication.record`s."""
    positions = store.column("position")
    return [_read(sequence, positions) for sequence in store.iter_sequences()]


def places_of(replies: Sequence[Reply]) -> dict[int, str]:
    """Place by row, of the rows in and beside the answers."""
    return {row: spot.place for reply in replies for row, spot in reply.spots.items()}


def clusters_of(replies: Sequence[Reply]) -> dict[int, str]:
    """Operand pair by sequence."""
    return {reply.sequence: reply.pair for reply in replies}


def _read(sequence: StoredSequence, positions: np.ndarray) -> Reply:
    record = dict(sequence.source)
    start, size = sequence.prompt_size, len(sequence.tokens)
    tokens = sequence.tokens[start:]
    # Bytes that are not UTF-8 survive as surrogates, so that places in the text map back to tokens.
    raw = [sequence.vocabulary.raw(int(token)) for token in tokens]
    reply = b"".join(raw).decode(errors="surrogateescape")
    end_text = raw[-1].decode(errors="surrogateescape") if raw and sequence.finish is Finish.EOS else ""
    answer = find_answer(reply.removesuffix(end_text).rstrip())
    known = {int(str(record[key])) for key in ("a", "b", "product")} | numbers_in(sequence.text())
    if answer is None:
        return Reply(sequence.number, record, None, (), {}, frozenset(known), {})
    inside = _tokens_of(raw, reply, answer)
    digits = [place for place in inside if _digits(raw[place])]
    texts = {start + place: _digits(raw[place]) for place in digits}
    row_of = {
        int(position): sequence.rows.start + index for index, position in enumerate(positions[sequence.rows])
    }
    spots = {
        row_of[position]: spot
        for position, spot in _spots(texts, start + inside[-1] + 1, size, sequence.finish).items()
        if position in row_of
    }
    written, so_far = {}, ""
    for position, text in texts.items():
        so_far += text
        if position in row_of:
            written[row_of[position]] = int(so_far)
    pieces = tuple(raw[place].decode(errors="replace") for place in inside)
    return Reply(
        sequence.number, record, answer.value, pieces, spots, frozenset(known | {answer.value}), written
    )


def _tokens_of(raw: list[bytes], reply: str, answer: Number) -> list[int]:
    """Places of the generated tokens that hold a character of the answer, in order."""
    first = len(reply[: answer.start].encode(errors="surrogateescape"))
    last = len(reply[: answer.end].encode(errors="surrogateescape"))
    starts = np.cumsum([0, *map(len, raw)])
    return [place for place, (low, high) in enumerate(pairwise(starts)) if low < last and high > first]


def _spots(texts: dict[int, str], behind: int, size: int, finish: Finish) -> dict[int, Spot]:
    """Spots by position. texts: digits of the answer's tokens by position; behind: the position after the answer."""
    places = sorted(texts)
    spots = {places[0] - 1: Spot("before", None, texts[places[0]])}
    for index, position in enumerate(places):
        if len(places) == 1:
            place = "only"
        else:
            place = "first" if index == 0 else "last" if index == len(places) - 1 else "middle"
        following = texts[places[index + 1]] if index + 1 < len(places) else None
        spots[position] = Spot(place, texts[position], following)
    if behind < size:
        spots[behind] = Spot("after")
    if finish is Finish.EOS:
        spots[size - 1] = Spot("end")
    return spots


def _digits(raw: bytes) -> str:
    return "".join(chr(byte) for byte in raw if byte in b"0123456789")


def digit_split(pieces: tuple[str, ...]) -> str:
    """How an answer is cut into tokens: "1+1+1+1" is four tokens of a digit each, "1+,+3" has a comma between."""
    sizes = [sum(character in "0123456789" for character in piece) for piece in pieces]
    return "+".join(
        str(size) if size else repr(piece)[1:-1] for size, piece in zip(sizes, pieces, strict=True)
    )


def glued(pieces: tuple[str, ...]) -> bool:
    """A token of the answer holds something beside digits, such as a leading space."""
    return any(
        any(c in "0123456789" for c in piece) and not all(c in "0123456789" for c in piece)
        for piece in pieces
    )
