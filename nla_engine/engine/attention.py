"""What attention needs of one forward pass, and the attention function for unmodified Hugging Face modules.

A forward pass is a `Pass`: T packed tokens without padding, each with a slot and a position. A module passes query, key
and value after rotation. Key and value are written to the slot cache; the query attends to the shared prefix and to
its slot.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface

from nla_engine.engine.slots import SlotCache
from nla_engine.engine.streams import branch_stream
from nla_engine.engine.temperature import tempered
from nla_engine.engine.transfer import to_device
from nla_engine.errors import EngineError, UnsupportedModel
from nla_engine.ops.attention import Shape, Tiles, attend, attend_torch, tile_rows
from nla_engine.ops.attention_cpu import attend_cpu

NAME = "nla_engine"


#: The tiles of a pass for so many query heads per key/value head.
TilesFor = Callable[[int], Tiles]


@dataclass(frozen=True)
class Wanted:
    """The tokens of a pass whose hidden states are asked for, int64 [n]. After attention in the last block, `layer`, a
    fused block computes only these: of the other tokens only keys and values are used again.
    """

    layer: int
    token: torch.Tensor
    tiles: TilesFor


@dataclass
class Pass:
    """slot, position: int64 [T]; place: where in its slot each token's key goes; tiles: the queries, cut for attention.

    reference: use plain torch on every device. wanted: None if every block computes every token. entering: where
    vectors enter, as `Injector.inject` takes it; None: nowhere. shapes: how each layer attended; each must attend
    exactly once. stored: the keys of blocks from which others borrow. runs: of a prefill, of one slot each: first
    token, how many, slot, position; None: a decode step. branch: the stream of work started in `beside`, until `join`.
    held: what that work reads, which must not be freed before: the memory would be used again.
    """

    cache: SlotCache
    slot: torch.Tensor
    position: torch.Tensor
    tiles: TilesFor
    reference: bool
    wanted: Wanted | None = None
    entering: torch.Tensor | None = None
    runs: list[tuple[int, int, int, int]] | None = None
    branch: torch.cuda.Stream | None = None
    held: list[torch.Tensor] = field(default_factory=list)
    place: torch.Tensor = field(init=False)
    shapes: dict[int, Shape] = field(default_factory=dict)
    stored: dict[int, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.place = self.position - self.cache.prefix_size

    def enter(self, layer: int, shape: Shape) -> None:
        """Record how a layer attends. EngineError if it already attended in this pass."""
        if layer in self.shapes:
            raise UnsupportedModel(
                f"block {layer} attends twice in one pass: the engine keeps one key and value per position: this "
                "architecture is not supported"
            )
        self.shapes[layer] = shape

    @contextmanager
    def beside(self, read: torch.Tensor) -> Iterator[None]:
        """Work launched inside reads this tensor as it is now. While a graph is captured, it runs in parallel with
        what follows, so call `join` before the tensor changes. Otherwise it runs before what follows."""
        if not (self.slot.is_cuda and torch.cuda.is_current_stream_capturing()):
            yield
            return
        self.held.append(read)
        self.branch = branch_stream(self.slot.device)
        self.branch.wait_stream(torch.cuda.current_stream(self.slot.device))
        with torch.cuda.stream(self.branch):
            yield

    def join(self) -> None:
        """Make what follows wait for the branch."""
        if self.branch is not None:
            torch.cuda.current_stream(self.slot.device).wait_stream(self.branch)
            self.branch = None
            self.held.clear()

    def attend(self, query: torch.Tensor, layer: int, shape: Shape) -> torch.Tensor:
        """query [T, H, h] -> [T, H, h], over the cached keys and values of this layer."""
        return self._attend(query, self.tiles, layer, shape)

    def attend_wanted(
        self, query: torch.Tensor, x: torch.Tensor, layer: int, shape: Shape
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`attend`, and the residual stream x [T, d]; both [n, ...], for the tokens that this layer continues with."""
        wanted = self.wanted
        if wanted is None or wanted.layer != layer:
            return self.attend(query, layer, shape), x
        return self._attend(query[wanted.token], wanted.tiles, layer, shape), x[wanted.token]

    def _attend(self, query: torch.Tensor, tiles: TilesFor, layer: int, shape: Shape) -> torch.Tensor:
        run = attend_cpu if query.device.type == "cpu" else attend_torch if self.reference else attend
        kv = self.cache.layer(layer)
        return run(query, kv, tiles(query.shape[1] // kv.keys.shape[2]), shape)

    def store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keep keys and values [T, KV, h] of a layer. UnsupportedModel if it should borrow them, and has others."""
        if (source := self.cache.borrowed.get(layer)) is None:
            self.cache.write(layer, self.slot, self.place, key, value)
            if layer in self.cache.borrowed.values():
                self.stored[layer] = key
        elif source not in self.stored or self.stored[source].data_ptr() != key.data_ptr():
            raise UnsupportedModel(
                f"block {layer} attends to other keys than those of block {source}: this architecture is not supported"
            )


def decode_tiles(slot: torch.Tensor, position: torch.Tensor, group: int, longest: int) -> Tiles:
    """One query per tile: a decode step. slot, position: int64 [B]."""
    token = torch.arange(len(slot), device=slot.device)
    return Tiles(token, torch.ones_like(token), slot, position, position, tile_rows(1, group), longest)


def prefill_tiles(parts: np.ndarray, group: int, own: torch.Tensor) -> Tiles:
    """Cut consecutive runs of queries so that tiles are full.

    parts: int64 [runs, 3]: slot, start position, length. own: int64 [T], the position of every query.
    """
    rows = tile_rows(int(parts[:, 2].max()), group)
    packed = to_device(cut(parts, max(rows // group, 1)), own.device)
    longest = int((parts[:, 1] + parts[:, 2]).max())
    return Tiles(packed[0], packed[1], packed[2], packed[3], own, rows, longest)


def cut(runs: np.ndarray, step: int) -> np.ndarray:
    """Tiles of at most `step` queries of consecutive runs, int64 [runs, 3]: slot, start position, length. Returns int64
    [4, tiles]: token, count, slot and position, as `Tiles` has them."""
    slot, start, length = runs.T
    tiles = -(-length // step)
    part = np.repeat(np.arange(len(length)), tiles)
    first = step * counted(tiles)
    token = (np.cumsum(length) - length)[part] + first
    count = np.minimum(length[part] - first, step)
    return np.stack([token, count, slot[part], start[part] + first])


def counted(sizes: np.ndarray) -> np.ndarray:
    """0, 1, ... n - 1 for each n in sizes, concatenated: int64 [sum of sizes]."""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)


#: The running passes of each thread, innermost last: AV and AR may run on two threads.
_threads = threading.local()


def _passes() -> list[Pass]:
    if not hasattr(_threads, "passes"):
        _threads.passes = []
    passes: list[Pass] = _threads.passes
    return passes


class running:
    """Context manager: module calls inside belong to this pass."""

    def __init__(self, work: Pass) -> None:
        self.work = work

    def __enter__(self) -> Pass:
        _passes().append(self.work)
        return self.work

    def __exit__(self, *_: object) -> None:
        _passes().pop()


def current_pass() -> Pass:
    """The running pass. EngineError if there is none."""
    if not _passes():
        raise EngineError("the model was called outside the engine while the engine holds it")
    return _passes()[-1]


#: Other arguments of transformers' modules to their attention that change its result.
_OTHER_ATTENTION = ("sinks", "position_bias", "indices", "alibi", "head_mask")


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
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """The function registered with transformers. query [1, H, T, h], key and value [1, KV, T, h] -> [1, T, H, h].

    s_aux: the sinks [H]
    """
    work = current_pass()
    asked = [name for name in _OTHER_ATTENTION if more.get(name) is not None]
    asked += ["attention_mask"] * (attention_mask is not None) + ["is_causal=False"] * (is_causal is False)
    asked += ["s_aux"] * (
        s_aux is not None and (s_aux.shape != query.shape[1:2] or not s_aux.is_contiguous())
    )
    if asked:
        raise UnsupportedModel(
            f"{type(module).__name__} asks for attention that the engine does not offer ({', '.join(asked)}): "
            "this architecture is not supported"
        )
    layer = module.layer_idx
    wanted, room = key.shape[1::2], work.cache.layer(layer).keys.shape[2:]
    if wanted != room or value.shape != key.shape:
        raise UnsupportedModel(
            f"{type(module).__name__}: keys {tuple(wanted)} and values {tuple(value.shape[1::2])} (heads, head size) "
            f"are not the {tuple(room)} of its configuration: this architecture is not supported"
        )
    window, chunked = _chunk(module) if sliding_window is None else (sliding_window, False)
    if not window and sliding_window is None:
        _check_no_window(module, work.cache)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    shape = Shape(scale, window, softcap or 0.0, s_aux, chunked=chunked)
    work.enter(layer, shape)
    query = tempered(module, query, work.position)
    work.store(layer, key[0].transpose(0, 1), value[0].transpose(0, 1))
    return work.attend(query[0].transpose(0, 1), layer, shape)[None], None


def _chunk(module: Any) -> tuple[int, bool]:
    """The size of a layer's chunks, and True; (0, False): it has none. Only the mask of such a layer knows of them."""
    kinds = getattr(module.config, "layer_types", None) or ()
    size = int(getattr(module.config, "attention_chunk_size", None) or 0)
    chunked = size > 0 and "chunked_attention" in kinds[module.layer_idx : module.layer_idx + 1]
    return (size, True) if chunked else (0, False)


def _check_no_window(module: Any, cache: SlotCache) -> None:
    """EngineError if only the model's mask defines a layer's window: no mask is built for this attention."""
    config, kinds = module.config, getattr(module.config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    windowed = window is not None if kinds is None else kinds[module.layer_idx] != "full_attention"
    if windowed and (window is None or window < cache.length):
        raise UnsupportedModel(
            f"{type(module).__name__}: block {module.layer_idx} attends to a part of the sequence that is defined by "
            "its mask alone, and the engine does not use masks: this architecture is not supported"
        )


AttentionInterface.register(NAME, slot_attention)
