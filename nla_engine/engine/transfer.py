"""Copies between host and device, on a GPU through pinned memory, and snapshots of what the device is still changing.

A copy from pageable memory waits for everything queued before it; a copy from pinned memory is only queued.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from nla_engine.engine.streams import glance_stream


def to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """The values on the device. On a GPU the copy is queued, not waited for. On a CPU they may share memory."""
    host = torch.from_numpy(values)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def to_host(tensor: torch.Tensor) -> np.ndarray:
    """The values on the host, once the device has them (ten times the rate of a copy to pageable memory)."""
    if tensor.device.type == "cpu" or not tensor.numel():
        return tensor.cpu().numpy()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor).numpy()


class Glance:
    """Small tensors of one device as they were at one point of its queue. Reading them waits for that point only."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self._tensors, self._device = tensors, tensors[0].device
        on_gpu = tensors[0].is_cuda
        self._seen = [torch.zeros(each.shape, dtype=each.dtype, pin_memory=on_gpu) for each in tensors]
        self._passed = torch.cuda.Event() if on_gpu else None

    def take(self) -> None:
        """Queue a look, which replaces the last one."""
        for seen, tensor in zip(self._seen, self._tensors, strict=True):
            seen.copy_(tensor, non_blocking=True)
        if self._passed is not None:
            self._passed.record(torch.cuda.current_stream(self._device))

    @property
    def passed(self) -> bool:
        """Whether the device has come to the last look."""
        return self._passed is None or bool(self._passed.query())

    def read(self) -> list[Any]:
        """What the last look saw of each tensor; zeros before the first."""
        if self._passed is not None:
            self._passed.synchronize()
        return [seen.tolist() for seen in self._seen]

    def fetch(self, compute: Callable[[], torch.Tensor]) -> np.ndarray:
        """On the host, what `compute` gives of tensors as they were at the last look. Nothing that was queued after it
        is waited for, so nothing of that may change what `compute` reads."""
        if self._passed is None:
            return to_host(compute())
        self._passed.synchronize()
        with torch.cuda.stream(glance_stream(self._device)):
            return to_host(compute())
