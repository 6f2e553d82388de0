"""Texts by rule for a warm start: the kind of text that a row stands in, and words that its vector is made of.

The kind is read off the context, the words off the vector (see `words`). Reinforcement then rewards whatever brings the
vector back.
"""

from __future__ import annotations

import re

import numpy as np
import torch

from nla_engine.errors import RequestError
from nla_engine.store import CaptureStore, RowFlag
from nla_engine.train.words import Words, by_sequence

#: Bytes before a row that its kind is told from.
_NEAR = 240
_CODE = re.compile(
    r"^\s*(def |class |import |from \w+ import|return\b|for .*:$|if .*:$|>>> |#include|\}|\w+\(.*\);?$)"
)
#: How chat templates begin a message; the word is its role.
_ROLE = re.compile(rb"<\|im_start\|>(\w+)|<start_of_turn>(\w+)|<\|start_header_id\|>(\w+)")


def rule_texts(
    store: CaptureStore, rows: np.ndarray, vectors: torch.Tensor, learnt: np.ndarray, device: torch.device
) -> list[str]:
    """One text for each of these rows, int64 [n]. vectors: their unit vectors, float32 [n, d].

    learnt: bool [n], those that words are learnt from. RequestError if the store does not say which tokens follow.
    """
    if not store.next_token:
        raise RequestError(
            f"{store.path}: keeps no likely next tokens, which texts by rule name: capture it with --next-token 3, or "
            "give --texts"
        )
    words = Words.learn(store, rows[learnt], vectors[torch.from_numpy(learnt)])
    kinds = _kinds(store, rows)
    said = words.of(vectors, device)
    return [f"{kind}: {each}" if each else f"{kind}." for kind, each in zip(kinds, said, strict=True)]


def _kinds(store: CaptureStore, rows: np.ndarray) -> list[str]:
    """The kind of text that each row stands in, such as "A reply, in a list"."""
    position, flags = store.column("position"), store.column("flags")
    found = [""] * len(rows)
    for sequence, places in by_sequence(store, rows):
        parts = [sequence.vocabulary.raw(token) for token in sequence.tokens.tolist()]
        whole, ends = b"".join(parts), np.cumsum([len(part) for part in parts])
        for place in places.tolist():
            before = whole[: ends[position[rows[place]]]]
            kind = kind_of(before[-_NEAR:].decode(errors="replace"), _where(before, flags[rows[place]]))
            found[place] = kind[0].upper() + kind[1:]
    return found


def _where(before: bytes, flags: int) -> str:
    """What a row is a part of: a message of the role that the chat template named last, or some text."""
    roles = _ROLE.findall(before)
    if roles:
        return "a reply" if {b"assistant", b"model"} & set(roles[-1]) else "a request"
    return "a reply" if flags & RowFlag.GENERATED else "a text"


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
