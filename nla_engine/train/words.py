"""Words for a vector: the few tokens whose own directions add up to it.

Each word stands for a mean direction of the rows that are trained on, away from the mean of them all:

    like W      rows of the token W
    before W    rows that the model expects W behind, each weighted by its probability

A row's words are chosen greedily (matching pursuit, Mallat and Zhang 1993): the direction that its vector has most of,
then the same again for what is left of it. So the first word says most. This knows store and vectors, no model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from nla_engine.roundtrip.verbalize import CLOSE_TAG, OPEN_TAG
from nla_engine.store import CaptureStore
from nla_engine.store.sequences import StoredSequence, Vocabulary

MARKS = ("like", "before")
#: Words of a row.
COUNT = 12
#: Rows that a word is learnt from at least, and words of one mark at most: those of most rows.
_LEAST, _MOST = 8, 8192
#: A next token counts for a word's rows from this probability on.
_LIKELY = 0.1
_ROWS_AT_ONCE = 8192


@dataclass
class _Seen:
    """Which names were seen at which rows, of one mark: lists of equal length. weight: 0 to 1"""

    row: list[int] = field(default_factory=list)
    name: list[int] = field(default_factory=list)
    weight: list[float] = field(default_factory=list)

    def add(self, row: int, name: int, weight: float = 1.0) -> None:
        self.row.append(row)
        self.name.append(name)
        self.weight.append(weight)


@dataclass(frozen=True)
class Words:
    """mean: float32 [d] of unit vectors; directions: unit vectors, float32 [m, d]; labels: such as "like castle" """

    mean: torch.Tensor
    directions: torch.Tensor
    labels: list[str]

    @classmethod
    def learn(cls, store: CaptureStore, rows: np.ndarray, vectors: torch.Tensor) -> Words:
        """rows: int64 [n], to learn from; vectors: their unit vectors, float32 [n, d], on the host.

        The store must keep next tokens.
        """
        mean = vectors.mean(0)
        away = vectors - mean
        names, seen = _read(store, rows)
        directions, labels = [], []
        for mark, each in zip(MARKS, seen, strict=True):
            name, row = torch.tensor(each.name), torch.tensor(each.row)
            weight = torch.tensor(each.weight)
            sums = torch.zeros(len(names), vectors.shape[1])
            for part in torch.arange(len(name)).split(_ROWS_AT_ONCE):
                sums.index_add_(0, name[part], away[row[part]] * weight[part, None])
            held = torch.bincount(name[weight >= _LIKELY], minlength=len(names))
            kept = torch.argsort(held, descending=True, stable=True)[:_MOST]
            kept = kept[(held[kept] >= _LEAST) & (sums[kept].norm(dim=1) > 0)]
            directions.append(torch.nn.functional.normalize(sums[kept], dim=1))
            labels += [f"{mark} {names[place]}" for place in kept.tolist()]
        return cls(mean, torch.cat(directions), labels)

    def of(self, vectors: torch.Tensor, device: torch.device) -> list[str]:
        """The words of each of these unit vectors, float32 [n, d], in one line. Computed on the device."""
        mean, directions = self.mean.to(device), self.directions.to(device)
        count, found = min(COUNT, len(self.labels)), []
        for part in vectors.split(_ROWS_AT_ONCE):
            rest = part.to(device) - mean
            chosen = torch.empty(len(part), count, dtype=torch.int64, device=device)
            for number in range(count):
                has = rest @ directions.T
                has.scatter_(1, chosen[:, :number], -torch.inf)
                size, chosen[:, number] = has.max(1)
                rest -= size.clamp(min=0)[:, None] * directions[chosen[:, number]]
            found += [" ".join(self.labels[place] for place in line) for line in chosen.tolist()]
        return found


def _read(store: CaptureStore, rows: np.ndarray) -> tuple[list[str], tuple[_Seen, _Seen]]:
    """Every name that comes up, and where, by mark. Rows are told by their place in `rows`."""
    numbers: dict[str, int] = {}
    of_token: dict[int, int] = {}

    def number_of(vocabulary: Vocabulary, token: int) -> int:
        """Of the token's name; -1 if it has none."""
        if token not in of_token:
            name = shown(vocabulary.text(token))
            of_token[token] = numbers.setdefault(name, len(numbers)) if name else -1
        return of_token[token]

    position, top = store.column("position"), store.column("top_id")
    chance = np.exp(store.column("top_logprob").astype(np.float64))
    like, before = _Seen(), _Seen()
    for sequence, places in by_sequence(store, rows):
        for place in places.tolist():
            row = int(rows[place])
            if (name := number_of(sequence.vocabulary, int(sequence.tokens[position[row]]))) >= 0:
                like.add(place, name)
            for token, weight in zip(top[row].tolist(), chance[row].tolist(), strict=True):
                if (name := number_of(sequence.vocabulary, token)) >= 0:
                    before.add(place, name, weight)
    return list(numbers), (like, before)


def by_sequence(store: CaptureStore, rows: np.ndarray) -> Iterator[tuple[StoredSequence, np.ndarray]]:
    """Each sequence with the places of its rows in `rows`, int64, by position."""
    order = np.lexsort((store.column("position")[rows], store.column("sequence")[rows]))
    numbers = store.column("sequence")[rows[order]]
    edges = np.flatnonzero(np.diff(numbers, prepend=-1))
    yield from zip(store.some_sequences(numbers[edges]), np.split(order, edges[1:]), strict=True)


def shown(token: str) -> str:
    """How a text names a token: without spaces around it, line breaks as \\n, a token of spaces as _; no tags.

    Empty for a token that is part of a character.
    """
    if "\N{REPLACEMENT CHARACTER}" in token:
        return ""
    for tag in (OPEN_TAG, CLOSE_TAG):
        token = token.replace(tag, "")
    token = token.replace("<|", "[").replace("|>", "]")
    visible = token.strip(" ") or token.replace(" ", "_")
    return visible.replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")
