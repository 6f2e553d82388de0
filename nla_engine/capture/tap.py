"""The tap: rows of the residual stream, encoded on the device the moment a block has computed them.

A row's place in the staging buffers is computed from (slot, position), like a key's place in the slot cache, so a row
cannot land elsewhere; `collect` refuses a sequence of which any row was not written. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from nla_engine.codec.rows import Codec, exact_rows
from nla_engine.engine.transfer import Glance, to_device, to_host
from nla_engine.errors import EngineError
from nla_engine.ops.encode import RowStage, encode_rows
from nla_engine.ops.places import row_places, row_places_reference
from nla_engine.store import LayerRows

#: Most pinned host memory to have ready before the run.
_PINNED_BYTES = 1 << 28
#: What the norm of a row that nothing wrote reads as.
_UNWRITTEN = -1.0


@dataclass(frozen=True)
class RowRange:
    """Which positions of a sequence are kept: a run from (prompt_size if from_prompt_end else 0) + start on.

    Every union of the named policies is one run, since all of them touch the prompt's end.
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
        """Position behind the last one kept, of a sequence of `size` tokens."""
        ends = {"all": size, "prompt": prompt_size, "last": prompt_size, "generated": size}
        return max(ends[name] for name in self.names)

    def count(self, prompt_size: int, size: int) -> int:
        return max(self.end(prompt_size, size) - self.first(prompt_size), 0)


class RowTap:
    """Encodes the kept rows of `layers` into staging buffers of `rows_per_slot` rows a slot and layer.

    exact_capacity: most rows of one layer that may have to be kept exactly between two polls.
    reference: places of rows by plain torch, as `--kernels reference` asks; the encoder goes by what is built.
    """

    def __init__(
        self,
        layers: tuple[int, ...],
        codec: Codec,
        rows: RowRange,
        *,
        slots: int,
        rows_per_slot: int,
        exact_capacity: int,
        sink_norm: Mapping[int, float],
        device: torch.device,
        reference: bool = False,
    ) -> None:
        self._row_places = row_places_reference if reference else row_places
        self.codec, self.rows, self.sink_norm = codec, rows, sink_norm
        self.rows_per_slot = rows_per_slot
        self._counts = torch.zeros(len(layers), dtype=torch.int32, device=device)  # one look for all layers
        self._seen = Glance(self._counts)
        self.stages = {}
        for i, layer in enumerate(layers):
            stage = RowStage.allocate(codec, (slots + 1) * rows_per_slot, exact_capacity, device)
            self.stages[layer] = replace(stage, exact_count=self._counts[i : i + 1])
        self._places: tuple[torch.Tensor, torch.Tensor] | None = None
        self._first = torch.zeros(slots + 1, dtype=torch.int64, device=device)
        self._end = torch.zeros_like(self._first)
        self._prompt_size = np.zeros(slots + 1, np.int64)
        self._exact: dict[int, dict[int, tuple[np.ndarray, np.ndarray]]] = {layer: {} for layer in layers}

    def __call__(self, layer: int, hidden: torch.Tensor, slot: torch.Tensor, position: torch.Tensor) -> None:
        """Encode the rows of hidden [T, d] whose (slot, position) is to be kept. Launches only: no synchronisation."""
        if self._places is None or self._places[0] is not position:  # once a pass, not once a layer
            places = self._row_places(slot, position, self._first, self._end, self.rows_per_slot)
            self._places = (position, places)
        encode_rows(hidden, self._places[1], self.stages[layer], self.sink_norm[layer])

    def prepare(self) -> None:
        """Have pinned memory ready for the first large collection; last, since capturing a graph gives it back."""
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

    @property
    def keeps_given(self) -> bool:
        return self.rows.first(2) < 2

    def glance(self) -> None:
        self._seen.take()

    def waits(self) -> bool:
        """Whether rows that must be kept exactly were there at the last glance."""
        return any(self._seen.read())

    def poll(self) -> None:
        """Fetch the rows kept exactly since the last poll."""
        counts = self._counts.tolist()
        if not any(counts):
            return
        self._counts.zero_()
        for (layer, stage), count in zip(self.stages.items(), counts, strict=True):
            if count > len(stage.exact):
                raise EngineError(f"layer {layer}: {count} rows to keep exactly, room for {len(stage.exact)}")
            dest = stage.exact_dest[:count].cpu().numpy()
            bits = stage.exact[:count].cpu().numpy().view(np.uint16)
            for slot in np.unique(dest // self.rows_per_slot):
                mine = dest // self.rows_per_slot == slot
                index, rows = dest[mine] % self.rows_per_slot, bits[mine]
                if (known := self._exact[layer].get(int(slot))) is not None:
                    index, rows = np.concatenate([known[0], index]), np.concatenate([known[1], rows])
                self._exact[layer][int(slot)] = (index, rows)

    def _row_counts(self, slots: list[int], sizes: list[int]) -> list[int]:
        """Rows of sequences that ended with `size` tokens."""
        return [
            self.rows.count(int(self._prompt_size[s]), size) for s, size in zip(slots, sizes, strict=True)
        ]

    def nbytes(self, slots: list[int], sizes: list[int]) -> list[int]:
        """Bytes of the rows of each sequence as `collect` would give them, after a poll."""
        row_bytes = self.codec.row_bytes * len(self.stages)
        exact = [
            sum(part.nbytes for held in self._exact.values() if s in held for part in held[s]) for s in slots
        ]
        return [n * row_bytes + more for n, more in zip(self._row_counts(slots, sizes), exact, strict=True)]

    def collect(self, slots: list[int], sizes: list[int]) -> list[dict[int, LayerRows]]:
        """The rows of ended sequences, by layer. EngineError if one is missing."""
        counts = self._row_counts(slots, sizes)
        places = [np.arange(n) + s * self.rows_per_slot for s, n in zip(slots, counts, strict=True)]
        at = to_device(np.concatenate(places), self._first.device)
        ends = np.cumsum(counts)
        starts = ends - counts
        collected: list[dict[int, LayerRows]] = [{} for _ in slots]
        for layer, stage in self.stages.items():
            codes, scales, norm = (to_host(a[at]) for a in (stage.codes, stage.scales, stage.norm))
            codes = codes.view(self.codec.code_dtype)
            if missing := int((norm == _UNWRITTEN).sum()):
                raise EngineError(f"layer {layer}: {missing} rows of sequences that ended were never written")
            exact = np.zeros(0, np.int64)
            if self.codec.name != "bf16":
                exact = np.flatnonzero(exact_rows(norm, self.sink_norm[layer]))
            borders = np.searchsorted(exact, [starts, ends])
            for i, slot in enumerate(slots):
                mine = slice(starts[i], ends[i])
                index = exact[slice(*borders[:, i])] - starts[i]
                bits = self._exact_bits(layer, slot, index)
                collected[i][layer] = LayerRows(codes[mine], scales[mine], norm[mine], index, bits)
        return collected

    def _exact_bits(self, layer: int, slot: int, wanted: np.ndarray) -> np.ndarray:
        """uint16 [m, d] of the rows `wanted` [m] of a slot, as they were polled."""
        none = np.zeros((0, self.codec.d_model), np.uint16)
        if not len(wanted):
            return none
        index, rows = self._exact[layer].get(slot, (np.zeros(0, np.int64), none))
        order = {int(row): place for place, row in enumerate(index)}
        if any(int(row) not in order for row in wanted):
            raise EngineError(f"layer {layer}: a row that must be kept exactly is missing")
        return rows[[order[int(row)] for row in wanted]]
