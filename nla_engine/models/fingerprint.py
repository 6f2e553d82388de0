"""A fingerprint of weights: the same on every device, and read at the rate of memory."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from nla_engine.codec.loops import compiled

#: Elements whose checksums are taken at once, and the period of the position's weight (a prime). Both are part of what
#: a fingerprint means.
_PART, _PERIOD = 1 << 26, 65521


def fingerprint_of(weights: Mapping[str, torch.Tensor]) -> str:
    """sha256 over every weight's name, shape, dtype and two integer checksums of its bits (position-weighted)."""
    ordered = sorted(weights.items())
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        sums = pool.map(checksums, (weight for _, weight in ordered))
        told = {
            name: (tuple(weight.shape), weight.dtype, both)
            for (name, weight), both in zip(ordered, sums, strict=True)
        }
    return fingerprint_of_sums(told)


def fingerprint_of_sums(weights: Mapping[str, tuple[tuple[int, ...], torch.dtype, tuple[int, int]]]) -> str:
    """The same of weights whose shape, dtype and checksums are known."""
    digest = hashlib.sha256()
    for name, (shape, dtype, (first, second)) in sorted(weights.items()):
        digest.update(f"{name} {shape} {dtype} {first} {second}\n".encode())
    return digest.hexdigest()[:16]


@torch.inference_mode()
def checksums(weight: torch.Tensor) -> tuple[int, int]:
    """The sum of a weight's bits as integers, and their sum weighted by position, folded over its parts."""
    bits = weight.detach().contiguous().reshape(-1)
    bits = bits.view({2: torch.int16, 4: torch.int32}.get(bits.element_size(), torch.uint8))
    first = second = 0
    for part in bits.split(_PART):
        plain, weighted = _on_device(part) if part.is_cuda else _on_host(part.numpy())
        first += plain
        second = (second * 31 + weighted) % (1 << 63)
    return first, second


def _on_device(part: torch.Tensor) -> tuple[int, int]:
    """Sum, and sum weighted by 1, 2, ... 65521, 1, ... in 64 bits that wrap around: the reference for `_on_host`."""
    wide = part.to(torch.int64)
    index = torch.arange(len(wide), device=wide.device) % _PERIOD + 1
    return int(wide.sum()), int((wide * index).sum())


def _on_host(part: np.ndarray) -> tuple[int, int]:
    """The same without a copy, in one pass over the bits."""
    plain, weighted = _sum_bits(part, _PERIOD)
    return int(plain), int(weighted)


@compiled
def _sum_bits(bits, period):
    """For integers [n]: their sum, and their sum weighted by 1, 2, ... period, 1, ..."""
    plain, weighted = np.int64(0), np.int64(0)
    for start in range(0, len(bits), period):
        for i in range(min(period, len(bits) - start)):
            value = np.int64(bits[start + i])
            plain += value
            weighted += value * np.int64(i + 1)
    return plain, weighted
