"""Attention over slots, plugged into unmodified Hugging Face modules.

A forward pass is a `Pass`: T packed tokens, each with a slot and a position, no padding. The modules hand over query, key
and value after rotation; this writes key and value to the slot cache and attends to the shared prefix and the slot.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface

from nla_engine.engine.slots import SlotCache
from nla_engine.errors import EngineError

NAME = "nla_engine"


@dataclass(frozen=True)
class Segment:
    """`length` tokens of one slot from position `start` on, at `offset` in the packed pass."""

    slot: int
    start: int
    length: int
    offset: int


@dataclass
class Pass:
    """What attention must know of one forward pass.

    slot, position: int64 [T]. segments: for a prefill, the runs of tokens in order; None for a decode step, where every
    token is the newest of its slot. longest: an upper bound on position + 1. written: layers that ran (a self-check).
    """

    cache: SlotCache
    slot: torch.Tensor
    position: torch.Tensor
    segments: list[Segment] | None
    longest: int
    written: set[int] = field(default_factory=set)


_current: list[Pass] = []


class running:
    """Context manager: the pass that the attention calls inside belong to."""

    def __init__(self, work: Pass) -> None:
        self.work = work

    def __enter__(self) -> Pass:
        _current.append(self.work)
        return self.work

    def __exit__(self, *_: object) -> None:
        _current.pop()


def slot_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The function registered with transformers. query [1, H, T, h], key and value [1, KV, T, h] -> [1, T, H, h]."""
    if not _current or attention_mask is not None or s_aux is not None:
        raise EngineError(
            f"{type(module).__name__} asks for attention that the engine does not offer (mask or sinks)"
        )
    work = _current[-1]
    layer = module.layer_idx
    if layer in work.written:
        raise EngineError(
            f"block {layer} attends twice in one pass: the engine keeps one key and value a position"
        )
    work.written.add(layer)
    work.cache.write(layer, work.slot, work.position, key[0].transpose(0, 1), value[0].transpose(0, 1))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    attend = decode_reference if work.segments is None else prefill_reference
    out = attend(query[0].transpose(0, 1), work, layer, scale, sliding_window or 0, softcap or 0.0)
    return out[None], None


def decode_reference(
    query: torch.Tensor, work: Pass, layer: int, scale: float, window: int, softcap: float
) -> torch.Tensor:
    """One query a slot. query [T, H, h] -> [T, H, h]; softmax in float32. Plain torch, any device."""
    cache = work.cache
    size = work.longest - cache.prefix_size
    keys = cache.keys[layer, work.slot, :size]
    values = cache.values[layer, work.slot, :size]
    lanes = query.shape[0]
    if cache.prefix_size:
        keys = torch.cat([cache.prefix_keys[layer].expand(lanes, -1, -1, -1), keys], 1)
        values = torch.cat([cache.prefix_values[layer].expand(lanes, -1, -1, -1), values], 1)
    at = torch.arange(work.longest, device=query.device)
    seen = at <= work.position[:, None]
    if window:
        seen &= at > work.position[:, None] - window
    return _attend(query[:, None], keys, values, seen[:, None], scale, softcap)[:, 0]


def prefill_reference(
    query: torch.Tensor, work: Pass, layer: int, scale: float, window: int, softcap: float
) -> torch.Tensor:
    """Runs of queries, each over its own slot. query [T, H, h] -> [T, H, h]. Plain torch, any device."""
    assert work.segments is not None
    cache = work.cache
    out = torch.empty_like(query)
    for part in work.segments:
        end = part.start + part.length
        keys = cache.keys[layer, part.slot, : end - cache.prefix_size]
        values = cache.values[layer, part.slot, : end - cache.prefix_size]
        if cache.prefix_size:
            keys = torch.cat([cache.prefix_keys[layer], keys])
            values = torch.cat([cache.prefix_values[layer], values])
        at = torch.arange(end, device=query.device)
        own = at[part.start :, None]
        seen = at <= own
        if window:
            seen &= at > own - window
        rows = slice(part.offset, part.offset + part.length)
        out[rows] = _attend(query[None, rows], keys[None], values[None], seen[None], scale, softcap)[0]
    return out


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    seen: torch.Tensor,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """query [B, T, H, h], keys and values [B, L, KV, h], seen bool [B, T, L] -> [B, T, H, h], any group ratio."""
    batch, length, heads, size = query.shape
    groups = keys.shape[2]
    grouped = query.reshape(batch, length, groups, heads // groups, size)
    scores = torch.einsum("btkgh,blkh->bkgtl", grouped, keys).float() * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~seen[:, None, None], -math.inf)
    weights = scores.softmax(-1).to(values.dtype)
    return torch.einsum("bkgtl,blkh->btkgh", weights, values).reshape(batch, length, heads, size)


AttentionInterface.register(NAME, slot_attention)
