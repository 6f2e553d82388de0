"""What attention must know of one forward pass, and the attention function for unmodified Hugging Face modules.

A forward pass is a `Pass`: T packed tokens, each with a slot and a position, no padding. The modules hand over
query, key and value after rotation; key and value go to the slot cache, and the query attends to the shared prefix
and its slot.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface

from nla_engine.engine.slots import SlotCache
from nla_engine.engine.streams import branch_stream
from nla_engine.engine.transfer import to_device
from nla_engine.errors import EngineError
from nla_engine.ops.attention import Shape, Tiles, attend, attend_one_each, attend_reference, tile_rows

NAME = "nla_engine"


@dataclass(frozen=True)
class Wanted:
    """The tokens of a pass whose states are asked for, int64 [n]. Behind the attention of `layer`, the last, a fused
    block goes on with these alone: of the others only keys and values are ever used again.
    """

    layer: int
    token: torch.Tensor
    tiles: Tiles


@dataclass
class Pass:
    """slot, position: int64 [T]; place: where in its slot each token's key goes; tiles: the queries, cut for attention.

    reference: use plain torch on every device. wanted: None: every block goes on with every token. shapes: how each
    layer attended (each must, once). branch: where work `beside` the pass runs until `join`.
    """

    cache: SlotCache
    slot: torch.Tensor
    position: torch.Tensor
    tiles: Tiles
    reference: bool
    wanted: Wanted | None = None
    branch: torch.cuda.Stream | None = None
    place: torch.Tensor = field(init=False)
    shapes: dict[int, Shape] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.place = self.position - self.cache.prefix_size

    def enter(self, layer: int, shape: Shape) -> None:
        """Note how a layer attends. EngineError if it has done so already."""
        if layer in self.shapes:
            raise EngineError(
                f"block {layer} attends twice in one pass: the engine keeps one key and value a position"
            )
        self.shapes[layer] = shape

    @contextmanager
    def beside(self) -> Iterator[None]:
        """What is launched inside reads the residual stream as it is now. In a graph that is being captured it runs
        beside what follows, so `join` must come before the stream changes; elsewhere before what follows."""
        if not (self.slot.is_cuda and torch.cuda.is_current_stream_capturing()):
            yield
            return
        self.branch = branch_stream(self.slot.device)
        self.branch.wait_stream(torch.cuda.current_stream(self.slot.device))
        with torch.cuda.stream(self.branch):
            yield

    def join(self) -> None:
        """What follows waits for the branch."""
        if self.branch is not None:
            torch.cuda.current_stream(self.slot.device).wait_stream(self.branch)
            self.branch = None

    def attend(self, query: torch.Tensor, layer: int, shape: Shape) -> torch.Tensor:
        """query [T, H, h] -> [T, H, h], over what the cache holds of this layer."""
        return self._attend(query, self.tiles, layer, shape)

    def attend_wanted(
        self, query: torch.Tensor, x: torch.Tensor, layer: int, shape: Shape
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`attend`, and the residual stream x [T, d], both [n, ...] of the tokens with which this layer goes on."""
        wanted = self.wanted
        if wanted is None or wanted.layer != layer:
            return self.attend(query, layer, shape), x
        return self._attend(query[wanted.token], wanted.tiles, layer, shape), x[wanted.token]

    def _attend(self, query: torch.Tensor, tiles: Tiles, layer: int, shape: Shape) -> torch.Tensor:
        if self.reference:
            run = attend_one_each if len(tiles.token) == len(query) else attend_reference
            return run(query, self.cache.layer(layer), tiles, shape)
        return attend(query, self.cache.layer(layer), tiles, shape)


def decode_tiles(slot: torch.Tensor, position: torch.Tensor, group: int, longest: int) -> Tiles:
    """One query a tile: a decode step. slot, position: int64 [B]."""
    token = torch.arange(len(slot), device=slot.device)
    return Tiles(token, torch.ones_like(token), slot, position, position, tile_rows(1, group), longest)


def prefill_tiles(parts: np.ndarray, group: int, own: torch.Tensor) -> Tiles:
    """Runs of queries, one after another, cut so that a tile is filled.

    parts: int64 [runs, 3]: slot, start position, length. own: int64 [T], the position of every query.
    """
    slot, start, length = parts.T
    rows = tile_rows(int(length.max()), group)
    step = max(rows // group, 1)
    tiles = -(-length // step)
    part = np.repeat(np.arange(len(length)), tiles)
    first = step * counted(tiles)
    token = (np.cumsum(length) - length)[part] + first
    count = np.minimum(length[part] - first, step)
    packed = to_device(np.stack([token, count, slot[part], start[part] + first]), own.device)
    return Tiles(packed[0], packed[1], packed[2], packed[3], own, rows, int((start + length).max()))


def counted(sizes: np.ndarray) -> np.ndarray:
    """0, 1, ... n - 1 for each n of sizes, one after another: int64 [sum of sizes]."""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)


#: The passes under way on this thread, the innermost last: AV and AR may run on two.
_threads = threading.local()


def _passes() -> list[Pass]:
    if not hasattr(_threads, "passes"):
        _threads.passes = []
    passes: list[Pass] = _threads.passes
    return passes


class running:
    """Context manager: the pass that the calls of modules inside belong to."""

    def __init__(self, work: Pass) -> None:
        self.work = work

    def __enter__(self) -> Pass:
        _passes().append(self.work)
        return self.work

    def __exit__(self, *_: object) -> None:
        _passes().pop()


def current_pass() -> Pass:
    """The pass that is running. EngineError outside of one."""
    if not _passes():
        raise EngineError("the model was called outside the engine while the engine holds it")
    return _passes()[-1]


#: What else modules of transformers hand to their attention that changes its result.
_OTHER_ATTENTION = ("s_aux", "sinks", "position_bias", "indices", "alibi", "head_mask")


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
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """The function registered with transformers. query [1, H, T, h], key and value [1, KV, T, h] -> [1, T, H, h]."""
    work = current_pass()
    asked = [name for name in _OTHER_ATTENTION if more.get(name) is not None]
    asked += ["attention_mask"] * (attention_mask is not None) + ["is_causal=False"] * (is_causal is False)
    if asked:
        raise EngineError(
            f"{type(module).__name__} asks for attention that the engine does not offer ({', '.join(asked)}): "
            "this architecture is not supported"
        )
    layer = module.layer_idx
    wanted, room = key.shape[1::2], work.cache.keys.shape[3:]
    if wanted != room or value.shape != key.shape:
        raise EngineError(
            f"{type(module).__name__}: keys {tuple(wanted)} and values {tuple(value.shape[1::2])} (heads, head size) "
            f"are not the {tuple(room)} of its configuration: this architecture is not supported"
        )
    if sliding_window is None:
        _check_no_window(module, work.cache)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    shape = Shape(scale, sliding_window or 0, softcap or 0.0)
    work.enter(layer, shape)
    work.cache.write(layer, work.slot, work.place, key[0].transpose(0, 1), value[0].transpose(0, 1))
    return work.attend(query[0].transpose(0, 1), layer, shape)[None], None


def _check_no_window(module: Any, cache: SlotCache) -> None:
    """EngineError if the model tells a layer's window by its mask alone, which nobody makes for this attention."""
    config, kinds = module.config, getattr(module.config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    windowed = window is not None if kinds is None else kinds[module.layer_idx] != "full_attention"
    if windowed and (window is None or window < cache.length):
        raise EngineError(
            f"{type(module).__name__}: block {module.layer_idx} attends to a part of the sequence that the model names "
            "in its mask alone, which the engine does not use: this architecture is not supported"
        )


AttentionInterface.register(NAME, slot_attention)
