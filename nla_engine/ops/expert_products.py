"""The products of a mixture of experts, each row with the weights of its own expert: references in torch, one Triton
kernel, which also gathers the rows, adds the biases and gates.

    both = x[token] w[expert] + bias[expert];     y = act(g) * u     with [g, u] = both, side by side

or, of gpt-oss, neighbours in `both`:  y = g sigmoid(alpha g) (u + 1),  g <= limit, |u| <= limit.

float32 inside, rounded once (transformers also rounds the product, its sum with the bias and each step of the gate).
The channels of a row are summed in the same order whatever other rows there are, for one height of tiles. A decode step
is bound by reading the weights: a program reads its columns of one expert's weights once for up to `height` rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nla_engine.ops.backends import has_triton
from nla_engine.ops.cards import HOPPER, card_of
from nla_engine.ops.expert_order import ExpertOrder
from nla_engine.ops.gate import activated, gate_reference, over_one_and
from nla_engine.ops.triton_module import tl, triton


@dataclass(frozen=True)
class ExpertGate:
    """kind: "silu" or "gelu" (tanh-approximated), [g, u] side by side; or "clamped", gpt-oss's, with its constants."""

    kind: str
    alpha: float = 0.0
    limit: float = 0.0


#: Rows of a tile: where the weights' memory is the bound, and where the products are.
_LOW, _HIGH = 64, 128
#: The kernel's numbers for gates. 0: none.
_NUMBERS = {"silu": 1, "gelu": 2, "clamped": 3}


@dataclass(frozen=True)
class Tile:
    """What one program computes: rows, columns of the weights, channels summed at a time; its warps and stages."""

    rows: int
    columns: int
    channels: int
    warps: int
    stages: int


def expert_product(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    order: ExpertOrder,
    gate: ExpertGate | None = None,
) -> torch.Tensor:
    """The rows of `order` times the weights of their experts, plus their bias: [S, n], or gated [S, n / 2].

    x: with a gate, contiguous [T, k], a row per token; without, [S, k], in the order's places. w: [E, k, n], of which
    the channels or the columns are neighbours in memory. bias: contiguous [E, n] or None.
    Triton where it runs, else the reference.
    """
    run = expert_product_triton if has_triton(x.device) else expert_product_reference
    return run(x, w, bias, order, gate)


def expert_product_reference(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    order: ExpertOrder,
    gate: ExpertGate | None = None,
) -> torch.Tensor:
    """`expert_product` as a loop over the experts, which also rounds the product."""
    rows = x if gate is None else x[order.token.long()]
    parts, begin = [], 0
    for expert, end in enumerate(order.ends.tolist()):
        both = rows[begin:end] @ w[expert]
        parts.append(both if bias is None else both + bias[expert])
        begin = end
    both = torch.cat(parts)
    return both if gate is None else gated_reference(both, gate)


def gated_reference(both: torch.Tensor, gate: ExpertGate) -> torch.Tensor:
    """both [S, n] -> [S, n / 2], rounded once."""
    if gate.kind != "clamped":
        return gate_reference(both, gate.kind)
    g, u = both.float()[:, ::2].clamp(max=gate.limit), both.float()[:, 1::2].clamp(-gate.limit, gate.limit)
    return (g * torch.sigmoid(gate.alpha * g) * (u + 1)).to(both.dtype)


def expert_product_triton(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    order: ExpertOrder,
    gate: ExpertGate | None = None,
) -> torch.Tensor:
    """`expert_product` as one launch: a program per tile of rows and columns.

    ValueError for x or bias that are not contiguous, and weights without neighbours.
    """
    _, k, n = w.shape
    if not x.is_contiguous() or not (bias is None or bias.is_contiguous()) or 1 not in w.stride()[1:]:
        raise ValueError("rows and biases are contiguous, and so are channels or columns of weights")
    tile = tile_for(order.height, x.device, x.itemsize)
    out = x.new_empty((len(order.token), n if gate is None else n // 2))
    columns = triton.cdiv(n, tile.columns)
    _product_kernel[(columns, len(order.tile_row))](
        x,
        w,
        bias,
        out,
        order.token,
        order.ends,
        order.tile_expert,
        order.tile_row,
        k,
        n,
        *w.stride(),
        gate.alpha if gate else 0.0,
        gate.limit if gate else 0.0,
        GATE=_NUMBERS[gate.kind] if gate else 0,
        EVEN=k % tile.channels == 0,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        CHANNELS=tile.channels,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


def height_for(rows: int, experts: int) -> int:
    """Rows of a tile where so many rows are of so many experts."""
    return _LOW if rows <= _LOW * experts else _HIGH


def tile_for(height: int, device: torch.device, itemsize: int) -> Tile:
    """The fastest measured on an H100 for tiles of so many rows, or what fits the shared memory of any card."""
    channels = 128 // itemsize
    if height <= _LOW:
        return Tile(height, 128, channels, 4, 4)
    wide = device.type != "cuda" or card_of(device).capability == HOPPER
    return Tile(height, 256 if wide else 128, channels, 8, 3)


# What is cut from one tensor is aligned by chance.
@triton.jit(do_not_specialize_on_alignment=["token", "ends", "tile_expert", "tile_row"])
def _product_kernel(
    x,  # [T, k] with a gate, else [S, k]
    w,  # [E, k, n], w_expert, w_channel and w_column apart
    bias,  # [E, n] or None
    out,  # [S, n / 2] with a gate, else [S, n]
    token,  # [S]
    ends,  # [E]
    tile_expert,  # as in ExpertOrder
    tile_row,
    k,
    n,
    w_expert,
    w_channel,
    w_column,
    alpha,
    limit,
    GATE: tl.constexpr,
    EVEN: tl.constexpr,  # k is a multiple of CHANNELS
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    expert = tl.load(tile_expert + tl.program_id(1)).to(tl.int64)
    if expert >= 0:
        row = tl.load(tile_row + tl.program_id(1)) + tl.arange(0, ROWS)
        real = row < tl.load(ends + expert)
        source = tl.load(token + row, mask=real, other=0) if GATE else row
        channel = tl.arange(0, CHANNELS)
        HALF: tl.constexpr = COLUMNS // 2
        SIDE: tl.constexpr = (
            GATE == 1 or GATE == 2
        )  # gate and up stand side by side: two products of half the columns
        WIDTH: tl.constexpr = HALF if SIDE else COLUMNS
        column = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
        width = n // 2 if SIDE else n
        inside = column < width
        x_at = x + source.to(tl.int64)[:, None] * k + channel[None, :]
        w_at = w + expert * w_expert + channel[:, None] * w_channel + column[None, :] * w_column
        first = tl.zeros([ROWS, WIDTH], tl.float32)
        second = tl.zeros([ROWS, WIDTH], tl.float32)
        for start in range(0, k, CHANNELS):
            if EVEN:
                a = tl.load(x_at, mask=real[:, None], other=0.0)
                b = tl.load(w_at, mask=inside[None, :], other=0.0)
            else:
                left = channel < k - start
                a = tl.load(x_at, mask=real[:, None] & left[None, :], other=0.0)
                b = tl.load(w_at, mask=inside[None, :] & left[:, None], other=0.0)
            first = tl.dot(a, b, first, input_precision="ieee")
            if SIDE:
                if EVEN:
                    b = tl.load(w_at + width * w_column, mask=inside[None, :], other=0.0)
                else:
                    b = tl.load(w_at + width * w_column, mask=inside[None, :] & left[:, None], other=0.0)
                second = tl.dot(a, b, second, input_precision="ieee")
            x_at += CHANNELS
            w_at += CHANNELS * w_channel
        if bias is not None:
            bias_at = bias + expert * n + column
            first += tl.load(bias_at, mask=inside, other=0.0).to(tl.float32)[None, :]
            if SIDE:
                second += tl.load(bias_at + width, mask=inside, other=0.0).to(tl.float32)[None, :]
        if SIDE:
            y = activated(first, GATE == 1) * second
        elif GATE == 3:
            g, u = tl.split(tl.reshape(first, (ROWS, HALF, 2)))
            g = tl.minimum(g, limit)
            u = tl.minimum(tl.maximum(u, -limit), limit)
            y = over_one_and(g, g * (alpha * -1.4426950408889634)) * (u + 1.0)  # log2(e)
            column = tl.program_id(0) * HALF + tl.arange(0, HALF)
            width = n // 2
        else:
            y = first
        to = out + row.to(tl.int64)[:, None] * width + column[None, :]
        tl.store(to, y.to(out.dtype.element_ty), mask=real[:, None] & (column < width)[None, :])
