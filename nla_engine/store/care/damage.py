"""What damage costs: which lost values follow from other arrays, and which sequences lose data.

It reads no files: it is given the damaged parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from nla_engine.codec.rows import exact_rows
from nla_engine.sites import Site
from nla_engine.store.format import NO_TOKEN, NUMBER, layer_group, row_flags
from nla_engine.store.manifest import Manifest

#: Prefix of the arrays that say where a sequence lies, by what they count.
_RAGGED = {"rows": "row", "tokens": "token", "source_bytes": "source"}


class Part(NamedTuple):
    """Values [first, last) of an array, and why they cannot be read."""

    first: int
    last: int
    fault: str


class Damage:
    """The damaged parts of a store's arrays.

    values: every array with one value per row, sequence, token or byte, by path, restored where possible
    restored: paths of damaged arrays of which every value followed from other arrays
    lost: the damaged parts of the others, by path
    """

    def __init__(
        self, manifest: Manifest, parts: Mapping[str, Sequence[Part]], values: Mapping[str, np.ndarray]
    ) -> None:
        """parts: the damaged parts, by path. values: what was read; damaged parts may hold anything."""
        self._manifest = manifest
        self._units = {path: spec.unit for path, spec in manifest.specs().items()}
        self._damaged = {path: np.zeros(len(array), bool) for path, array in values.items()}
        for path, mask in self._damaged.items():
            for part in parts.get(path, ()):
                mask[part.first : part.last] = True
        self.values = dict(values)
        self.restored: list[str] = []
        self.lost = {path: list(found) for path, found in parts.items() if found}
        if self.lost:
            self._restore_tables()
            self._restore_numbers()
            self._restore_rows()
            self._restore_exact_rows()

    @property
    def numbers(self) -> np.ndarray:
        """The number of each sequence as stored, int64 [sequences]. Before they had numbers, they were in order."""
        return self.values.get(NUMBER, np.arange(self._manifest.commit.sequences))

    def sequences(self, units: Sequence[str] | None = None) -> dict[int, str]:
        """The sequences that lose data, as stored, each with a fault. units: look only at arrays counted in these."""
        found: dict[int, str] = {}
        for path, parts in self.lost.items():
            unit = self._units[path]
            if (units is not None and unit not in units) or (owners := self._owners(unit)) is None:
                continue
            starts, sizes = owners
            for part in parts:
                hit = (starts < part.last) & (starts + sizes > part.first) & (sizes > 0)
                for place in np.flatnonzero(hit).tolist():
                    found.setdefault(place, part.fault)
        return dict(sorted(found.items()))

    def unplaced(self) -> list[str]:
        """Arrays with lost parts that cannot be assigned to sequences."""
        return sorted(p for p in self.lost if p == NUMBER or self._owners(self._units[p]) is None)

    def _good(self, *paths: str) -> bool:
        return not any(path in self.lost for path in paths)

    def _restore(self, path: str, values: np.ndarray) -> None:
        """Use `values` for a damaged array if they agree with the parts of it that could be read."""
        held, damaged = self.values[path], self._damaged[path]
        if (
            path in self.lost
            and len(values) == len(held)
            and np.array_equal(values[~damaged], held[~damaged])
        ):
            self.values[path] = values.astype(held.dtype)
            self.restored.append(path)
            del self.lost[path]

    def _owners(self, unit: str) -> tuple[np.ndarray, np.ndarray] | None:
        """Where each sequence starts and how long it is, counted in `unit`; None if that is lost."""
        if unit == "sequences":
            count = self._manifest.commit.sequences
            return np.arange(count), np.ones(count, np.int64)
        if unit.startswith("exact_"):
            path = f"{layer_group(Site.parse(unit.removeprefix('exact_')))}/exact_row"
            rows = self._owners("rows")
            if rows is None or path in self.lost:
                return None
            starts = np.searchsorted(self.values[path], rows[0])
            return starts, np.searchsorted(self.values[path], rows[0] + rows[1]) - starts
        if unit not in _RAGGED:
            return None
        names = [f"sequences/{_RAGGED[unit]}_{end}" for end in ("start", "size")]
        return (self.values[names[0]], self.values[names[1]]) if self._good(*names) else None

    def _restore_tables(self) -> None:
        """A start follows from the start and size before it, a size from two starts, and both from the rows."""
        for unit, prefix in _RAGGED.items():
            start, size = f"sequences/{prefix}_start", f"sequences/{prefix}_size"
            if self._good(start, size):
                continue
            edges = np.append(self.values[start], self._manifest.lengths()[unit])
            edges[:-1][self._damaged[start]] = -1
            sizes = np.where(self._damaged[size], -1, self.values[size])
            for i in np.flatnonzero(edges[1:] < 0).tolist():
                if edges[i] >= 0 and sizes[i] >= 0:
                    edges[i + 1] = edges[i] + sizes[i]
            for i in np.flatnonzero(edges[:-1] < 0)[::-1].tolist():
                if edges[i + 1] >= 0 and sizes[i] >= 0:
                    edges[i] = edges[i + 1] - sizes[i]
            if unit == "rows" and (edges < 0).any() and self._good("rows/sequence", NUMBER):
                edges = self._edges()
            if (edges >= 0).all() and (np.diff(edges) >= 0).all():
                self._restore(start, edges[:-1])
                self._restore(size, np.diff(edges))

    def _edges(self) -> np.ndarray:
        """int64 [sequences + 1]: where each sequence starts, by the numbers of its rows; -1 if they disagree."""
        carried, numbers = self.values["rows/sequence"], self.numbers
        changes = np.flatnonzero(np.diff(carried, prepend=-1))
        places = {number: place for place, number in enumerate(numbers.tolist())}
        owners = [places.get(number, -1) for number in carried[changes].tolist()]
        if np.any(np.diff(owners, prepend=-1) <= 0):
            return np.full(len(numbers) + 1, -1)
        sizes = np.zeros(len(numbers), np.int64)
        sizes[owners] = np.diff(np.append(changes, len(carried)))
        return np.append(0, np.cumsum(sizes))

    def _restore_numbers(self) -> None:
        """A sequence's number follows from its rows. That of one without rows is lost."""
        rows = self._owners("rows")
        if NUMBER not in self.lost or rows is None:
            return
        numbers, carried = self.values[NUMBER].copy(), self.values["rows/sequence"]
        damaged, unread = self._damaged[NUMBER], self._damaged["rows/sequence"]
        for place in np.flatnonzero(damaged).tolist():
            here = slice(int(rows[0][place]), int(rows[0][place] + rows[1][place]))
            known = carried[here][~unread[here]]
            if not len(known):
                return
            numbers[place] = known[0]
        if len(np.unique(numbers)) == len(numbers):
            self._restore(NUMBER, numbers)

    def _restore_rows(self) -> None:
        """A row's sequence follows from the tables, its tokens and flags from its position in the sequence."""
        rows, tokens = self._owners("rows"), self._owners("tokens")
        if rows is None or not np.array_equal(np.cumsum(rows[1]) - rows[1], rows[0]):
            return
        owner = np.repeat(np.arange(len(rows[1])), rows[1])
        if self._good(NUMBER):
            self._restore("rows/sequence", self.numbers[owner])
        if tokens is None or len(owner) != self._manifest.commit.rows or not self._good("rows/position"):
            return
        position, size = self.values["rows/position"].astype(np.int64), tokens[1][owner]
        if ((position < 0) | (position >= size)).any():
            return
        if self._good("sequences/tokens"):
            held = np.append(self.values["sequences/tokens"], np.int32(NO_TOKEN))
            place = tokens[0][owner] + position
            self._restore("rows/token_id", held[place])
            self._restore("rows/next_token_id", np.where(position == size - 1, NO_TOKEN, held[place + 1]))
        norms = {layer: f"{layer_group(layer)}/norm" for layer in self._manifest.layers}
        if self._good("sequences/prompt_size", *norms.values()):
            sink, nonfinite = np.zeros(len(owner), bool), np.zeros(len(owner), bool)
            for layer, path in norms.items():
                sink |= self.values[path] > self._manifest.sink_norm[layer]
                nonfinite |= ~np.isfinite(self.values[path])
            prompt = self.values["sequences/prompt_size"][owner]
            self._restore("rows/flags", row_flags(position, prompt, size, sink, nonfinite))

    def _restore_exact_rows(self) -> None:
        """Which rows are kept exactly follows from their norms."""
        for layer in self._manifest.layers:
            norm = f"{layer_group(layer)}/norm"
            if self._good(norm) and self._manifest.codec.name != "bf16":
                rows = np.flatnonzero(exact_rows(self.values[norm], self._manifest.sink_norm[layer]))
                self._restore(f"{layer_group(layer)}/exact_row", rows)
