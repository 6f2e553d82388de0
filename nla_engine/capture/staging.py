"""Where rows lie on the device until they leave: a ring of places per slot for decode steps, places for one pass.

Their number depends on slots and layers, not on how long sequences become. Every place that may be written next has the
norm of an unwritten row. Copies out of a place, its new mark and its next row are queued on one stream, in this order,
so a row cannot be overwritten before it has been copied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from nla_engine.codec.rows import Codec
from nla_engine.engine.transfer import Glance, to_device
from nla_engine.errors import EngineError
from nla_engine.ops.encode import RowStage
from nla_engine.sites import Site

#: Most bytes of the rings, of the places of a pass, and of the rows kept exactly, over all layers.
RING_BYTES, PASS_BYTES, EXACT_BYTES = 7 << 27, 3 << 27, 1 << 28
#: Rows kept exactly that were fetched may take one part in so many of the room of others.
_RESTING = 8
#: The norm of an unwritten row.
UNWRITTEN = -1.0


@dataclass(frozen=True)
class Rows:
    """Encoded rows, one after the other. codes [n, ...], scales [n, ...], norm [n], on the device."""

    codes: torch.Tensor
    scales: torch.Tensor
    norm: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.codes, self.scales, self.norm)


@dataclass(frozen=True)
class ExactRows:
    """Rows of a layer kept exactly, bfloat16 bits uint16 [n, d], and their places int64 [n]."""

    place: np.ndarray
    bits: np.ndarray


class Staging:
    """Buffers of all layers. In each layer, slot s has the places s * ring to (s + 1) * ring - 1, and a prefill pass
    those from `given` on.

    ring: places per slot; given_size: places of a pass
    decoding, reading: by layer, where decode steps and prefill passes encode to
    """

    def __init__(
        self,
        layers: Sequence[Site],
        codec: Codec,
        *,
        slots: int,
        longest: int,
        steps: int,
        given: int,
        device: torch.device,
    ) -> None:
        """longest: rows of the longest sequence; steps: most decode steps before rows can leave; given: most tokens of
        a pass."""
        self.layers, self.row_bytes = tuple(layers), codec.row_bytes * len(layers)
        shared = RING_BYTES // (self.row_bytes * (slots + 1))
        self.ring = min(longest, max(shared, 2 * steps))
        self.given_size = max(min(given, PASS_BYTES // self.row_bytes), 1)
        self.given = (slots + 1) * self.ring
        self.size = self.given + self.given_size
        stage = RowStage.allocate(codec, len(layers) * self.size, 1, device)
        self.all = Rows(stage.codes, stage.scales, stage.norm)
        self._norm = stage.norm.view(len(layers), self.size)
        # A look may miss what steps queued after it write; the next look sees that. Rows that were fetched stay until
        # there are `_resting` of them.
        unseen = max(steps // 2, 1)
        exact = [slots * (steps + unseen), self.given_size] if codec.name != "bf16" else [1, 1]
        exact = [count + count // _RESTING for count in exact]
        if (bytes_ := sum(exact) * 2 * codec.d_model * len(layers)) > EXACT_BYTES:
            exact = [max(count * EXACT_BYTES // bytes_, 1) for count in exact]
        self._resting = np.array(exact)[:, None] // (_RESTING + 1)
        self._counts = torch.zeros(2, len(layers), dtype=torch.int32, device=device)
        self._seen = Glance(self._counts)  # one read for all
        self._taken = np.zeros(self._counts.shape, np.int64)  # how many of them were fetched
        self.decoding: dict[Site, RowStage] = {}
        self.reading: dict[Site, RowStage] = {}
        for i, layer in enumerate(layers):
            part = slice(i * self.size, (i + 1) * self.size)
            views = {name: getattr(stage, name)[part] for name in ("codes", "scales", "norm")}
            for number, stages in enumerate((self.decoding, self.reading)):
                pool = RowStage.allocate(codec, 0, exact[number], device)
                stages[layer] = replace(pool, **views, exact_count=self._counts[number, i : i + 1])

    @property
    def nbytes(self) -> int:
        """Of the rows, and of the rows kept exactly."""
        exact = [stage.exact for stages in (self.decoding, self.reading) for stage in stages.values()]
        return sum(tensor.nbytes for tensor in (*self.all.tensors, *exact))

    def forget(self, slots: torch.Tensor) -> None:
        """Mark every place of these slots, int64 [n], as unwritten."""
        self._norm[:, : self.given].view(len(self.layers), -1, self.ring)[:, slots] = UNWRITTEN

    def expect(self, rows: int) -> None:
        """Mark the places of the next pass as unwritten."""
        self._norm[:, self.given : self.given + rows] = UNWRITTEN

    def by_row(self, place: np.ndarray) -> np.ndarray:
        """Indices of these places int64 [n] in every layer, the layers of a row side by side: int64 [n * layers]."""
        index: np.ndarray = place[:, None] + np.arange(len(self.layers)) * self.size
        return index.ravel()

    def leaving(self, index: np.ndarray) -> Rows:
        """Copies of the rows at these indices, int64 [n], whose places are marked as unwritten afterwards."""
        at = to_device(index, self._norm.device)
        rows = Rows(*(tensor[at] for tensor in self.all.tensors))
        self.all.norm.index_fill_(0, at, UNWRITTEN)
        return rows

    def look(self) -> None:
        """Queue a read of how many rows were kept exactly."""
        self._seen.take()

    def take_exact(self) -> Mapping[Site, list[ExactRows]]:
        """The rows kept exactly that the last look saw and no earlier call returned, by layer: those of decode steps in
        the order in which they were written, then those of prefill passes. Waits for what was queued after the look
        only if rows that were fetched have to make room.

        EngineError if there were more than there is room for.
        """
        found: dict[Site, list[ExactRows]] = {layer: [] for layer in self.layers}
        counts = np.array(self._seen.read()[0])
        if (counts == self._taken).all():
            return found
        if full := bool((counts > self._resting).any()):
            counts = self._counts.cpu().numpy()
        for number, stages in enumerate((self.decoding, self.reading)):
            for i, (layer, stage) in enumerate(stages.items()):
                new = slice(int(self._taken[number, i]), int(counts[number, i]))
                if new.stop > len(stage.exact):
                    raise EngineError(
                        f"{layer.label}: {new.stop} rows to keep exactly at once, room for {len(stage.exact)}: "
                        "capture fewer layers at once, or use --codec bf16, which keeps every row exactly"
                    )
                if new.start < new.stop:
                    place, bits = (
                        self._seen.fetch(lambda tensor=tensor, new=new: tensor[new])  # type: ignore[misc]
                        for tensor in (stage.exact_dest, stage.exact)
                    )
                    found[layer].append(ExactRows(place, bits.view(np.uint16)))
        self._taken = counts
        if full:
            self._counts.zero_()
            self._taken = np.zeros_like(counts)
            self.look()
        return found
