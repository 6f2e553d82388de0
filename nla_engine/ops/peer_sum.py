"""The sum of a tensor of every rank in one launch, for GPUs of one host that can read and write each other's memory.

    y = x + sum over ranks of part         x: the same on every rank, or left out

float32 inside, rounded once: a product that is split over ranks is added to the residual stream as one that is not.
Each rank computes a share of y, reads that share of every rank's part and writes it to every rank, so all have the same
bits. The kernel is CUDA C++ (csrc/peer_sum.cu, which also says what orders its reads and writes).
Reference: `peer_sum_reference`. What a rank has that cannot do this: torch.distributed's all_reduce.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nla_engine import extension

#: Most programs of a launch, and most ranks: kMostPrograms and kMostRanks of csrc/peer_sum.hpp.
PROGRAMS, RANKS = 128, 8
#: The memory of a rank: words by which programs meet, then the parts, then the sums.
MEETING_BYTES = 4 * PROGRAMS * RANKS
#: Addresses that the kernel reads and writes are multiples of it.
_ALIGNMENT = 16


class Peers:
    """The memory of a group, as this process sees it. Every rank calls `sum` in the same order, on one stream.

    own: uint8 [bytes(room)], zeros, this rank's memory; addresses: of every rank's, here, at most 8
    stop: int32 [1] that the host can write and the device can read. If it is not 0, launches no longer wait for other
    ranks, and what they write means nothing
    """

    def __init__(self, rank: int, own: torch.Tensor, addresses: Sequence[int], stop: torch.Tensor) -> None:
        self.rank, self.size, self.own, self.stop = rank, len(addresses), own, stop
        self.room = (own.numel() - MEETING_BYTES) // 2
        self._parts, self._sums = (own[MEETING_BYTES:].view(2, self.room)[number] for number in range(2))
        # The next rank first: at any time each one reads another rank's memory.
        self._memory = [addresses[(rank + distance) % self.size] for distance in range(self.size)]
        self._turn = torch.zeros(PROGRAMS, dtype=torch.int32, device=own.device)

    @staticmethod
    def bytes(room: int) -> int:
        """Of a rank's memory, for tensors of `room` bytes (a multiple of 512)."""
        return 2 * room + MEETING_BYTES

    def part(self, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor | None:
        """Where to write a part [rows, width] that is summed; valid until the next one. None: there is no room."""
        return self._within(self._parts, rows, width, dtype)

    def has(self, part: torch.Tensor) -> bool:
        """Whether a tensor came from `part`."""
        return part.data_ptr() == self._parts.data_ptr()

    def holds(self, states: torch.Tensor) -> bool:
        """Whether a tensor lies where `sum` writes, and changes with the next sum."""
        start = self.own.data_ptr()
        return start <= states.data_ptr() < start + self.own.numel()

    def sum(
        self, part: torch.Tensor, x: torch.Tensor | None = None, programs: int = PROGRAMS
    ) -> torch.Tensor:
        """x [T, d] + the sum of every rank's `part` [T, d]; without x in the part's memory, else in that of all sums.

        float32, float16 or bfloat16. x may be a sum. ValueError if the part lies elsewhere.
        """
        if not self.has(part):
            raise ValueError("a part that is summed lies in `Peers.part`")
        target = self._parts if x is None else self._sums
        y = self._within(target, len(part), part.shape[1], part.dtype)
        assert y is not None
        if x is not None:
            x = x.contiguous()
            overwritten = self.holds(x) and x.data_ptr() != y.data_ptr()
            if overwritten or x.data_ptr() % _ALIGNMENT:
                x = x.clone()
        start = self.own.data_ptr()
        _launch(
            self.own.device,
            programs=programs,
            memory=self._memory,
            rank=self.rank,
            part=part.data_ptr() - start,
            sum=y.data_ptr() - start,
            x=0 if x is None else x.data_ptr(),
            size=part.numel(),
            dtype=str(part.dtype).removeprefix("torch."),
            turn=self._turn.data_ptr(),
            stop=self.stop.data_ptr(),
        )
        return y

    def _within(self, memory: torch.Tensor, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor | None:
        size = rows * width * dtype.itemsize
        return memory[:size].view(dtype).view(rows, width) if size <= self.room else None


def _launch(device: torch.device, **given: Any) -> None:
    """The kernel on the current stream of a device."""
    module = extension.load()
    assert module is not None  # whoever made `Peers` has checked
    module.peer_sum(device.index, torch.cuda.current_stream(device).cuda_stream, **given)


def peer_sum_reference(parts: Sequence[torch.Tensor], x: torch.Tensor | None = None) -> torch.Tensor:
    """The sum of parts [T, d], and of x, in plain torch."""
    total = torch.zeros_like(parts[0], dtype=torch.float32) if x is None else x.float()
    for part in parts:
        total = total + part.float()
    return total.to(parts[0].dtype)
