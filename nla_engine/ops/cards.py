"""The GPUs of this machine: their names, compute capabilities and shared memory, and which compiled code they run.

Compute capabilities are NVIDIA's: 8.6 is what sm_86 is code for.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from nla_engine.errors import RequestError

HOPPER = (9, 0)
#: KiB of shared memory that one block may have, by compute capability (CUDA C++ Programming Guide, table of technical
#: specifications).
SHARED_KIB = {
    (7, 5): 64,
    (8, 0): 163,
    (8, 6): 99,
    (8, 7): 163,
    (8, 9): 99,
    HOPPER: 227,
    (10, 0): 227,
    (12, 0): 99,
}
#: For trying on one card what is chosen on another: the compute capability that every GPU is assumed to have.
ASSUMED = "NLA_ASSUME_CAPABILITY"
_CODE = re.compile(r"(sm|compute)_(\d+)(\d)([af]?)")


@dataclass(frozen=True)
class Card:
    """number: torch's; capability: (0, 0) for another maker's card; shared_bytes: shared memory per block; processors:
    its multiprocessors."""

    number: int
    name: str
    capability: tuple[int, int]
    shared_bytes: int
    processors: int = 1

    def __str__(self) -> str:
        major, minor = self.capability
        return f"GPU {self.number} ({self.name}" + (
            f", compute capability {major}.{minor})" if major else ")"
        )

    @property
    def nvidia(self) -> bool:
        return self.capability != (0, 0)

    @property
    def bfloat16(self) -> bool:
        """Whether it computes in bfloat16 itself. Older cards emulate it, slower than float32."""
        return not self.nvidia or self.capability >= (8, 0)


def card_of(device: torch.device) -> Card:
    """The card of a CUDA device. RequestError if NLA_ASSUME_CAPABILITY cannot be followed."""
    return _card(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _card(number: int) -> Card:
    properties = torch.cuda.get_device_properties(number)
    shared = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    own = (0, 0) if torch.version.hip else (properties.major, properties.minor)
    return _assumed(
        Card(number, properties.name, own, shared, properties.multi_processor_count), os.environ.get(ASSUMED)
    )


def _assumed(card: Card, capability: str | None) -> Card:
    """The card as if it had this lower compute capability, and no more shared memory than such cards have."""
    if not capability:
        return card
    match = re.fullmatch(r"(\d+)\.(\d)", capability)
    lower = (int(match[1]), int(match[2])) if match else (0, 0)
    if not (0, 0) < lower <= card.capability:
        raise RequestError(
            f"{ASSUMED} is '{capability}': it must be a compute capability such as 8.6, no higher than that of {card}"
        )
    shared = min(card.shared_bytes, 1024 * SHARED_KIB.get(lower, 48))
    return replace(card, capability=lower, shared_bytes=shared)


def runs(capability: tuple[int, int], code: Iterable[str]) -> bool:
    """Whether a card of this capability runs any of these, named as nvcc names them.

    sm_86 (machine code) runs on the same major number with the same or a higher minor one. compute_86 (PTX) runs on
    any capability that is no lower. With an a (sm_90a): this capability only. With an f (sm_100f, compute_100f): as
    machine code.
    """
    return any(_runs(capability, name) for name in code)


def _runs(capability: tuple[int, int], name: str) -> bool:
    match = _CODE.fullmatch(name)
    if match is None:
        return False
    kind, major, minor, suffix = match.groups()
    built = (int(major), int(minor))
    if suffix == "a":
        return capability == built
    if kind == "compute" and not suffix:
        return capability >= built
    return capability[0] == built[0] and capability >= built


def torch_fault(card: Card) -> str:
    """Why this torch does not run on an NVIDIA card; empty if it does."""
    built = torch.cuda.get_arch_list()
    if not card.nvidia or not built or runs(card.capability, built):
        return ""
    return (
        f"{card}: torch {torch.__version__} is compiled for {' '.join(built)}: install a torch that knows this card, "
        "or pass --device cpu"
    )
