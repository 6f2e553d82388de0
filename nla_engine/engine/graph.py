"""A decode step captured in a CUDA graph, for a fixed number of lanes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from nla_engine.engine.streams import capture_stream
from nla_engine.engine.transfer import to_device

#: The lane counts that graphs are captured for. A step runs on the next larger one.
LANE_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024)


def lane_bucket(lanes: int) -> int:
    """Lanes of the graph that runs `lanes` > 0. Beyond the table there are four sizes per doubling: 1280, ..., 2048."""
    if lanes <= LANE_BUCKETS[-1]:
        return next(bucket for bucket in LANE_BUCKETS if bucket >= lanes)
    step = 1 << ((lanes - 1).bit_length() - 3)
    return -(-lanes // step) * step


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
        """pool: from torch.cuda.graph_pool_handle(). Graphs of one pool reuse the same memory, so a step must not leave
        results in tensors that it made."""
        self._spare = spare
        self._lanes = torch.full((size,), spare, dtype=torch.int64, device=device)
        self._slots: list[int] | None = None
        stream = capture_stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream), torch.inference_mode():
            for _ in range(2):  # compiles kernels, loads libraries; on the spare slot only
                step(self._lanes)
        torch.cuda.current_stream(device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # Another thread may use the device meanwhile; its calls must not disturb this capture.
        capture = torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local")
        with torch.inference_mode(), capture:
            step(self._lanes)

    def run(self, slots: list[int], steps: int) -> None:
        """Queue `steps` steps on the given slots, without waiting for them."""
        if slots != self._slots:
            padded = slots + [self._spare] * (len(self._lanes) - len(slots))
            self._lanes.copy_(to_device(np.array(padded), self._lanes.device))
            self._slots = list(slots)
        for _ in range(steps):
            self._graph.replay()
