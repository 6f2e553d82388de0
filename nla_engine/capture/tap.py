"""The tap: rows of the residual stream, encoded on the device the moment a block has computed them.

A row's place in the staging buffers is computed from (slot, position), like a key's place in the slot cache, so a row
cannot land elsewhere; `collect` refuses a sequence with an unwritten row. Rows that are not chosen stay on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from nla_engine.codec.rows import Codec, exact_rows
from nla_engine.engine.tap import KeptRows
from nla_engine.engine.transfer import Glance, to_device, to_host
from nla_engine.errors import EngineError
from nla_engine.ops.encode import RowStage, encode_rows
from nla_engine.ops.places import row_places, row_places_reference
from nla_engine.sites import Site
from nla_engine.store import LayerRows

#: Most bytes of pinned host memory to allocate before the run.
_PINNED_BYTES = 1 << 28
#: The norm of an unwritten row.
_UNWRITTEN = -1.0

#: Takes a request's id and what it generated, int32 [n]; returns the positions to collect, int64 [k], ascending.
Choose = Callable[[int, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class RowRange:
    """Which positions of a sequence are kept: one contiguous range.

    Every union of the named policies is contiguous, since all of them touch the prompt's end.
    """

    names: tuple[str, ...]

    @classmethod
    def parse(cls, positions: str) -> RowRange:
        return cls(tuple(positions.split(",")))

    def first(self, prompt_size: int) -> int:
        """First position kept."""
        starts = {"all": 0, "prompt": 0, "last": prompt_size - 1, "generated": prompt_size}
        return min(starts[name] for name in self.names)

    def end(self, prompt_size: int, size: int) -> int:
        """One past the last position kept, in a sequence of `size` tokens."""
        ends = {"all": size, "prompt": prompt_size, "last": prompt_size, "generated": size}
        return max(ends[name] for name in self.names)

    @property
    def covers_prompts(self) -> bool:
        """Whether every token of a prompt has a row."""
        return self.first(2) < 1

    @property
    def touches_prompts(self) -> bool:
        """Whether any token of a prompt has a row."""
        return self.first(2) < 2

    def count(self, prompt_size: int, size: int) -> int:
        return max(self.end(prompt_size, size) - self.first(prompt_size), 0)


class RowTap:
    """Encodes the rows of `layers` in the range `rows` into staging buffers of `rows_per_slot` rows per slot and site.

    layers: sites, each as a layer's number where it is a block's output
    sink_norm: by site; rows with a larger norm are sinks, and kept exactly as well
    choose: which rows of the range to collect once a sequence has ended; None: all
    skip_sinks: of these, leave out the sinks of any layer, but not rows that are not finite
    reference: use plain torch only
    Implements `engine.tap.Tap`, which the generator calls.
    """

    def __init__(
        self,
        layers: Sequence[Site | int],
        codec: Codec,
        rows: RowRange,
        *,
        rows_per_slot: int,
        sink_norm: Mapping[Site, float],
        device: torch.device,
        choose: Choose | None = None,
        skip_sinks: bool = False,
        reference: bool = False,
    ) -> None:
        self.layers = tuple(map(Site.at, layers))
        self.codec, self.rows, self.sink_norm = codec, rows, sink_norm
        self.choose, self.skip_sinks = choose, skip_sinks
        self.rows_per_slot = rows_per_slot
        self._device = device
        self._row_places = row_places_reference if reference else row_places
        self._backend = "torch" if reference else None
        self._places: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def reads_prompts(self) -> bool:
        """Whether rows of prompts are kept."""
        return self.rows.touches_prompts

    def allocate(self, slots: int, *, generated: int, given: int) -> None:
        """Allocate staging buffers, and room for rows kept exactly: at worst all those between two `settle`."""
        written = generated + (given if self.rows.covers_prompts else slots)
        if self.codec.name == "bf16":
            written = 1  # its codes are exact, so no row is kept twice
        self._counts = torch.zeros(len(self.layers), dtype=torch.int32, device=self._device)
        self._seen = Glance(self._counts)  # one read for all layers
        self.stages = {}
        for i, layer in enumerate(self.layers):
            stage = RowStage.allocate(self.codec, (slots + 1) * self.rows_per_slot, written, self._device)
            self.stages[layer] = replace(stage, exact_count=self._counts[i : i + 1])
        self._first = torch.zeros(slots + 1, dtype=torch.int64, device=self._device)
        self._end = torch.zeros_like(self._first)
        self._prompt_size = np.zeros(slots + 1, np.int64)
        self._exact: dict[Site, dict[int, tuple[np.ndarray, np.ndarray]]] = {
            layer: {} for layer in self.layers
        }

    def __call__(self, layer: Site, hidden: torch.Tensor, slot: torch.Tensor, position: torch.Tensor) -> None:
        """Encode the rows of hidden [T, d] whose (slot, position) is kept. Launches only: no synchronisation."""
        if self._places is None or self._places[0] is not position:  # once per pass, not per layer
            places = self._row_places(slot, position, self._first, self._end, self.rows_per_slot)
            self._places = (position, places)
        stage, sink_norm = self.stages[layer], self.sink_norm[layer]
        encode_rows(hidden, self._places[1], stage, sink_norm, with_backend=self._backend)

    def prepare(self) -> None:
        """Allocate pinned memory for the first large collection."""
        if not self._first.is_cuda:
            return
        room, held = _PINNED_BYTES, []
        for stage in self.stages.values():
            for tensor in (stage.codes, stage.scales, stage.norm):
                size = min(tensor.nbytes, room)
                held.append(torch.empty(size, dtype=torch.uint8, pin_memory=True))
                room -= size
        held.clear()  # the allocator keeps them

    def open(self, slots: list[int], prompt_sizes: list[int], totals: list[int]) -> None:
        """Mark every row of these slots as unwritten. EngineError if a sequence has too many rows."""
        first = [self.rows.first(size) for size in prompt_sizes]
        end = [self.rows.end(size, total) for size, total in zip(prompt_sizes, totals, strict=True)]
        if any(b - a > self.rows_per_slot for a, b in zip(first, end, strict=True)):
            raise EngineError("a sequence has more rows to keep than its slot has room for")
        columns = to_device(np.array([slots, first, end]), self._first.device)
        self._first[columns[0]], self._end[columns[0]] = columns[1], columns[2]
        self._prompt_size[slots] = prompt_sizes
        for layer, stage in self.stages.items():
            stage.norm.view(-1, self.rows_per_slot)[columns[0]] = _UNWRITTEN
            for slot in slots:
                self._exact[layer].pop(slot, None)

    def look(self, *, decoded: bool) -> None:
        """Queue a read of how many rows were kept exactly. Prompts whose rows are not kept need none."""
        if decoded or self.rows.touches_prompts:
            self._seen.take()

    def settle(self, slots: list[int], sizes: list[int]) -> list[KeptRows]:
        """Fetch the rows kept exactly, if a sequence ended or the last `look` saw one."""
        if slots or any(self._seen.read()):
            self._fetch_exact()
        row_bytes = self.codec.row_bytes * len(self.layers)
        ended = []
        for slot, size in zip(slots, sizes, strict=True):
            exact = sum(part.nbytes for held in self._exact.values() if slot in held for part in held[slot])
            ended.append(KeptRows(slot, size, self._count(slot, size) * row_bytes + exact))
        return ended

    def _fetch_exact(self) -> None:
        """Copy the rows kept exactly to the host, where they stay until their sequences end."""
        counts = self._counts.tolist()
        if not any(counts):
            return
        self._counts.zero_()
        for (layer, stage), count in zip(self.stages.items(), counts, strict=True):
            if count > len(stage.exact):
                raise EngineError(f"{layer.label}: {count} rows to keep exactly, room for {len(stage.exact)}")
            dest = stage.exact_dest[:count].cpu().numpy()
            bits = stage.exact[:count].cpu().numpy().view(np.uint16)
            for slot in np.unique(dest // self.rows_per_slot):
                mine = dest // self.rows_per_slot == slot
                index, rows = dest[mine] % self.rows_per_slot, bits[mine]
                if (known := self._exact[layer].get(int(slot))) is not None:
                    index, rows = np.concatenate([known[0], index]), np.concatenate([known[1], rows])
                self._exact[layer][int(slot)] = (index, rows)

    def _count(self, slot: int, size: int) -> int:
        """Rows in the range of the sequence in a slot, once it has `size` tokens."""
        return self.rows.count(int(self._prompt_size[slot]), size)

    def collect(
        self, ended: Sequence[KeptRows], replies: Sequence[tuple[int, np.ndarray]]
    ) -> list[tuple[np.ndarray, dict[Site, LayerRows]]]:
        """Of each ended sequence the positions chosen, and their rows by site. EngineError if one was never written.

        Only these rows leave the device. Sinks are known by the norms, which come first.
        """
        slots = np.array([kept.slot for kept in ended])
        chosen = [self._chosen(kept, *reply) for kept, reply in zip(ended, replies, strict=True)]
        first = np.array([self.rows.first(int(self._prompt_size[slot])) for slot in slots])
        owner = np.repeat(np.arange(len(ended)), [len(positions) for positions in chosen])
        position = np.concatenate(chosen)
        at = self._on_device(slots, position - first[owner], owner)
        norms = {layer: to_host(stage.norm[at]) for layer, stage in self.stages.items()}
        for layer, norm in norms.items():
            if missing := int((norm == _UNWRITTEN).sum()):
                raise EngineError(f"{layer.label}: {missing} rows of sequences that ended were never written")
        if self.skip_sinks:
            stays = ~self._sinks(norms)
            owner, position = owner[stays], position[stays]
            norms = {layer: norm[stays] for layer, norm in norms.items()}
            at = self._on_device(slots, position - first[owner], owner)
        borders = np.searchsorted(owner, [np.arange(len(ended)), np.arange(1, len(ended) + 1)])
        parts = [slice(int(start), int(end)) for start, end in borders.T]
        collected: list[tuple[np.ndarray, dict[Site, LayerRows]]] = [(position[part], {}) for part in parts]
        for layer, stage in self.stages.items():
            norm = norms[layer]
            codes, scales = to_host(stage.codes[at]), to_host(stage.scales[at])
            codes = codes.view(self.codec.code_dtype)
            exact = np.zeros(0, np.int64)
            if self.codec.name != "bf16":
                exact = np.flatnonzero(exact_rows(norm, self.sink_norm[layer]))
            for i, part in enumerate(parts):
                mine = exact[slice(*np.searchsorted(exact, [part.start, part.stop]))]
                bits = self._exact_bits(layer, int(slots[i]), position[mine] - first[i])
                collected[i][1][layer] = LayerRows(
                    codes[part], scales[part], norm[part], mine - part.start, bits
                )
        return collected

    def _chosen(self, kept: KeptRows, id_: int, generated: np.ndarray) -> np.ndarray:
        """The positions to collect of an ended sequence, int64 [k]. EngineError if one lies outside the range."""
        prompt_size = int(self._prompt_size[kept.slot])
        first, end = self.rows.first(prompt_size), self.rows.end(prompt_size, kept.size)
        if self.choose is None:
            return np.arange(first, end)
        positions = self.choose(id_, generated)
        if len(positions) and not first <= positions[0] <= positions[-1] < end:
            raise EngineError(f"request {id_}: a row was chosen outside of positions {first} to {end - 1}")
        return positions

    def _on_device(self, slots: np.ndarray, index: np.ndarray, owner: np.ndarray) -> torch.Tensor:
        """Places in the staging buffers, int64 [n], on the device. index: of each row in its slot."""
        return to_device(slots[owner] * self.rows_per_slot + index, self._first.device)

    def _sinks(self, norms: Mapping[Site, np.ndarray]) -> np.ndarray:
        """bool [n]: the rows that are sinks in some layer, and finite in all. norms: float32 [n], by site."""
        sinks = np.logical_or.reduce([norm > self.sink_norm[layer] for layer, norm in norms.items()])
        finite: np.ndarray = np.logical_and.reduce([np.isfinite(norm) for norm in norms.values()])
        return sinks & finite

    def _exact_bits(self, layer: Site, slot: int, wanted: np.ndarray) -> np.ndarray:
        """bfloat16 bits, uint16 [m, d], of the rows `wanted` [m] of a slot. EngineError if one was not fetched."""
        none = np.zeros((0, self.codec.d_model), np.uint16)
        if not len(wanted):
            return none
        index, rows = self._exact[layer].get(slot, (np.zeros(0, np.int64), none))
        order = {int(row): place for place, row in enumerate(index)}
        if any(int(row) not in order for row in wanted):
            raise EngineError(f"{layer.label}: a row that must be kept exactly is missing")
        return rows[[order[int(row)] for row in wanted]]
