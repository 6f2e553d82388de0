"""Where keys and values are kept: one fixed region per slot, and one shared prefix that every slot attends to first.

Position p of a sequence is in the prefix if p < prefix size, else at p - prefix size of its slot. There is one slot
more than asked for: unused lanes of a decode step work there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from nla_engine.engine.transfer import to_device
from nla_engine.models.decoder import values
from nla_engine.models.load import LanguageModel
from nla_engine.ops.attention import KeyValues

#: Most slots on a CPU by default: few enough that its caches do not thrash.
_MOST_SLOTS_CPU = 64
#: The part of the free GPU memory that slots may take.
_MEMORY_PART = 0.7


def slot_size(length: int, prefix: int) -> int:
    """Tokens that a slot has room for if sequences of `length` share `prefix`, which is first read in a slot."""
    return max(length - prefix, prefix) + 1


def default_slots(
    lm: LanguageModel,
    length: int,
    prefix: int = 0,
    most: int = 512,
    precision: str = "full",
    held: int = 0,
) -> int:
    """How many sequences of `length` tokens, `prefix` of them shared, to run at once: at most `most`, and as many as
    fit the memory that is free on the model's device once a runner of that precision has made its weights.

    held: bytes that a slot needs besides keys and values
    """
    if lm.device.type == "cpu":
        return min(most, _MOST_SLOTS_CPU)
    heads, head_size = kv_shape(lm.config)
    slot_bytes = 2 * len(lm.blocks) * slot_size(length, prefix) * heads * head_size * lm.dtype.itemsize + held
    free = free_bytes(lm.device)
    if precision == "fp8":
        free -= sum(weight.numel() for weight in lm.blocks.parameters() if weight.dim() == 2)  # one byte each
    return max(1, min(most, int(free * _MEMORY_PART) // slot_bytes))


def free_bytes(device: torch.device) -> int:
    """Free memory of a GPU, after torch has released what it caches."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def kv_shape(config: Any) -> tuple[int, int]:
    """Key/value heads of a block, and their size; the most of any block, where they differ."""
    queries, keys, sizes, width = (
        max(value or 0 for value in values(config, key))
        for key in ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size")
    )
    queries = queries or 1  # where nothing attends
    return keys or queries, sizes or width // queries


class SlotCache:
    """keys, values: [layers, slots + 1, size, KV, head_size]; prefix_keys, prefix_values: [layers, prefix, KV, ...]."""

    def __init__(self, lm: LanguageModel, slots: int, length: int, prefix: int) -> None:
        """length: most tokens of a sequence, including `prefix` shared ones."""
        heads, head_size = kv_shape(lm.config)
        layers = len(lm.blocks)
        self.length, self.size = length, slot_size(length, prefix)
        self.slots = self.spare = slots
        shape = (layers, slots + 1, self.size, heads, head_size)
        self.keys = torch.zeros(shape, device=lm.device, dtype=lm.dtype)
        self.values = torch.zeros(shape, device=lm.device, dtype=lm.dtype)
        self.prefix_keys = self.keys.new_empty((layers, 0, heads, head_size))
        self.prefix_values = self.values.new_empty((layers, 0, heads, head_size))

    @property
    def prefix_size(self) -> int:
        return self.prefix_keys.shape[1]

    def keep_as_prefix(self, slot: int, length: int) -> None:
        """Make the first `length` positions of a freshly filled slot the shared prefix."""
        self.prefix_keys = self.keys[:, slot, :length].clone()
        self.prefix_values = self.values[:, slot, :length].clone()

    def copy(self, source: list[int], target: list[int], length: int) -> None:
        """Copy the first `length` places of each source slot to its target slot, in every layer."""
        at = to_device(np.array([source, target]), self.keys.device)
        for held in (self.keys, self.values):
            held[:, at[1], :length] = held[:, at[0], :length]

    def layer(self, layer: int) -> KeyValues:
        """Views of one layer."""
        return KeyValues(
            self.keys[layer], self.values[layer], self.prefix_keys[layer], self.prefix_values[layer]
        )

    def write(
        self, layer: int, slot: torch.Tensor, place: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        """Store key, value [T, kv_heads, head_size] at (slot, place) int64 [T] of a layer."""
        self.keys[layer].index_put_((slot, place), key)
        self.values[layer].index_put_((slot, place), value)
