"""Clocks: seconds of a call, seconds of a kernel launch, percentiles."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

#: Launches between two events, and the device cycles for which the queue is held until all of them are in it.
LAUNCHES = 8
_HOLD_CYCLES = 4_000_000


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """p20, p50 and p80, interpolated linearly."""
    low, middle, high = np.percentile(np.asarray(values, np.float64), (20, 50, 80))
    return float(low), float(middle), float(high)


def median(values: Sequence[float]) -> float:
    """p50 alone."""
    return percentiles(values)[1]


def synchronize(device: torch.device) -> None:
    """Wait for all work queued on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock time of a call and of everything it queued on the device."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def time_launches(runs: Sequence[Callable[[], Any]], device: torch.device, repeats: int) -> list[float]:
    """Seconds per launch, measured `repeats` times. `runs` do the same on different buffers, and are used in turn.

    On CUDA a spinning kernel holds the queue until LAUNCHES launches are in it, so the host's time is not measured.
    """
    for run in runs:
        run()
    if device.type != "cuda":
        return [seconds(runs[i % len(runs)], device) for i in range(repeats)]
    out = []
    with torch.cuda.device(device):
        for repeat in range(repeats):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            torch.cuda._sleep(_HOLD_CYCLES)
            start.record()
            for i in range(LAUNCHES):
                runs[(repeat * LAUNCHES + i) % len(runs)]()
            end.record()
            torch.cuda.synchronize()
            out.append(start.elapsed_time(end) / 1e3 / LAUNCHES)
    return out


def free_memory(device: torch.device) -> None:
    """Free unused memory on the host and the device: the engine sizes itself by what is free."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
