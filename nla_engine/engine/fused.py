"""Decoder blocks in few launches: merged projections, fused norm and rotation, gate and residual add in the products.

Replaces a block's `forward` where `families` knows its arithmetic. The weights stay the model's own: merged weights
share memory with it. The runner compares the result with transformers before it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn

from nla_engine.engine.attention import current_pass
from nla_engine.engine.families import facts_of, norm_facts
from nla_engine.engine.ranks import Ranks
from nla_engine.ops.fp8 import gate_quantised, quantise, rms_norm_quantised, scaled_linear
from nla_engine.ops.gated_linear import Tile, gated_linear, tried_tiles
from nla_engine.ops.linear import add_linear_, linear, tune
from nla_engine.ops.norm import rms_norm
from nla_engine.ops.rotary import rotate_and_store
from nla_engine.sites import ATTN_OUT, MLP_OUT, RESID_MID

#: Rows of a piece of a long pass whose products are summed over ranks: large enough for a product at full speed.
PIECE_ROWS = 8192


class FusedNorm:
    """Called like the norm it replaces: states [..., d] -> [..., d]."""

    def __init__(self, norm: Any) -> None:
        facts = norm_facts(norm)
        self.weight, self.eps, self.offset = facts.weight, facts.eps, facts.offset

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        return rms_norm(rows, self.weight, self.eps, self.offset).view(hidden_states.shape)


class FusedBlock:
    """Called like the block it replaces, inside a pass of the runner: hidden states [1, T, d] -> [1, T, d].

    The last block returns only the pass's wanted tokens, if it names any. NotFused for a block of no known family.
    taps: by part, what is called with the tensor [T, d] of a site inside the block. It may read the tensor in parallel
    (`Pass.beside`): it is not changed before `Pass.join`.
    ranks: of a block that is a part of one: what its attention and its MLP give is summed over them.
    """

    def __init__(self, block: Any, ranks: Ranks | None = None) -> None:
        facts = facts_of(block)
        self.ranks = ranks
        self.layer, self.shape, self.activation = facts.layer, facts.shape, facts.activation
        self.qkv, self.qkv_bias = merge_layers(*facts.qkv)
        self.out = facts.out.weight
        self.both, _ = merge_layers(*facts.gate_up)
        self.down = facts.down.weight
        self.eps, self.offset, self.head_norm = facts.eps, facts.offset, facts.head_norm
        self.before_attention, self.after_attention = facts.before_attention, facts.after_attention
        self.before_mlp, self.after_mlp = facts.before_mlp, facts.after_mlp
        self.taps: dict[str, Callable[[torch.Tensor], None]] = {}

    @cached_property
    def tiles(self) -> tuple[Tile, ...]:
        """The tiles of the gated product. First needed in the runner's check, before any graph is captured."""
        return tried_tiles(self.both, self.activation)

    def __call__(
        self, hidden_states: torch.Tensor, *, position_embeddings: tuple[torch.Tensor, torch.Tensor], **_: Any
    ) -> torch.Tensor:
        x = hidden_states[0]
        row = linear(rms_norm(x, self.before_attention, self.eps, self.offset), self.qkv, self.qkv_bias)
        inner, x = self._attend(row, x, position_embeddings)
        x = self._add(x, inner, self.out, self.after_attention, ATTN_OUT)
        self._show(RESID_MID, x)
        read = rms_norm(x, self.before_mlp, self.eps, self.offset)
        inner = gated_linear(read, self.both, self.activation, self.tiles)
        return self._add(x, inner, self.down, self.after_mlp, MLP_OUT)[None]

    def _attend(
        self, row: torch.Tensor, x: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """row [T, (H + 2 KV) h] of queries, keys and values -> [T, H h], and x [T, d]; both for wanted tokens only."""
        work = current_pass()
        work.enter(self.layer, self.shape)
        kv = work.cache.layer(self.layer)
        cos, sin = position_embeddings
        query = rotate_and_store(
            row, cos[0], sin[0], kv.keys, kv.values, kv.table, work.slot, work.place, self.head_norm
        )
        attended, x = work.attend_wanted(query, x, self.layer, self.shape)
        work.join()  # the residual stream changes from here on, so wait for the work that reads it in parallel
        return attended.flatten(1), x

    def _add(
        self, x: torch.Tensor, inner: torch.Tensor, weight: torch.Tensor, norm: torch.Tensor | None, part: str
    ) -> torch.Tensor:
        """x + inner @ weight^T. With a norm, the product is normed before the sum. part: the site of what is added."""
        self._wait_for_taps()
        if part in self.taps:
            product = linear(inner, weight)
            product = product if self.ranks is None else self.ranks.sum(product)
            return self._add_shown(x, product, norm, part)
        if self.ranks is None:
            if norm is None:
                return add_linear_(x, inner, weight)  # in place, to save a copy of x
            return rms_norm(linear(inner, weight), norm, self.eps, self.offset, residual=x)
        room = self.ranks.part(len(inner), len(weight), inner.dtype)
        if room is None and len(inner) > PIECE_ROWS:
            return self._add_in_pieces(x, inner, weight, norm)
        product = linear(inner, weight, out=room)
        if norm is None:
            return self.ranks.add(x, product)
        return rms_norm(self.ranks.sum(product), norm, self.eps, self.offset, residual=x)

    def _add_in_pieces(
        self, x: torch.Tensor, inner: torch.Tensor, weight: torch.Tensor, norm: torch.Tensor | None
    ) -> torch.Tensor:
        """`_add` of a long pass over ranks: a piece of its rows is summed while the next one is computed."""
        assert self.ranks is not None
        pieces = [slice(start, start + PIECE_ROWS) for start in range(0, len(inner), PIECE_ROWS)]

        def summed(rows: slice, product: torch.Tensor) -> None:
            if norm is None:
                x[rows].add_(product)
            else:
                x[rows].copy_(rms_norm(product, norm, self.eps, self.offset, residual=x[rows]))

        self.ranks.in_turn(((rows, linear(inner[rows], weight)) for rows in pieces), summed)
        return x

    def _add_shown(
        self, x: torch.Tensor, product: torch.Tensor, norm: torch.Tensor | None, part: str
    ) -> torch.Tensor:
        """x + the product, normed or not, in two steps: what is added is there by itself, as it is in transformers."""
        added = product if norm is None else rms_norm(product, norm, self.eps, self.offset)
        self._show(part, added)
        return x + added

    def _show(self, part: str, states: torch.Tensor) -> None:
        """Give the states [T, d] of a site to its tap, if it has one."""
        if tap := self.taps.get(part):
            tap(states)

    def _wait_for_taps(self) -> None:
        """Before x changes in place or the block ends: a tap of this block may still read in parallel."""
        if self.taps:
            current_pass().join()


class Fp8Block(FusedBlock):
    """The same with products in fp8. Quantised copies of the weights are made here, rows are quantised in each pass."""

    def __init__(self, block: Any) -> None:
        super().__init__(block)
        self.qkv8, self.out8, self.both8, self.down8 = map(
            quantise, (self.qkv, self.out, self.both, self.down)
        )

    def __call__(
        self, hidden_states: torch.Tensor, *, position_embeddings: tuple[torch.Tensor, torch.Tensor], **_: Any
    ) -> torch.Tensor:
        x, dtype = hidden_states[0], hidden_states.dtype
        read = rms_norm_quantised(x, self.before_attention, self.eps, self.offset)
        row = scaled_linear(read, self.qkv8, self.qkv_bias, dtype)
        attended, x = self._attend(row, x, position_embeddings)
        inner = scaled_linear(quantise(attended), self.out8, None, dtype)
        if self.after_attention is None and ATTN_OUT not in self.taps:
            read = rms_norm_quantised(x, self.before_mlp, self.eps, self.offset, add=inner)
        else:
            x = self._add_product(x, inner, self.after_attention, ATTN_OUT)
            read = rms_norm_quantised(x, self.before_mlp, self.eps, self.offset)
        self._show(RESID_MID, x)
        both = scaled_linear(read, self.both8, None, dtype)
        inner = scaled_linear(gate_quantised(both, self.activation), self.down8, None, dtype)
        return self._add_product(x, inner, self.after_mlp, MLP_OUT)[None]

    def _add_product(
        self, x: torch.Tensor, product: torch.Tensor, norm: torch.Tensor | None, part: str
    ) -> torch.Tensor:
        """`_add` of a product that is computed already."""
        self._wait_for_taps()
        if part in self.taps:
            return self._add_shown(x, product, norm, part)
        if norm is None:
            return x.add_(product)
        return rms_norm(product, norm, self.eps, self.offset, residual=x)


def tune_products(blocks: Sequence[FusedBlock], rows: int) -> None:
    """Find the fastest way to compute these blocks' products in passes of `rows` tokens (see `ops.linear.tune`)."""
    add = blocks[0].after_attention is None and blocks[0].ranks is None
    tune(rows, [block.qkv for block in blocks], [block.qkv_bias for block in blocks])
    tune(rows, [block.out for block in blocks], add=add)
    for part, name in ((ATTN_OUT, "out"), (MLP_OUT, "down")):
        if tapped := [getattr(block, name) for block in blocks if part in block.taps]:
            tune(rows, tapped)
    if not blocks[0].tiles:
        tune(rows, [block.both for block in blocks])
    tune(rows, [block.down for block in blocks], add=add)


def merge_layers(*layers: nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One weight (and bias) for several linear layers, which share its memory from now on."""
    biases = [layer.bias for layer in layers if layer.bias is not None]
    return _merge_tensors([layer.weight for layer in layers]), _merge_tensors(biases) if biases else None


def _merge_tensors(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    first, end = tensors[0], tensors[0].data_ptr()
    adjacent = True
    for tensor in tensors:
        adjacent &= tensor.data_ptr() == end and tensor.is_contiguous()
        end = tensor.data_ptr() + tensor.numel() * tensor.element_size()
    rows = sum(tensor.shape[0] for tensor in tensors)
    if adjacent and tensors[0].untyped_storage().data_ptr() == tensors[-1].untyped_storage().data_ptr():
        return first.as_strided((rows, *first.shape[1:]), first.stride())
    merged = torch.cat([tensor.data for tensor in tensors])
    for tensor, part in zip(tensors, merged.split([tensor.shape[0] for tensor in tensors]), strict=True):
        if tensor.is_cuda:  # another stream may own the old memory, and must not reuse it while it is read
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
        tensor.data = part
    return merged
