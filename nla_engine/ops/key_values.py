"""One layer's part of the cache, as attention reads it: blocks of places, and which of them each slot holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class KeyValues:
    """One layer's keys and values: [blocks, size, KV, h] of all slots, [P, KV, h] of the shared prefix.

    table: int32 [slots, columns], the block of each `size` places of a slot. The last column is never used: the
    kernel reads one entry ahead.
    """

    keys: torch.Tensor
    values: torch.Tensor
    prefix_keys: torch.Tensor
    prefix_values: torch.Tensor
    table: torch.Tensor

    @property
    def prefix_size(self) -> int:
        return self.prefix_keys.shape[0]

    @property
    def size(self) -> int:
        """Places in a block."""
        return self.keys.shape[1]

    def places(self, slot: int | torch.Tensor, end: int, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of the keys and values at places [first, end) of a slot, [n, KV, h], or of slots int64 [B],
        [B, n, KV, h]."""
        start = first // self.size
        blocks = self.table[slot, start : -(-end // self.size)].long()
        at = slice(first - start * self.size, end - start * self.size)
        keys, values = (held[blocks].flatten(-4, -3)[..., at, :, :] for held in (self.keys, self.values))
        return keys, values
