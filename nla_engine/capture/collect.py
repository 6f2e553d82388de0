"""Rows of sequences that have ended: those still on the device are fetched together, and join those on the host.

Knows where each row is, not which rows are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nla_engine.capture.outbox import Outbox
from nla_engine.capture.spill import HeldRows, HostRows
from nla_engine.capture.staging import UNWRITTEN, Staging
from nla_engine.codec.rows import Codec, exact_rows
from nla_engine.engine.tap import Collected
from nla_engine.errors import EngineError
from nla_engine.sites import Site
from nla_engine.store import LayerRows


@dataclass
class StagedSequence:
    """A sequence in a slot. chosen: its positions that have rows, int64 [k], if they are known from the start.

    in_pass: rows that lie in the places of the last pass: number of the first, its place, how many
    sent: rows that left the device while the sequence runs; exact: by layer, positions and bits of rows kept exactly
    """

    id: int
    prompt_size: int
    first: int
    end: int
    chosen: np.ndarray | None
    exact: dict[Site, tuple[np.ndarray, np.ndarray]]
    in_pass: tuple[int, int, int] = (0, 0, 0)
    sent: int = 0
    held: HeldRows | None = None


@dataclass
class Ending:
    """An ended sequence. position: of the rows to collect, int64 [n]; held: which of those on the host are among them,
    int64 [k]; place: of the others, which are on the device, int64 [n - k]."""

    sequence: StagedSequence
    position: np.ndarray
    held: np.ndarray
    place: np.ndarray

    def only(self, kept: np.ndarray) -> Ending:
        """Those of its rows that a mask keeps, bool [n]."""
        k = len(self.held)
        return Ending(self.sequence, self.position[kept], self.held[kept[:k]], self.place[kept[k:]])


@dataclass(frozen=True)
class Collector:
    """Collects rows from `staging`, and from the keeper behind `outbox`.

    sink_norm: by layer; skip_sinks: leave out the sinks of any layer, but not rows that are not finite
    """

    codec: Codec
    staging: Staging
    outbox: Outbox
    sink_norm: Mapping[Site, float]
    skip_sinks: bool

    @property
    def layers(self) -> tuple[Site, ...]:
        return self.staging.layers

    def collect(self, endings: Sequence[Ending]) -> Callable[[], Collected]:
        """Of each sequence its positions, and their rows by layer, which the function returned waits for: they are put
        together by the outbox's thread. EngineError if a row was never written.
        """
        index = self.staging.by_layer(np.concatenate([ending.place for ending in endings]))
        sent = []
        for ending in endings:
            each = ending.sequence
            sent.append((each.held, each.sent))
            each.held, each.sent, each.in_pass = None, 0, (0, 0, 0)
        rows = self.staging.rows(index.ravel())
        return self.outbox.fetch(rows, lambda arrays: self._put_together(endings, sent, arrays)).result

    def _put_together(
        self,
        endings: Sequence[Ending],
        sent: Sequence[tuple[HeldRows | None, int]],
        arrays: Sequence[np.ndarray],
    ) -> Collected:
        """sent: of each sequence what the keeper holds, and how many rows that is; arrays: the rows that were on the
        device, of all sequences, layer by layer."""
        shape = (len(self.layers), sum(len(ending.place) for ending in endings))
        codes, scales, norms = (array.reshape(*shape, *array.shape[1:]) for array in arrays)
        for layer, missing in zip(self.layers, (norms == UNWRITTEN).sum(1).tolist(), strict=True):
            if missing:
                raise EngineError(f"{layer.label}: {missing} rows of sequences that ended were never written")
        collected, start = [], 0
        for whole, (held, count) in zip(endings, sent, strict=True):
            ending, end = whole, start + len(whole.place)
            rows = HostRows(codes[:, start:end], scales[:, start:end], norms[:, start:end])
            if self.skip_sinks:
                norm = rows.norm
                if held is not None:
                    norm = np.concatenate([self.outbox.keeper.norms(held)[:, ending.held], norm], axis=1)
                kept = ~self._sinks(norm)
                rows = rows.chosen(np.flatnonzero(kept[len(ending.held) :]))
                ending = ending.only(kept)
            if held is not None:
                index = ending.held if len(ending.held) < count else None
                rows = self.outbox.keeper.take(held, index, rows)
            layers = {layer: self._layer_rows(i, ending, rows) for i, layer in enumerate(self.layers)}
            collected.append((ending.position, layers))
            start = end
        return collected

    def _sinks(self, norms: np.ndarray) -> np.ndarray:
        """bool [n]: the rows that are sinks in some layer, and finite in all. norms: float32 [L, n]."""
        limit = np.array([self.sink_norm[layer] for layer in self.layers])[:, None]
        sinks: np.ndarray = (norms > limit).any(0) & np.isfinite(norms).all(0)
        return sinks

    def _layer_rows(self, number: int, ending: Ending, rows: HostRows) -> LayerRows:
        """The rows of a layer, with those kept exactly. EngineError if one of these was not fetched."""
        layer, norm = self.layers[number], rows.norm[number]
        if len(norm) != len(ending.position):
            raise EngineError(f"{layer.label}: {len(norm)} rows came for {len(ending.position)} positions")
        exact = np.zeros(0, np.int64)
        if self.codec.name != "bf16":
            exact = np.flatnonzero(exact_rows(norm, self.sink_norm[layer]))
        bits = self._exact_bits(layer, ending.sequence, ending.position[exact])
        return LayerRows(rows.codes[number], rows.scales[number], norm, exact, bits)

    def _exact_bits(self, layer: Site, each: StagedSequence, wanted: np.ndarray) -> np.ndarray:
        """bfloat16 bits, uint16 [m, d], of a sequence's rows at the positions `wanted` [m]."""
        none = np.zeros((0, self.codec.d_model), np.uint16)
        if not len(wanted):
            return none
        position, rows = each.exact.get(layer, (np.zeros(0, np.int64), none))
        order = {row: place for place, row in enumerate(position.tolist())}  # the last of equal ones
        if any(row not in order for row in wanted.tolist()):
            raise EngineError(f"{layer.label}: a row that must be kept exactly is missing")
        return rows[[order[row] for row in wanted.tolist()]]
