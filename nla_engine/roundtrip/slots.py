"""Several vectors for one explanation: of each slot of an AV's prompt, which stored vector enters there.

A slot is a layer and a position relative to that of the row which is explained, at most its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from nla_engine.errors import RequestError
from nla_engine.roundtrip.texts import Vectors
from nla_engine.store import CaptureStore


@dataclass(frozen=True)
class Slots:
    """layers, offsets: of each slot, in the order in which the markers stand in the prompt."""

    layers: tuple[int, ...]
    offsets: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> Slots:
        """From `L23@0,L24@-1`, as `fields.SLOTS` allows it."""
        pairs = [slot.removeprefix("L").split("@") for slot in text.split(",")]
        return cls(tuple(int(layer) for layer, _ in pairs), tuple(int(offset) for _, offset in pairs))

    def check(self, store: CaptureStore) -> None:
        """RequestError for a layer that the store lacks."""
        if missing := [layer for layer in self.layers if layer not in store.layers]:
            held = ", ".join(map(str, store.layers))
            raise RequestError(
                f"--slots names layer {missing[0]}, {store.path} holds layer {held}: capture the layers "
                "that the AV reads"
            )

    def complete(self, store: CaptureStore, rows: np.ndarray) -> np.ndarray:
        """Those of these rows, int64 [n], for which the store has the vector of every slot."""
        return rows[(_Places(self, store).of(rows) >= 0).all(1)]

    def vectors(self, store: CaptureStore) -> Vectors:
        """The vectors of a row's slots, where an AV of one vector reads that of the row."""
        return _SlotVectors(self, store)


class _SlotVectors:
    """See `Vectors`: `torch` gives [n, slots, d]."""

    def __init__(self, slots: Slots, store: CaptureStore) -> None:
        self._places = _Places(slots, store)
        self._layers = [store.layer(layer) for layer in slots.layers]

    def torch(self, rows: np.ndarray, device: torch.device) -> torch.Tensor:
        """float32 [n, slots, d] on the device."""
        of_slots = zip(self._layers, self._places.of(rows).T, strict=True)
        return torch.stack([layer.torch(of, device) for layer, of in of_slots], 1)

    def norm_at(self, rows: np.ndarray) -> np.ndarray:
        """[n]: the norm of the first slot's vector, or of one that is zero or not finite, if a slot has one."""
        of_slots = zip(self._layers, self._places.of(rows).T, strict=True)
        norms = np.stack([layer.norm_at(of) for layer, of in of_slots], 1)
        worst = np.argmax(~np.isfinite(norms) | (norms == 0), 1)
        return norms[np.arange(len(rows)), worst]


class _Places:
    """Finds the row of a position in a sequence, if the store has it."""

    def __init__(self, slots: Slots, store: CaptureStore) -> None:
        self._offsets = np.array(slots.offsets, np.int64)
        if self._offsets.any():
            self._position = store.column("position").astype(np.int64)
            self._place = store.column("sequence").astype(np.int64) << 32 | self._position
            self._order = np.argsort(self._place, kind="stable")
            self._ordered = self._place[self._order]

    def of(self, rows: np.ndarray) -> np.ndarray:
        """int64 [n, slots]: for rows int64 [n] the row whose vector enters each slot, -1 where the store has none."""
        out = np.repeat(rows[:, None], len(self._offsets), 1)
        if not (len(rows) and self._offsets.any()):
            return out
        wanted = self._place[rows][:, None] + self._offsets
        found = np.minimum(np.searchsorted(self._ordered, wanted), len(self._ordered) - 1)
        there = (self._ordered[found] == wanted) & (self._position[rows][:, None] + self._offsets >= 0)
        return np.where(self._offsets == 0, out, np.where(there, self._order[found], -1))
