"""The sum of a tensor of every rank in one launch, for GPUs of one host that can read and write each other's memory.

    y = x + sum over ranks of part         x: the same on every rank, or left out

float32 inside, rounded once: a product that is split over ranks is added to the residual stream as one that is not.
Each rank computes a share of y, reads that share of every rank's part and writes it to every rank, so all have the same
bits. (Two-shot all-reduce: Rabenseifner, ICCS 2004; by loads and stores of the GPUs as in vLLM's custom all-reduce.)
Reference: `peer_sum_reference`. What a rank has that cannot do this: torch.distributed's all_reduce.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nla_engine.ops.triton_module import tl, triton

#: Most programs of a launch.
PROGRAMS = 128
#: Elements that a program sums at a time, and its warps: four elements a thread. With more, ptxas saves registers by
#: waiting for one rank's before it asks for the next one's.
_BLOCK, _WARPS = 2048, 16
#: The memory of a rank: where programs meet, then the parts, then the sums.
_MEETING_BYTES = 1 << 16


class Peers:
    """The memory of a group, as this process sees it. Every rank calls `sum` in the same order, on one stream.

    own: uint8 [2 room + 65,536], zeros, this rank's memory; addresses: of every rank's, here
    stop: int32 [1] that the host can write and the device can read. If it is not 0, launches no longer wait for other
    ranks, and what they write means nothing
    """

    def __init__(self, rank: int, own: torch.Tensor, addresses: Sequence[int], stop: torch.Tensor) -> None:
        self.rank, self.size, self.own, self.stop = rank, len(addresses), own, stop
        self.room = (own.numel() - _MEETING_BYTES) // 2
        self._parts, self._sums = (own[_MEETING_BYTES:].view(2, self.room)[number] for number in range(2))
        self._addresses = tuple(addresses)
        self._turn = torch.zeros(PROGRAMS, dtype=torch.int32, device=own.device)

    @staticmethod
    def bytes(room: int) -> int:
        """Of a rank's memory, for tensors of `room` bytes (a multiple of 512)."""
        return 2 * room + _MEETING_BYTES

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

        x may be a sum. ValueError if the part lies elsewhere.
        """
        if not self.has(part):
            raise ValueError("a part that is summed lies in `Peers.part`")
        target = self._parts if x is None else self._sums
        y = self._within(target, len(part), part.shape[1], part.dtype)
        assert y is not None
        read = y if x is None else x.contiguous()
        if self.holds(read) and read.data_ptr() != target.data_ptr():
            read = read.clone()  # it would be overwritten while it is read
        elements = part.numel()
        tiles = triton.cdiv(elements, _BLOCK * self.size)
        _peer_sum_kernel[(min(tiles, programs),)](
            read,
            self._addresses,
            part.data_ptr() - self.own.data_ptr(),
            y.data_ptr() - self.own.data_ptr(),
            self._turn,
            self.stop,
            elements,
            tiles,
            RANK=self.rank,
            ADD=x is not None,
            RANKS=self.size,
            SLOTS=triton.next_power_of_2(self.size),
            FENCE=part.is_cuda,
            BLOCK=_BLOCK,
            num_warps=_WARPS,
        )
        return y

    def _within(self, memory: torch.Tensor, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor | None:
        size = rows * width * dtype.itemsize
        return memory[:size].view(dtype).view(rows, width) if size <= self.room else None


def peer_sum_reference(parts: Sequence[torch.Tensor], x: torch.Tensor | None = None) -> torch.Tensor:
    """The sum of parts [T, d], and of x, in plain torch."""
    total = torch.zeros_like(parts[0], dtype=torch.float32) if x is None else x.float()
    for part in parts:
        total = total + part.float()
    return total.to(parts[0].dtype)


@triton.jit
def _meet(
    memories,  # RANKS addresses of every rank's int32 [PROGRAMS, SLOTS]: the last meeting of each rank
    stop,  # int32 [1]
    meeting,  # the number of this one
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    SLOTS: tl.constexpr,
    FENCE: tl.constexpr,
):
    """Wait until this program is here on every rank. What any of them wrote before, all see after it."""
    row = tl.program_id(0) * SLOTS
    slot = tl.arange(0, SLOTS)
    tl.debug_barrier()
    if FENCE:
        tl.inline_asm_elementwise(
            "fence.acq_rel.sys; mov.u32 $0, 0;", "=r", [], tl.int32, is_pure=False, pack=1
        )
    own = memories[RANK].to(tl.pointer_type(tl.int32)) + row
    for peer in tl.static_range(RANKS):
        place = memories[peer].to(tl.pointer_type(tl.int32)) + row
        tl.atomic_xchg(place + RANK, meeting, sem="relaxed", scope="sys")
    missing = tl.min(tl.load(own + slot, mask=slot < RANKS, other=meeting, volatile=True) - meeting, 0)
    looks = 0
    while missing < 0:  # a difference, as the numbers wrap around
        missing = tl.min(tl.load(own + slot, mask=slot < RANKS, other=meeting, volatile=True) - meeting, 0)
        looks += 1
        if looks % 1024 == 0:  # it is in the host's memory, which is far
            missing = tl.where(tl.load(stop, volatile=True) != 0, 0, missing)
    if FENCE:
        tl.inline_asm_elementwise(
            "fence.acq_rel.sys; mov.u32 $0, 0;", "=r", [], tl.int32, is_pure=False, pack=1
        )
    tl.debug_barrier()


@triton.jit(do_not_specialize=["tiles"])
def _peer_sum_kernel(
    x,  # [size]; not read unless ADD
    memories,  # RANKS addresses: every rank's memory, where programs meet first, see _meet
    parts,  # bytes from there to the rank's part [size], of x's dtype
    sums,  # bytes from there to where it gets the sum [size]; may be those of the part, or of x
    turn,  # int32 [PROGRAMS]: meetings that each program of this rank has had
    stop,  # int32 [1]
    size,
    tiles,  # of a rank's share
    RANK: tl.constexpr,
    ADD: tl.constexpr,
    RANKS: tl.constexpr,
    SLOTS: tl.constexpr,
    FENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    met = tl.load(turn + program)
    _meet(memories, stop, met + 1, RANK, RANKS, SLOTS, FENCE)  # every part is there, every sum has been read
    for tile in range(program, tiles, tl.num_programs(0)):
        at = (RANK * tiles + tile).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        real = at < size
        total = tl.zeros((BLOCK,), tl.float32)
        if ADD:
            total = tl.load(x + at, mask=real, other=0.0).to(tl.float32)
        for peer in tl.static_range(RANKS):
            part = tl.multiple_of((memories[peer] + parts).to(x.dtype), 16)
            total += tl.load(part + at, mask=real, other=0.0).to(tl.float32)
        y = total.to(x.dtype.element_ty)
        for peer in tl.static_range(RANKS):
            to = tl.multiple_of((memories[peer] + sums).to(x.dtype), 16)
            tl.store(to + at, y, mask=real)
    _meet(memories, stop, met + 2, RANK, RANKS, SLOTS, FENCE)  # every sum is there, every part has been read
    tl.store(turn + program, met + 2)
