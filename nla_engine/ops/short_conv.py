"""A causal convolution over the last k tokens of a sequence, in plain torch.

    y_t = sum_j w[j] row_{t - k + 1 + j}        row at negative positions is 0; per channel

Of every slot the last k - 1 rows are kept, that of position p at p % (k - 1). Sums are in float32.
"""

from __future__ import annotations

import torch


def step(
    row: torch.Tensor, weight: torch.Tensor, kept: torch.Tensor, slot: torch.Tensor, position: torch.Tensor
) -> torch.Tensor:
    """One token per slot. row [T, C], weight [C, k], kept [slots, k - 1, C], changed; slot, position int64 [T].

    Returns y float32 [T, C]. No synchronisation; runs inside CUDA graphs.
    """
    before = weight.shape[1] - 1
    at = position[:, None] + torch.arange(-before, 0, device=row.device)
    past = kept[slot[:, None], at % before].masked_fill((at < 0)[..., None], 0.0)
    kept[slot, position % before] = row
    read = torch.cat([past, row[:, None]], 1).float()
    return (read * weight.float().T).sum(1)


def run(row: torch.Tensor, weight: torch.Tensor, kept: torch.Tensor, slot: int, start: int) -> torch.Tensor:
    """Consecutive tokens [T, C] of one slot from position `start` on -> y float32 [T, C]. Otherwise as `step`."""
    before = weight.shape[1] - 1
    at = torch.arange(start - before, start, device=row.device)
    past = kept[slot, at % before].masked_fill((at < 0)[:, None], 0.0)
    read = torch.cat([past, row])
    count = min(before, len(row))
    last = torch.arange(start + len(row) - count, start + len(row), device=row.device)
    kept[slot, last % before] = row[-count:]
    wide = weight.float()
    total = sum(read[j : j + len(row)].float() * wide[:, j] for j in range(before + 1))
    assert isinstance(total, torch.Tensor)
    return total
