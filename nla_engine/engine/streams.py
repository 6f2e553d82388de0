"""The CUDA streams of this process besides torch's default one, and the device of a thread.

torch gives out 32 streams in turn, so a stream made for each use would sometimes be one in use already. What another
thread launches on the stream of a graph's capture becomes part of the graph instead of being run.
"""

from __future__ import annotations

from functools import cache

import torch


def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which graphs are captured."""
    return _streams(_number(device))[0]


def side_stream(device: torch.device) -> torch.cuda.Stream:
    """For work of another thread, in parallel with the default stream and any capture."""
    return _streams(_number(device))[1]


def branch_stream(device: torch.device) -> torch.cuda.Stream:
    """For the part of a graph being captured that may run in parallel with the rest."""
    return _streams(_number(device))[2]


def glance_stream(device: torch.device) -> torch.cuda.Stream:
    """For what the host fetches while the default stream goes on."""
    return _streams(_number(device))[3]


def enter_device(device: torch.device) -> None:
    """Call in a new thread, which starts on the first GPU whatever its parent's is. Does nothing for a CPU."""
    if device.type == "cuda":
        torch.cuda.set_device(_number(device))


def _number(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@cache
def _streams(number: int) -> tuple[torch.cuda.Stream, ...]:
    device = torch.device("cuda", number)
    return tuple(torch.cuda.Stream(device) for _ in range(4))  # made in a row, so all different
