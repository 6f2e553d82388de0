"""Where a slot's rows go in a ring with a fixed number of rows per slot: reference in torch, one Triton kernel.

place = slot * rows_per_slot + (position - first[slot]) % rows_per_slot
        if first[slot] <= position < end[slot], else -1
"""

from __future__ import annotations

import torch

from nla_engine.ops.backends import has_triton
from nla_engine.ops.triton_module import tl, triton

_BLOCK = 256


def row_places(
    slot: torch.Tensor, position: torch.Tensor, first: torch.Tensor, end: torch.Tensor, rows_per_slot: int
) -> torch.Tensor:
    """slot, position [T]; first, end [slots]; all int64 and contiguous -> int64 [T].

    Triton where it runs, else the reference.
    """
    run = row_places_triton if has_triton(slot.device) else row_places_reference
    return run(slot, position, first, end, rows_per_slot)


def row_places_reference(
    slot: torch.Tensor, position: torch.Tensor, first: torch.Tensor, end: torch.Tensor, rows_per_slot: int
) -> torch.Tensor:
    """`row_places` in plain torch."""
    index = position - first[slot]
    kept = (index >= 0) & (position < end[slot])
    return torch.where(kept, slot * rows_per_slot + index % rows_per_slot, -1)


def row_places_triton(
    slot: torch.Tensor, position: torch.Tensor, first: torch.Tensor, end: torch.Tensor, rows_per_slot: int
) -> torch.Tensor:
    """`row_places` as one launch. Raises ValueError for tensors that are not contiguous int64, or differ in length."""
    for tensor in (slot, position, first, end):
        if tensor.dtype != torch.int64 or not tensor.is_contiguous():
            raise ValueError("slot, position, first and end are contiguous int64")
    if slot.shape != position.shape or first.shape != end.shape:
        raise ValueError("slot and position, first and end have the same length")
    out = torch.empty_like(slot)
    _places_kernel[(triton.cdiv(len(slot), _BLOCK),)](
        slot, position, first, end, out, len(slot), rows_per_slot, BLOCK=_BLOCK, num_warps=4
    )
    return out


# Packed passes have any number of tokens: one compilation serves them all.
@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["slot", "position"])
def _places_kernel(
    slot,  # [tokens]
    position,  # [tokens]
    first,  # [slots]
    end,  # [slots]
    out,  # [tokens]
    tokens,
    rows_per_slot,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = token < tokens
    at = tl.load(slot + token, mask=real, other=0)
    read = tl.load(position + token, mask=real, other=0)
    index = read - tl.load(first + at, mask=real, other=0)
    kept = (index >= 0) & (read < tl.load(end + at, mask=real, other=0))
    tl.store(out + token, tl.where(kept, at * rows_per_slot + index % rows_per_slot, -1), mask=real)
