"""Documents with more tokens than a sequence may have: refused, cut, or split into windows.

Tokens are cut as the tokenizers library truncates: every piece begins and ends with the special tokens that the
tokenizer puts around a text, and they count. Knows nothing of models.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from nla_engine.errors import PromptError

#: Field of a window's record that says where the window comes from.
WINDOW = "nla_window"


@dataclass(frozen=True)
class Longest:
    """tokens: most of a document, None: as many as the model reads. long: one of config.LONG, of longer documents."""

    tokens: int | None = None
    long: str = "refuse"


@dataclass(frozen=True)
class Piece:
    """A part of a document. ids: int32 [t], with special tokens; start: tokens of the text before it."""

    ids: np.ndarray
    start: int


class Splitter:
    """Cuts the ids of a text to `most` tokens, or splits them.

    head, tail: int32, the special tokens that the tokenizer puts before and behind every text
    """

    def __init__(self, most: int, long: str, head: np.ndarray, tail: np.ndarray) -> None:
        """PromptError if there is no room for the text."""
        self.most, self.long = most, long
        self._head, self._tail = head, tail
        self._room = most - len(head) - len(tail)
        if self._room < 1:
            raise PromptError(
                f"--max-tokens {most} leaves no room for text beside the {len(head) + len(tail)} special tokens of the "
                "tokenizer: raise it"
            )

    def pieces(self, ids: np.ndarray) -> list[Piece]:
        """Of a text of ids int32 [t]; one, if it is short enough or is to be cut."""
        if len(ids) <= self.most:
            return [Piece(ids, 0)]
        text = ids[len(self._head) : len(ids) - len(self._tail)]
        starts = range(0, len(text), self._room) if self.long == "windows" else [0]
        return [
            Piece(np.concatenate([self._head, text[start : start + self._room], self._tail]), start)
            for start in starts
        ]


def window_sources(source: bytes, field: str, document: int, pieces: list[Piece]) -> Iterator[bytes]:
    """The record of each window of a document: its own, and in WINDOW where the window comes from.

    field: that of the text. Only the first window keeps it: it is as long as all windows together.
    """
    record: dict[str, Any] = json.loads(source)
    for number, piece in enumerate(pieces):
        origin = {"document": document, "window": number, "windows": len(pieces), "start": piece.start}
        yield json.dumps({**record, WINDOW: origin}, ensure_ascii=False).encode()
        record.pop(field, None)


def tokens_around(tokenizer: Any) -> tuple[np.ndarray, np.ndarray] | None:
    """int32, int32: the ids that the tokenizer puts before and behind every text, such as its BOS and its EOS.

    None if that cannot be told: it cannot encode "a", or not as a part of what it gives with special tokens.
    """
    try:
        bare, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    except Exception:  # the library raises many types
        return None
    for size in range(len(whole) - len(bare) + 1):
        if whole[size : size + len(bare)] == bare:
            return np.asarray(whole[:size], np.int32), np.asarray(whole[size + len(bare) :], np.int32)
    return None
