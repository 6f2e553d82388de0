"""One of several processes that run a model together, each with a slice of its weights: what they exchange.

Rank 0 is the process of the run. It decides what happens, and the others do the same after it (`Leader`, `follower`).
Every pass notes what it reads, and the notes are compared: ranks that fall out of step stop the run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from nla_engine.engine.peers import PeerSums, connect
from nla_engine.engine.pulse import Pulse
from nla_engine.engine.transfer import Glance
from nla_engine.errors import EngineError

_T = TypeVar("_T")
#: Named all_gather_into_tensor before torch 2.13.
_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
#: Weights of token, slot and position in a note, and the factor of the notes before it.
_TOKEN, _SLOT, _BEFORE = 1_000_003, 8191, 6_364_136_223_846_793_005
#: What torch does where NCCL fails: end what waits. By default it aborts the process, and nobody learns why.
_ON_ERRORS = ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2")


class Ranks:
    """A rank, its device and those of all ranks. `close` leaves the group.

    folder: where the ranks of one group meet, a directory of its own; timeout: seconds that one waits for the others
    """

    def __init__(self, rank: int, devices: Sequence[torch.device], folder: Path, timeout: float) -> None:
        if dist.is_initialized():
            raise EngineError(
                "--tensor-parallel: this process belongs to a group of torch.distributed already"
            )
        self.rank, self.devices, self.size = rank, tuple(devices), len(devices)
        self.device = self.devices[rank]
        self.pulse = Pulse(folder, rank, self.size)
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(self.device)
            os.environ.setdefault(*_ON_ERRORS)
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=dist.FileStore(str(folder / "store"), self.size),
            rank=rank,
            world_size=self.size,
            timeout=timedelta(seconds=timeout),
            device_id=self.device if on_gpu else None,
        )
        self._made = 0
        self._note = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._apart = torch.zeros(1, dtype=torch.bool, device=self.device)
        self._look = Glance(self._apart)
        self._looked = False
        found = connect(self) if on_gpu else "it has no GPU"
        self.peers: PeerSums | None = None if isinstance(found, str) else found
        #: Why sums go through NCCL; empty if they need not.
        self.without_peers = found if isinstance(found, str) else ""

    # ---- the same call on every rank ----

    def together(
        self, function: Callable[..., _T], *args: Any, there: dict[str, Any] | None = None, **more: Any
    ) -> _T:
        """function(*args, **more) on every rank; what it returns here. there: arguments that the others get instead."""
        return function(*args, **more)

    def make(
        self, function: Callable[..., _T], *args: Any, there: dict[str, Any] | None = None, **more: Any
    ) -> _T:
        """`together`. What it returns stands for its counterpart on each rank when it is passed to another call."""
        return self.together(self._kept, function, *args, there=there, **more)

    def _kept(self, function: Callable[..., _T], *args: Any, **more: Any) -> _T:
        made = function(*args, **more)
        self._made += 1
        self.keep(self._made, made)
        return made

    def last(self, function: Callable[..., object], *args: Any) -> None:
        """Let the other ranks do what this one is about to do when it ends its work, also after a failure."""

    def keep(self, number: int, made: Any) -> None:
        """Remember an object by its number, which is the same on every rank."""

    # ---- collectives: every rank calls them, in the same order ----

    def part(self, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor | None:
        """Where to write a part [rows, width] that is summed next, if that is faster than anywhere."""
        return None if self.peers is None else self.peers.part(rows, width, dtype)

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's tensor, in place; the same bits on all."""
        if self.peers is not None and self.peers.peers.has(part):
            return self.peers.sum(part)
        return self.reduce(part)

    def add(self, x: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        """x [T, d] + the sum of every rank's part [T, d]; the same bits on all. It takes the place of x."""
        if self.peers is not None and self.peers.peers.has(part):
            return self.peers.sum(part, x)
        return x.add_(self.reduce(part))

    def in_turn(
        self,
        parts: Iterable[tuple[slice, torch.Tensor]],
        summed: Callable[[slice, torch.Tensor], object],
    ) -> None:
        """Call summed(rows, sum) for each (rows, part). While one is summed, the device computes the next part."""
        before = None
        for rows, part in parts:
            self.pulse.beat()
            after = (rows, part, dist.all_reduce(part, async_op=True))
            if before is not None:
                before[2].wait()
                summed(*before[:2])
            before = after
        if before is not None:
            before[2].wait()
            summed(*before[:2])

    def own(self, states: torch.Tensor) -> torch.Tensor:
        """The states where the next pass does not change them."""
        held = self.peers is not None and self.peers.peers.holds(states)
        return states.clone() if held else states

    def reduce(self, part: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's tensor, in place, of any kind."""
        self.pulse.beat()
        dist.all_reduce(part)
        return part

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """The tensor of every rank, in a further first dimension."""
        self.pulse.beat()
        every = part.new_empty((self.size * part.shape[0], *part.shape[1:]))
        _gather(every, part.contiguous())
        return every.view(self.size, *part.shape)

    def columns(self, part: torch.Tensor, width: int) -> torch.Tensor:
        """[n, w] of every rank side by side, cut to [n, width]."""
        n, w = part.shape
        whole = self.gather(part).transpose(0, 1).reshape(n, self.size * w)
        return whole if width == self.size * w else whole[:, :width].contiguous()

    def from_first(self, tensor: torch.Tensor) -> None:
        """Replace the tensor by that of rank 0."""
        self.pulse.beat()
        dist.broadcast(tensor, 0)

    def each(self, number: int) -> list[int]:
        """The number of every rank."""
        every = self.gather(torch.tensor([number], dtype=torch.int64, device=self.device))
        return [int(value) for value in every.flatten().tolist()]

    # ---- whether they are in step ----

    def note(self, ids: torch.Tensor, slot: torch.Tensor, position: torch.Tensor) -> None:
        """Note what a pass reads, int64 [T] each. No synchronisation."""
        read = (ids * _TOKEN + slot * _SLOT + position).sum()
        self._note.mul_(_BEFORE).add_(read + len(ids))

    def look(self) -> None:
        """Queue a comparison of the notes of all ranks. No synchronisation."""
        self._apart.copy_((self.gather(self._note) != self._note).any(0))
        self._look.take()
        self._looked = True

    def check(self) -> None:
        """EngineError if the last look saw notes that differ, or another rank has failed. Waits for the look."""
        if self._looked and any(self._look.read()[0]):
            raise EngineError(
                "--tensor-parallel: the processes fell out of step, and read different tokens: what is committed is "
                "sound; run again with --resume"
            )

    def close(self) -> None:
        """Leave the group."""
        self.peers = None
        if hasattr(self, "pulse"):
            self.pulse.close()
        if dist.is_initialized():
            dist.destroy_process_group()
