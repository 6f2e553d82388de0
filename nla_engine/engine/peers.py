"""Lets the GPUs of a group write each other's memory, and finds out for which sizes that sums faster than NCCL.

Asked once, when a group opens. Wherever the GPUs cannot, or it sums wrongly, every rank goes on with NCCL.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from statistics import median
from typing import Protocol

import torch

from nla_engine.errors import first_line
from nla_engine.ops.backends import cuda_fault
from nla_engine.ops.peer_sum import RANKS, Peers

#: Environment variable: 1 tries it. The kernel has not run on GPUs yet, so every sum is left to NCCL else.
SWITCH = "NLA_PEER_SUMS"
#: Bytes of the largest tensor that is summed so.
ROOM = 64 << 20
#: Rows and width of the tensors whose sums are compared with NCCL's.
_TRIED = ((1, 8), (37, 1000), (256, 8192))
#: Bytes of the tensors that are timed, and the programs of a launch that are tried for each.
_TIMED, _PROGRAMS = tuple(1 << power for power in range(17, 27)), (32, 64, 128)
#: One timing: launches, and cycles of the device that let the host get ahead of it.
_LAUNCHES, _HOLD_CYCLES, _ROUNDS = 16, 3_000_000, 3
#: It must be this much faster than NCCL.
_GAIN = 1.02
#: Largest difference from NCCL's sum, relative: bfloat16 rounds to 2^-9, several times.
_DIFFERENCE = 2**-7
#: Seconds of a first sum; one that takes longer never ends.
_TRIAL_SECONDS = 30.0
#: Bytes of what a rank says of its memory.
_SAID = 2048


class Group(Protocol):
    """What is needed of a rank: see `ranks.Ranks`."""

    rank: int
    size: int
    device: torch.device
    devices: tuple[torch.device, ...]

    def each(self, number: int) -> list[int]:
        """The number of every rank."""

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """The tensor of every rank, in a further first dimension."""

    def reduce(self, part: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's tensor, in place."""


class PeerSums:
    """Sums tensors of a group, where that is faster than NCCL.

    took: by bytes of a tensor, hundredths of a microsecond of a sum with a residual, by programs of a launch; 0: NCCL
        and an addition. Those of the slowest rank, so the same on all.
    """

    def __init__(
        self, peers: Peers, took: dict[int, dict[int, int]], others: list[torch.UntypedStorage]
    ) -> None:
        self.peers, self.took, self._others = peers, took, others
        best = {size: min(_PROGRAMS, key=way.__getitem__) for size, way in took.items()}
        self._ways = {
            size: best[size] if way[0] > _GAIN * way[best[size]] else 0 for size, way in took.items()
        }

    def part(self, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor | None:
        """Where to write a part that is to be summed so; None: NCCL is faster."""
        return self.peers.part(rows, width, dtype) if self._programs(rows * width * dtype.itemsize) else None

    def sum(self, part: torch.Tensor, x: torch.Tensor | None = None) -> torch.Tensor:
        """See `Peers.sum`."""
        return self.peers.sum(part, x, self._programs(part.nbytes))

    def _programs(self, size: int) -> int:
        """Programs of a launch for so many bytes; 0: NCCL is faster, or there is no room."""
        if not 0 < size <= ROOM:
            return 0
        return self._ways[min(self._ways, key=lambda timed: max(timed, size) / min(timed, size))]

    def stop(self) -> None:
        """Let no launch wait for another rank any more."""
        self.peers.stop.fill_(1)


def connect(group: Group) -> PeerSums | str:
    """Every rank calls it at the same time. All get the sums, or each why they use NCCL."""
    own, why = None, _unreachable(group)
    said = ""
    if not why:
        try:
            own, said = _shared(group)
        except (RuntimeError, OSError) as error:
            why = f"the driver does not share memory ({first_line(error)})"
    told = _exchange(group, said)
    peers, others = None, list[torch.UntypedStorage]()
    if own is not None and all(told):
        try:
            peers, others = _opened(group, own, told)
        except (RuntimeError, OSError) as error:
            why = f"the driver does not open shared memory ({first_line(error)})"
    if min(group.each(peers is not None)) == 0:
        return why or "another rank cannot"
    assert peers is not None
    if why := _fault(group, peers):
        peers.stop.fill_(1)
        return why
    return PeerSums(peers, _measured(group, peers), others)


def _unreachable(group: Group) -> str:
    """Why this rank cannot reach the others' memory; empty if the driver says that it can."""
    here = group.device.index
    others = [device.index for device in group.devices if device != group.device]
    if os.environ.get(SWITCH) != "1":
        return f"{SWITCH} is not 1"
    if group.size > RANKS:
        return f"a sum in each other's memory is for {RANKS} GPUs at most"
    if cuda_fault(group.device):
        return "the CUDA part of the extension does not run"
    far = [other for other in others if not torch.cuda.can_device_access_peer(here, other)]
    return f"cuda:{here} cannot access cuda:{far[0]}" if far else ""


def _shared(group: Group) -> tuple[torch.Tensor, str]:
    """The memory of this rank, and how others open it."""
    own = torch.zeros(Peers.bytes(ROOM), dtype=torch.uint8, device=group.device)
    torch.cuda.synchronize(group.device)
    _, *how = own.untyped_storage()._share_cuda_()
    said = json.dumps([each.hex() if isinstance(each, bytes) else each for each in how])
    if len(said) > _SAID:
        raise RuntimeError(f"it takes {len(said)} bytes to say where it is")
    return own, said


def _exchange(group: Group, said: str) -> list[str]:
    """What every rank says, in ASCII."""
    line = torch.frombuffer(bytearray(said.encode().ljust(_SAID)), dtype=torch.uint8)
    every = group.gather(line.to(group.device)).cpu()
    return [bytes(each.tolist()).decode().strip() for each in every]


def _opened(group: Group, own: torch.Tensor, told: list[str]) -> tuple[Peers, list[torch.UntypedStorage]]:
    """The memory of every rank in the address space of this one's device. The storages keep it open."""
    addresses, others = [], []
    for rank, text in enumerate(told):
        if rank == group.rank:
            addresses.append(own.data_ptr())
            continue
        handle, size, offset, counter, place, event, _ = json.loads(text)
        storage = torch.UntypedStorage._new_shared_cuda(
            group.device.index,  # the device that reaches it, not that on which it lies
            bytes.fromhex(handle),
            size,
            offset,
            bytes.fromhex(counter),
            place,
            bytes.fromhex(event),
            False,
        )
        others.append(storage)
        addresses.append(storage.data_ptr())
    stop = torch.zeros(1, dtype=torch.int32, pin_memory=True)
    return Peers(group.rank, own, addresses, stop), others


def _fault(group: Group, peers: Peers) -> str:
    """What is wrong with several sums in a row, on any rank; empty: nothing. One that does not end is ended."""
    draw = torch.Generator(group.device).manual_seed(group.rank)
    same = torch.Generator(group.device).manual_seed(group.size)
    mine, x = (
        [torch.randn(*size, device=group.device, generator=each).bfloat16() for size in _TRIED]
        for each in (draw, same)
    )
    try:
        sums, why = _tried(peers, mine, x), ""
    except Exception as error:  # whatever it is, NCCL goes on
        sums, why = [], f"a first sum failed ({first_line(error)})"
    passed = torch.cuda.Event()
    passed.record()
    end = time.monotonic() + _TRIAL_SECONDS
    while not passed.query() and not why:
        if time.monotonic() > end:
            why = f"a first sum did not end in {_TRIAL_SECONDS:.0f} s"
        time.sleep(0.001)
    if why:
        peers.stop.fill_(1)
    if min(group.each(not why)) == 0:
        return why or "another rank cannot sum so"
    wanted = [truth for own in mine for truth in [group.reduce(own.float())] * 2]
    for number, residual in enumerate(x):
        wanted[2 * number + 1] = wanted[2 * number] + residual.float()
    apart = [float((a - b).norm() / b.norm()) for a, b in zip(sums, wanted, strict=True)]
    worst = max(min(each, 1e3) if math.isfinite(each) else 1e3 for each in apart)
    wrong = max(group.each(round(worst * 1e6))) / 1e6
    return "" if wrong <= _DIFFERENCE else f"a first sum is off by {wrong:.2g}"


def _tried(peers: Peers, mine: list[torch.Tensor], x: list[torch.Tensor]) -> list[torch.Tensor]:
    """The sum of every tensor over the ranks, without its x and with it, float32."""
    sums = []
    for own, residual in zip(mine, x, strict=True):
        for each in (None, residual):
            part = peers.part(len(own), own.shape[1], own.dtype)
            assert part is not None
            sums.append(peers.sum(part.copy_(own), each).float().clone())
    return sums


def _measured(group: Group, peers: Peers) -> dict[int, dict[int, int]]:
    """See `PeerSums`."""
    width, dtype = 1024, torch.bfloat16
    every = {}
    for size in _TIMED:
        rows = size // (width * dtype.itemsize)
        x = torch.zeros(rows, width, dtype=dtype, device=group.device)
        own = torch.zeros_like(x)
        part = peers.part(rows, width, dtype)
        assert part is not None
        part.zero_()

        def by_nccl(x: torch.Tensor = x, own: torch.Tensor = own) -> object:
            return x.add_(group.reduce(own))

        def by_peers(programs: int, x: torch.Tensor = x, part: torch.Tensor = part) -> Callable[[], object]:
            return lambda: peers.sum(part, x, programs)

        took = {0: _microseconds(group, by_nccl)}
        took |= {programs: _microseconds(group, by_peers(programs)) for programs in _PROGRAMS}
        every[size] = took
    return every


def _microseconds(group: Group, launch: Callable[[], object]) -> int:
    """Hundredths, of a launch, on the slowest rank."""
    rounds = []
    for _ in range(_ROUNDS):
        group.each(0)  # start together
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(_HOLD_CYCLES)
        launch()
        start.record()
        for _ in range(_LAUNCHES):
            launch()
        end.record()
        end.synchronize()
        rounds.append(start.elapsed_time(end) * 1e3 / _LAUNCHES)
    return max(group.each(round(100 * median(rounds))))
