"""Rows of sequences that have ended, once all of them have come to the host.

Knows where each row is, not which rows are wanted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nla_engine.capture.spill import HeldRows, HostRows, RowKeeper
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


@dataclass(frozen=True)
class Ending:
    """An ended sequence, and what the host holds of it. position: of the rows to collect, int64 [n]; index: which of
    those held they are, int64 [n]."""

    sequence: StagedSequence
    held: HeldRows
    position: np.ndarray
    index: np.ndarray


class RowsBySite(Mapping[Site, LayerRows]):
    """Rows of one sequence by site: views of arrays that hold all sites. When it is pickled, these few arrays are.

    exact: by site, which rows are also kept exactly, and their bits, as `LayerRows` has them
    """

    def __init__(
        self, sites: Sequence[Site], rows: HostRows, exact: Sequence[tuple[np.ndarray, np.ndarray]]
    ) -> None:
        self._number = {site: i for i, site in enumerate(sites)}
        self._rows, self._exact = rows, exact

    def __getitem__(self, site: Site) -> LayerRows:
        i, rows = self._number[site], self._rows
        return LayerRows(rows.codes[:, i], rows.scales[:, i], rows.norm[:, i], *self._exact[i])

    def __iter__(self) -> Iterator[Site]:
        return iter(self._number)

    def __len__(self) -> int:
        return len(self._number)


@dataclass(frozen=True)
class Collector:
    """Collects rows of L layers from `keeper`, in the thread that uses it.

    sink_norm: by layer; skip_sinks: leave out the sinks of any layer, but not rows that are not finite
    """

    codec: Codec
    layers: tuple[Site, ...]
    keeper: RowKeeper
    sink_norm: Mapping[Site, float]
    skip_sinks: bool

    def collect(self, endings: Sequence[Ending]) -> Collected:
        """Of each sequence its positions, and their rows by layer. Called once all of them have arrived."""
        return [self._collect(ending) for ending in endings]

    def _collect(self, ending: Ending) -> tuple[np.ndarray, RowsBySite]:
        held, position, index = ending.held, ending.position, ending.index
        if self.skip_sinks:
            kept = ~self._sinks(self.keeper.norms(held)[index])
            position, index = position[kept], index[kept]
        rows = self.keeper.take(held, index if len(index) < held.size else None)
        if rows.size != len(position):
            raise EngineError(
                f"request {ending.sequence.id}: {rows.size} rows came for {len(position)} positions"
            )
        exact = [self._exact(i, ending.sequence, position, rows.norm[:, i]) for i in range(len(self.layers))]
        return position, RowsBySite(self.layers, rows, exact)

    def _sinks(self, norms: np.ndarray) -> np.ndarray:
        """bool [n]: the rows that are sinks in some layer, and finite in all. norms: float32 [n, L]."""
        limit = np.array([self.sink_norm[layer] for layer in self.layers])
        sinks: np.ndarray = (norms > limit).any(1) & np.isfinite(norms).all(1)
        return sinks

    def _exact(
        self, number: int, each: StagedSequence, position: np.ndarray, norm: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Which rows of a layer are kept exactly, int64 [m], and their bfloat16 bits, uint16 [m, d]. EngineError if one
        of these was not fetched."""
        layer, none = self.layers[number], np.zeros((0, self.codec.d_model), np.uint16)
        index = np.zeros(0, np.int64)
        if self.codec.name != "bf16":
            index = np.flatnonzero(exact_rows(norm, self.sink_norm[layer]))
        if not len(index):
            return index, none
        fetched, rows = each.exact.get(layer, (np.zeros(0, np.int64), none))
        order = {row: place for place, row in enumerate(fetched.tolist())}  # the last of equal ones
        wanted = position[index].tolist()
        if any(row not in order for row in wanted):
            raise EngineError(f"{layer.label}: a row that must be kept exactly is missing")
        return index, rows[[order[row] for row in wanted]]
