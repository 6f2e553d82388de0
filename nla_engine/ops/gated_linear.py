"""The first half of a gated MLP, act(x Wg^T) * (x Wu^T): a product and a gate, or both in one launch.

The one launch is a CUDA kernel for Hopper (csrc/gated.cu). It keeps gate and up of a result in the registers of one
thread, does not write them to memory, and rounds once. It sums in the same order for any number of rows.
Reference: `ops.linear.linear` and `ops.gate.gate`, which also compute whatever the kernel does not take.
"""

from __future__ import annotations

import math

import torch

from nla_engine import extension
from nla_engine.ops.backends import cuda_fault
from nla_engine.ops.cards import HOPPER, card_of
from nla_engine.ops.gate import gate
from nla_engine.ops.linear import DIFFERENCE, linear

#: n, k and addresses must be multiples of these for the kernel.
_N_MULTIPLE, _K_MULTIPLE, _ALIGNMENT = 8, 64, 16
#: Fixed cost of a tile, in columns.
_TILE_COST = 8
#: Rows of the trial: several tiles, the last one partly filled.
_TRIAL_ROWS = 321
#: Largest difference of one element, relative to itself plus a typical one (of all together: `ops.linear.DIFFERENCE`).
_ELEMENT_DIFFERENCE = 2**-4

#: Rows of x and columns of the result that a CTA computes at a time.
Tile = tuple[int, int]
#: The tiles that passed their trial, by device, shape of w and activation.
_tried: dict[tuple[torch.device, torch.Size, str], tuple[Tile, ...]] = {}


def gated_linear(x: torch.Tensor, w: torch.Tensor, activation: str, tiles: tuple[Tile, ...]) -> torch.Tensor:
    """x [m, k], w [2 n, k] the gate's rows and below them the up projection's -> act(x Wg^T) * (x Wu^T) [m, n].

    activation: "silu" or "gelu" (tanh-approximated); tiles: from `tried_tiles` for w; empty: two launches
    """
    if not tiles or not _fits(x):
        return gated_linear_reference(x, w, activation)
    return gated_linear_cuda(
        x, w, activation, choose_tile(tiles, len(x), len(w) // 2, card_of(x.device).processors)
    )


def gated_linear_reference(x: torch.Tensor, w: torch.Tensor, activation: str) -> torch.Tensor:
    """`gated_linear` as a product and a gate, which also rounds the product."""
    return gate(linear(x, w), activation)


def gated_linear_cuda(
    x: torch.Tensor, w: torch.Tensor, activation: str, tile: Tile, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`gated_linear` as one launch with this tile. out: where to write; None: a new tensor."""
    module = extension.load()
    assert module is not None
    out = x.new_empty((len(x), len(w) // 2)) if out is None else out
    module.gated_linear(
        x.device.index,
        torch.cuda.current_stream(x.device).cuda_stream,
        m=len(x),
        n=len(w) // 2,
        k=x.shape[1],
        silu=activation == "silu",
        tile=tile,
        x=x.data_ptr(),
        w=w.data_ptr(),
        out=out.data_ptr(),
    )
    return out


def has_kernel(device: torch.device) -> bool:
    """Whether the extension has the kernel, and the device is a Hopper GPU that runs it."""
    built = getattr(extension.load(), "gated_tiles", [])
    return (
        bool(built)
        and device.type == "cuda"
        and card_of(device).capability == HOPPER
        and not cuda_fault(device)
    )


def tried_tiles(w: torch.Tensor, activation: str) -> tuple[Tile, ...]:
    """The tiles with which the kernel agrees with product and gate, tried with the first w [2 n, k] of a shape.

    Empty where there is no kernel, or it does not take w's dtype or shape. Call before a graph is captured: the trial
    waits for the device.
    """
    if not has_kernel(w.device):
        return ()
    if not _fits(w) or len(w) % (2 * _N_MULTIPLE) or w.shape[1] % _K_MULTIPLE:
        return ()
    key = (w.device, w.shape, activation)
    if key not in _tried:
        _tried[key] = _try_tiles(w, activation)
    return _tried[key]


@torch.inference_mode()
def _try_tiles(w: torch.Tensor, activation: str) -> tuple[Tile, ...]:
    """The tiles that agree with product and gate on random rows."""
    random = torch.Generator(w.device).manual_seed(0)  # a graph of another thread may use torch's own
    x = torch.randn(_TRIAL_ROWS, w.shape[1], device=w.device, generator=random).to(w.dtype)
    wanted = gated_linear_reference(x, w, activation).float()
    size = wanted.norm()
    room = _ELEMENT_DIFFERENCE * (wanted.abs() + size / wanted.numel() ** 0.5)

    def agrees(tile: Tile) -> bool:
        out = torch.full_like(wanted, math.nan, dtype=x.dtype)  # NaN stays wherever the kernel does not write
        try:
            apart = (gated_linear_cuda(x, w, activation, tile, out).float() - wanted).abs()
        except torch.cuda.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError):  # a driver without what the kernel needs
            return False
        return bool((apart.norm() <= DIFFERENCE * size) & (apart <= room).all())

    module = extension.load()
    assert module is not None
    return tuple(tile for tile in module.gated_tiles if agrees(tile))


def choose_tile(tiles: tuple[Tile, ...], m: int, n: int, processors: int) -> Tile:
    """The tile for a result [m, n]: the least work for the busiest multiprocessor, which computes one tile at a time.

    If all rows fit the lowest tiles, those are used: few rows are bound by reading the weights from memory.
    """
    lowest = min(rows for rows, _ in tiles)
    candidates = [tile for tile in tiles if (tile[0] == lowest) == (m <= lowest)] or tiles

    def cost(tile: Tile) -> int:
        rows, width = tile
        waves = math.ceil(math.ceil(m / rows) * math.ceil(n / width) / processors)
        return waves * rows * (width + _TILE_COST)

    return min(candidates, key=cost)


def _fits(tensor: torch.Tensor) -> bool:
    """Whether the kernel can take a tensor as it is in memory. It always can for those of a block."""
    return (
        tensor.dtype == torch.bfloat16
        and tensor.is_contiguous()
        and tensor.numel() > 0
        and tensor.data_ptr() % _ALIGNMENT == 0
    )
