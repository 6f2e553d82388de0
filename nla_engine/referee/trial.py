"""Some rows, every vector that takes their place, and what each changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nla_engine.errors import EngineError
from nla_engine.referee.measures import Measured, measure
from nla_engine.referee.patcher import Patcher
from nla_engine.referee.variants import Lane
from nla_engine.store import CaptureStore

#: Largest median distance of stored rows from those that the model computes, relative L2. int4 makes 0.1.
_APART = 0.5


@dataclass(frozen=True)
class Places:
    """Where rows lie. tokens: of each sequence, whole; sequence: int64 [R], ascending; position: int64 [R]."""

    tokens: Sequence[np.ndarray]
    sequence: np.ndarray
    position: np.ndarray

    @classmethod
    def of(cls, store: CaptureStore, rows: np.ndarray) -> Places:
        """Those of rows of a store, int64 [R], ascending."""
        sequences, number = np.unique(store.column("sequence")[rows], return_inverse=True)
        tokens = [store.sequence(int(sequence)).tokens for sequence in sequences]
        return cls(tokens, number, store.column("position")[rows].astype(np.int64))

    def following(self, count: int) -> np.ndarray:
        """int64 [R, count]: the tokens behind each row, -1 behind the end of its sequence."""
        out = np.full((len(self.position), count), -1, np.int64)
        for row, (number, position) in enumerate(zip(self.sequence, self.position, strict=True)):
            found = self.tokens[number][position + 1 : position + 1 + count]
            out[row, : len(found)] = found
        return out

    def read_up_to(self, later: int) -> list[np.ndarray]:
        """Of each sequence the tokens that its rows, and so many later positions, depend on."""
        return [
            tokens[: self.position[self.sequence == number].max() + 1 + later]
            for number, tokens in enumerate(self.tokens)
        ]


@dataclass(frozen=True)
class Tried:
    """measured: what each lane's vectors change, in the order of the lanes. own: rows as the model computes them,
    float32 [R, d]."""

    measured: list[Measured]
    own: torch.Tensor

    def check(self, stored: torch.Tensor, model: str, store: CaptureStore) -> None:
        """EngineError if stored rows, float32 [R, d], are not those that the model computes."""
        apart = (stored - self.own).norm(dim=1) / self.own.norm(dim=1)
        apart = apart[apart.isfinite()]
        if len(apart) and (error := float(apart.median())) > _APART:
            raise EngineError(
                f"{model}: computes other rows than {store.path} holds (median difference {error:.2g}): "
                "`nla-engine verify --model` tells more"
            )


def try_lanes(patcher: Patcher, places: Places, lanes: Sequence[Lane], horizon: int) -> Tried:
    """Patch the rows with every vector, and compare with the model's own rows, which enter in the same way."""
    read = patcher.read(places.read_up_to(horizon))
    device = read.states.device
    own = read.states[
        torch.from_numpy(places.sequence).to(device), torch.from_numpy(places.position).to(device)
    ]
    row = np.concatenate([np.arange(len(own)), *(lane.row for lane in lanes)])
    order = np.argsort(row, kind="stable")
    vectors = torch.cat([own.float(), *(lane.vectors.float() for lane in lanes)])
    vectors = vectors[torch.from_numpy(order).to(device)]
    row = row[order]
    states = patcher.run(read, places.sequence[row], places.position[row], vectors, horizon)
    first, rest = np.flatnonzero(order < len(own)), np.flatnonzero(order >= len(own))
    of_rows, patched = (states[torch.from_numpy(each).to(device)] for each in (first, rest))
    following = places.following(1 + horizon)
    found = measure(patcher.lm, of_rows, patched, row[rest], following, plain=patcher.plain)
    back = np.argsort(order[rest])
    measured, start = [], 0
    for lane in lanes:
        part = back[start : start + len(lane.row)]
        measured.append(Measured(found.kl[part], found.top1_same[part], found.logprob_change[part]))
        start += len(lane.row)
    return Tried(measured, own.float())
