"""Where keys and values are kept: in blocks of one pool, which slots hold as their sequences grow, and in one shared
prefix that every slot attends to first.

Position p of a sequence is in the prefix if p < prefix size, else at place p - prefix size of its slot. The prefix has
tensors of its own: all queries of a step attend to it in one product, which blocks shared through the table would
not allow. There is one slot more than asked for: unused lanes of a decode step work there.
"""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nla_engine.engine.blocks import Blocks
from nla_engine.engine.compressed import latent_shape
from nla_engine.engine.states import ConvShape, States, kept_shape
from nla_engine.engine.transfer import to_device
from nla_engine.errors import EngineError
from nla_engine.models.decoder import values
from nla_engine.models.load import LanguageModel
from nla_engine.ops.delta import DeltaShape
from nla_engine.ops.key_values import KeyValues

#: Places in a block on a GPU. On a CPU a block is a whole slot: attention reads it without a copy, and the system gives
#: memory only to what is written.
BLOCK = 64
#: With room for fewer blocks per slot there are fewer slots: replies would step back too often.
_WORTH_BLOCKS = 8
#: Most slots on a CPU by default: few enough that its caches do not thrash.
_MOST_SLOTS_CPU = 64
#: The part of a CPU's memory that slots may take if every one has its longest sequence.
_CPU_PART = 0.5
#: The part of the free GPU memory that blocks may take.
_MEMORY_PART = 0.7


@dataclass(frozen=True)
class Room:
    """slots: sequences at once; blocks: in the pool, None: as many as all slots need for their longest sequence."""

    slots: int
    blocks: int | None = None

    def half(self, least: int) -> Room:
        """Half of it, but no fewer than `least` blocks."""
        return Room(self.slots // 2, None if self.blocks is None else max(self.blocks // 2, least))


def slot_size(length: int, prefix: int) -> int:
    """Places that a slot may need if sequences of `length` share `prefix`, which is first read in a slot."""
    return max(length - prefix, prefix) + 1


def slot_blocks(length: int, prefix: int) -> int:
    """Blocks that a slot may need on a GPU."""
    return -(-slot_size(length, prefix) // BLOCK)


def default_room(
    lm: LanguageModel,
    length: int,
    prefix: int = 0,
    most: int = 512,
    precision: str = "full",
    held: int = 0,
    slots: int | None = None,
) -> Room:
    """How many sequences of at most `length` tokens, `prefix` of them shared, to run at once: `slots`, or `most` (fewer
    on a CPU). The pool has blocks for the longest of all, or takes a part of the memory that is free on the model's
    device once a runner of that precision has made its weights; then sequences may have to step back.

    held: bytes that a slot needs besides keys, values and the states of blocks
    """
    held += sum(shape.slot_bytes(lm.dtype.itemsize) for shape in state_shapes(lm).values())
    place_bytes = _place_bytes(lm)
    if lm.device.type == "cpu":
        fit = int(physical_bytes() * _CPU_PART) // (slot_size(length, prefix) * place_bytes + held)
        return Room(slots or max(min(most, _MOST_SLOTS_CPU, fit - 1), 1))
    block_bytes = BLOCK * place_bytes
    free = free_bytes(lm.device) if lm.ranks is None else min(lm.ranks.together(free_each, lm.ranks))
    if precision == "fp8":
        free -= sum(weight.numel() for weight in lm.blocks.parameters() if weight.dim() == 2)  # one byte each
    free = int(free * _MEMORY_PART)
    least = slot_blocks(length, prefix)
    if slots is None:
        each = min(least, _WORTH_BLOCKS) * block_bytes + held
        slots = max(1, min(most, free // each))
    blocks = max(least, (free - slots * held) // block_bytes)
    return Room(slots, min(blocks, slots * least))


def cache_bytes(lm: LanguageModel, room: Room, length: int, prefix: int = 0) -> int:
    """Bytes of keys and values on the model's device; on a CPU, once every sequence has its longest length."""
    if lm.device.type == "cpu" or room.blocks is None:
        return (room.slots + 1) * slot_size(length, prefix) * _place_bytes(lm)
    return (room.blocks + 1) * BLOCK * _place_bytes(lm)


def _place_bytes(lm: LanguageModel) -> int:
    """Keys and values of one token, in all layers."""
    return sum(row_bytes(lm).values())


def row_bytes(lm: LanguageModel) -> dict[int, int]:
    """The same by layer, of those that keep their own; of compressed keys, values are a part."""
    tensors = 2 if latent_shape(lm) is None else 1
    return {layer: tensors * math.prod(shape) * lm.dtype.itemsize for layer, shape in own_shapes(lm).items()}


def physical_bytes() -> int:
    """Memory of the machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros, which on a CPU take memory only once they are written: torch.zeros writes them itself."""
    if device.type != "cpu" or not math.prod(shape):
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)
    return torch.from_numpy(memory).view(dtype).view(shape)


def free_bytes(device: torch.device) -> int:
    """Free memory of a GPU, after torch has released what it caches, and what an ended generator holds."""
    gc.collect()  # a generator and its graphs hold each other
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def free_each(ranks: Any) -> list[int]:
    """`free_bytes` of every rank of a group; each rank calls it."""
    free: list[int] = ranks.each(free_bytes(ranks.device))
    return free


def kv_shape(config: Any) -> tuple[int, int]:
    """Key/value heads of a block, and their size; the most of any block, where they differ."""
    queries, keys, sizes, width = (
        max(value or 0 for value in values(config, key))
        for key in ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size")
    )
    queries = queries or 1  # where nothing attends
    if getattr(config, "new_decoder_architecture", False):  # Falcon's names
        keys = config.num_kv_heads
    elif getattr(config, "multi_query", False):
        keys = 1
    return keys or queries, sizes or width // queries


def own_shapes(lm: LanguageModel) -> dict[int, tuple[int, int]]:
    """By layer, of those that keep keys and values of their own: how many heads, and the size of a key. A layer is a
    block, but for compressed keys, which each attention of a block keeps."""
    if (latent := latent_shape(lm)) is not None:
        return dict.fromkeys(range(latent.layers), (1, latent.row))
    others = state_shapes(lm).keys() | borrowed(lm).keys()
    each = getattr(lm.config, "per_layer_config", None) or [lm.config] * len(lm.blocks)
    return {layer: kv_shape(each[layer]) for layer in range(len(lm.blocks)) if layer not in others}


def borrowed(lm: LanguageModel) -> dict[int, int]:
    """By block, of those that attend to the keys and values of an earlier block (Gemma-4): which block that is."""
    found: dict[int, int] = {}
    last: dict[Any, int] = {}
    for layer, block in enumerate(lm.blocks):
        attention: Any = getattr(block, "self_attn", None)
        kind = getattr(attention, "layer_type", None)
        if getattr(attention, "store_full_length_kv", False):
            last[kind] = layer
        elif getattr(attention, "is_kv_shared_layer", False) and kind in last:
            found[layer] = last[kind]
    return found


def state_shapes(lm: LanguageModel) -> dict[int, DeltaShape | ConvShape]:
    """By block, of those that keep a state and no keys and values."""
    found = {layer: kept_shape(block) for layer, block in enumerate(lm.blocks)}
    return {layer: shape for layer, shape in found.items() if shape is not None}


class SlotCache:
    """keys, values: of each block that keeps its own, [blocks + 1, block size, KV, head_size]; prefix_keys,
    prefix_values: the same of the shared prefix, [prefix, KV, head_size]; states: by block, of those that keep a state
    instead; table: int32 [slots + 1, columns], see `KeyValues`.

    Of compressed keys, values are a view: the first channels of the one key of a place.

    layers: how many attend or keep a state: the blocks, unless they have several attentions each. borrowed: by block,
    of those that attend to an earlier block's keys and values: which block's. size: places that a slot may need.
    `blocks` says on the host which blocks a slot holds; `update` tells the device.
    """

    def __init__(
        self,
        lm: LanguageModel,
        slots: int,
        length: int,
        prefix: int,
        blocks: int | None = None,
        block: int | None = None,
    ) -> None:
        """length: most tokens of a sequence, including `prefix` shared ones.

        blocks: in the pool. None: enough for all slots, each of which holds its own until `release_all`
        block: places in one
        """
        kept, own, latent = state_shapes(lm), own_shapes(lm), latent_shape(lm)
        self._latent = None if latent is None else latent.latent  # channels of a value, of compressed keys
        self.borrowed = borrowed(lm)
        self._number = {layer: number for number, layer in enumerate(own)}
        self._number |= {layer: self._number[source] for layer, source in self.borrowed.items()}
        self.layers = len(self._number) + len(kept)
        self.states = {
            layer: States(
                lazy_zeros((slots + 1, *shape.state), torch.float32, lm.device),
                lazy_zeros((slots + 1, shape.taps - 1, shape.channels), lm.dtype, lm.device),
            )
            for layer, shape in kept.items()
        }
        self.length, self.size = length, slot_size(length, prefix)
        self.slots = self.spare = slots
        block = block or (self.size if lm.device.type == "cpu" else BLOCK)
        columns = -(-self.size // block)
        count = (slots + 1) * columns if blocks is None else blocks
        if count < columns:
            raise EngineError(
                f"{lm.name}: {count} blocks of {block} tokens do not hold one sequence of {length} tokens"
            )
        self.blocks = Blocks(count, block, slots + 1)
        self.keys = [lazy_zeros((count + 1, block, *shape), lm.dtype, lm.device) for shape in own.values()]
        self.values = (
            [lazy_zeros(held.shape, lm.dtype, lm.device) for held in self.keys]
            if latent is None
            else self._first_channels(self.keys)
        )
        self.prefix_size = 0
        self.prefix_keys, self.prefix_values = (
            [held.new_empty((0, *held.shape[2:])) for held in all_] for all_ in (self.keys, self.values)
        )
        self.table = torch.full((slots + 1, columns + 1), count, dtype=torch.int32, device=lm.device)
        if blocks is None:
            for slot in range(slots + 1):
                self.blocks.grow(slot, self.size)
            self.update()

    def update(self) -> None:
        """Tell the device which blocks slots hold now. Passes queued before still see what they held."""
        self.apply(self.blocks.changes())

    def apply(self, changes: np.ndarray) -> None:
        """The same, given what `Blocks.changes` said."""
        if changes.size:
            slot, column, block = to_device(changes, self.table.device)
            self.table[slot, column] = block.int()

    def grow(self, slot: int, places: int) -> None:
        """Give a slot the blocks that it lacks for so many places."""
        self.blocks.grow(slot, places)
        self.update()

    def release_all(self) -> None:
        """Take the blocks of every slot back. From now on the caller assigns them, through `blocks`, and calls `update`
        or `apply` before a pass."""
        for slot in range(self.slots + 1):
            self.blocks.release(slot)

    def keep_as_prefix(self, slot: int, length: int) -> None:
        """Make the first `length` positions of a freshly filled slot the shared prefix."""
        for states in self.states.values():
            states.keep_as_prefix(slot)
        kept = [self._held(number).places(slot, length) for number in range(len(self.keys))]
        self.prefix_size = length
        self.prefix_keys, self.prefix_values = ([pair[which] for pair in kept] for which in range(2))
        if self._latent is not None:
            self.prefix_values = self._first_channels(self.prefix_keys)

    def _first_channels(self, keys: list[torch.Tensor]) -> list[torch.Tensor]:
        return [held[..., : self._latent] for held in keys]

    @contextmanager
    def without_prefix(self) -> Iterator[None]:
        """While this is open, sequences begin at place 0 of their slots, with no state."""
        keys, values, size = self.prefix_keys, self.prefix_values, self.prefix_size
        held = {layer: states.prefix for layer, states in self.states.items()}
        self.prefix_size = 0
        self.prefix_keys, self.prefix_values = ([held[:0] for held in all_] for all_ in (keys, values))
        for states in self.states.values():
            states.prefix = None
        try:
            yield
        finally:
            self.prefix_keys, self.prefix_values, self.prefix_size = keys, values, size
            for layer, states in self.states.items():
                states.prefix = held[layer]

    def renew_prefix(self, slot: int) -> None:
        """Overwrite the shared prefix, in the memory where it is, with what a freshly filled slot holds."""
        for states in self.states.values():
            states.keep_as_prefix(slot)  # read between graphs, so it may lie elsewhere
        for number in range(len(self.keys)):
            keys, values = self._held(number).places(slot, self.prefix_size)
            self.prefix_keys[number].copy_(keys)
            self.prefix_values[number].copy_(values)

    def copy(self, source: Iterable[int], target: Iterable[int], length: int) -> None:
        """Copy the first `length` places of each source slot to its target slot, in every layer, and what follows them
        in their last block, and their states. Blocks that both hold are left alone."""
        source, target = list(source), list(target)
        if self.states and source:
            slots = to_device(np.array([source, target]), self.table.device)
            for states in self.states.values():
                states.copy(*slots)
        pairs = [
            pair
            for a, b in zip(source, target, strict=True)
            for pair in zip(self._first(a, length), self._first(b, length), strict=False)
            if pair[0] != pair[1]
        ]
        if pairs:
            at = to_device(np.array(pairs).T.copy(), self.table.device)
            for held in (*self.keys, *(self.values if self._latent is None else ())):
                held[at[1]] = held[at[0]]

    def _first(self, slot: int, length: int) -> list[int]:
        return self.blocks.held(slot)[: self.blocks.of(length)]

    def layer(self, layer: int) -> KeyValues:
        """Views of what a layer, which attends, attends to."""
        return self._held(self._number[layer])

    def _held(self, number: int) -> KeyValues:
        return KeyValues(
            self.keys[number],
            self.values[number],
            self.prefix_keys[number],
            self.prefix_values[number],
            self.table,
        )

    def write(
        self, layer: int, slot: torch.Tensor, place: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        """Store key, value [T, kv_heads, head_size] at (slot, place) int64 [T] of a layer."""
        at = self.table[slot, place // self.blocks.size].long(), place % self.blocks.size
        number = self._number[layer]
        self.keys[number].index_put_(at, key)
        self.values[number].index_put_(at, value)
