"""CUDA graphs: a decode step captured for a fixed number of lanes, and for which numbers there are graphs."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from nla_engine.engine.streams import capture_stream
from nla_engine.engine.transfer import to_device

#: The lane counts that graphs are captured for. A step runs on the next larger one.
LANE_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024)
#: What capturing a step costs per block: two steps that warm up and the capture itself, launch by launch.
_CAPTURE_SECONDS = 1.5e-3
#: What the host needs between its look and the next launch; what a block of a step takes at least.
_HOST_SECONDS, _LEAST_SECONDS = 4e-3, 2.5e-5
#: Operations per second of the products of a step or a pass, roughly.
OPERATIONS = 4e14


def lane_bucket(lanes: int) -> int:
    """Lanes of the graph that runs `lanes` > 0. Beyond the table there are four sizes per doubling: 1280, ..., 2048."""
    if lanes <= LANE_BUCKETS[-1]:
        return LANE_BUCKETS[bisect_left(LANE_BUCKETS, lanes)]
    step = 1 << ((lanes - 1).bit_length() - 3)
    return -(-lanes // step) * step


def steps_meanwhile(blocks: int, weights: int, lanes: int) -> int:
    """How many decode steps of so many lanes the device takes while the host decides what comes next, and queues it."""
    seconds = blocks * _LEAST_SECONDS + lanes * 2 * weights / OPERATIONS
    return max(round(_HOST_SECONDS / seconds), 1)


def capture_lanes(blocks: int, weights: int) -> float:
    """How many lanes of a decode step take the device as long as a capture takes, of a model with so many blocks, and
    weights that every token is multiplied by. 67,000 for one of 135 million weights, 1,200 for one of 7 billion."""
    return blocks * _CAPTURE_SECONDS * OPERATIONS / (2 * max(weights, 1))


class GraphSizes:
    """Chooses the graph of each step: the smallest that there is, or a new one of the step's own size.

    A run ends with fewer and fewer lanes, and a capture costs a small model as much as many steps. So a new graph has
    to wait until the lanes that steps left unused would have paid for it.

    most: lanes of the largest graph; cost: of a capture, in lanes of steps; 0: every size has its graph at once
    """

    def __init__(self, most: int, cost: float) -> None:
        self._most, self._cost = most, cost
        self._sizes: list[int] = []  # of the graphs that there are, ascending
        self._unused = 0  # lanes of the steps since the last capture

    def choose(self, lanes: int, steps: int) -> int:
        """Lanes of the graph for these steps. If there is none, the caller captures it."""
        own = min(lane_bucket(lanes), max(self._most, lanes))
        at = bisect_left(self._sizes, own)
        if at < len(self._sizes):
            size = self._sizes[at]
            self._unused += (size - own) * steps
            if size == own or self._unused < self._cost:
                return size
        self._unused = 0
        insort(self._sizes, own)
        return own


class Graph:
    """Replays `work`, which reads and writes tensors that stay where they are.

    It is called twice before it is captured, to compile kernels and load libraries, and must not change anything then.
    pool: from torch.cuda.graph_pool_handle(). Graphs of one pool reuse the same memory, so `work` must not leave
    results in tensors that it made.
    """

    def __init__(self, work: Callable[[], object], device: torch.device, pool: Any) -> None:
        stream = capture_stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream), torch.inference_mode():
            for _ in range(2):
                work()
        torch.cuda.current_stream(device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # Another thread may use the device meanwhile; its calls must not disturb this capture.
        capture = torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local")
        with torch.inference_mode(), capture:
            work()

    def replay(self) -> None:
        """Queue it, without waiting for it."""
        self._graph.replay()


class DecodeGraph:
    """Replays `step(lanes)`. lanes: int64 [size], the slots to work on; unused lanes work on the spare slot."""

    def __init__(
        self,
        step: Callable[[torch.Tensor], None],
        size: int,
        spare: int,
        device: torch.device,
        pool: Any,
    ) -> None:
        """pool: as `Graph` takes it."""
        self._spare = spare
        self._lanes = torch.full((size,), spare, dtype=torch.int64, device=device)
        self._slots: list[int] | None = None
        self._graph = Graph(lambda: step(self._lanes), device, pool)  # on the spare slot only

    def run(self, slots: list[int], steps: int) -> None:
        """Queue `steps` steps on the given slots, without waiting for them."""
        if slots != self._slots:
            padded = slots + [self._spare] * (len(self._lanes) - len(slots))
            self._lanes.copy_(to_device(np.array(padded), self._lanes.device))
            self._slots = list(slots)
        for _ in range(steps):
            self._graph.replay()
