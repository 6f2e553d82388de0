"""Rank 0 of a group: starts the other ranks, tells them what to do, and notices if one of them ends.

A call reaches the others through a socket pair of their own, so nothing else can send one. They run in processes of
their own, which end with this one.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, TypeVar

import torch

from nla_engine.engine.follower import counterpart, own_device
from nla_engine.engine.interrupts import Interrupts, main_thread_waits
from nla_engine.engine.pulse import Hangs, counts_of, make_pulse
from nla_engine.engine.ranks import Ranks
from nla_engine.engine.request import Request
from nla_engine.errors import EngineError, NLAError, RequestError
from nla_engine.models.load import pick_device
from nla_engine.workers.devices import AND

_T = TypeVar("_T")
#: Seconds: until every process has started; for a collective, which may wait for another rank to read its weights;
#: until a failure must have ended the run, else the process ends itself; for a process to end when told to.
START_SECONDS, COLLECTIVE_SECONDS, GRACE_SECONDS, END_SECONDS = 300.0, 1800.0, 30.0, 5.0
#: Seconds that the others wait for a rank that does nothing, until it is said to hang. One that compiles, or reads a
#: large weight, does nothing else.
HANG_SECONDS = 300
#: Seconds that an interrupt may take to end what the main thread waits in.
_HEAR_SECONDS = 3.0
#: What the process of another rank runs.
_PROGRAM = "from nla_engine.engine.follower import main; main()"
#: How long an error waits for the news that another rank has failed, which may be its cause.
_NEWS_SECONDS = 3.0
_OTHERS_SECONDS = 0.3


def first_device(name: str | None, size: int) -> str | None:
    """The device of rank 0 of a group of `size` ranks, if --device is `name`."""
    return name if name is None or size == 1 else name.split(AND)[0]


def group_devices(device: torch.device, size: int, name: str | None = None) -> tuple[torch.device, ...]:
    """The devices of a group of `size` ranks: from `device` on, or those that `name` joins, as cuda:0+cuda:2.

    RequestError if there are not as many GPUs, or the name has another number of them.
    """
    if name is not None and AND in name:
        devices = tuple(pick_device(each) for each in name.split(AND))
        pick_device(str(device))  # it is torch's current one
        if len(devices) != size or (device.type == "cuda" and len(set(devices)) < size):
            raise RequestError(f"--device is {name}: --tensor-parallel {size} needs {size} different ones")
        return devices
    if device.type == "cpu":
        return (device,) * size
    first, there = device.index or 0, torch.cuda.device_count()
    if first + size > there:
        behind = f" from {device} on" if first else ""
        raise RequestError(
            f"--tensor-parallel {size}: torch finds {there - first} GPUs{behind}: give at most as many"
        )
    return tuple(torch.device("cuda", first + number) for number in range(size))


@contextmanager
def open_ranks(devices: Sequence[torch.device]) -> Iterator[Ranks | None]:
    """The group of these devices, this process on the first of them. None for one device: no group is needed."""
    if len(devices) == 1:
        yield None
        return
    leader = Leader(devices)
    try:
        yield leader
    except Exception as error:
        cause = leader.explained(error)
        if cause is error:
            raise
        raise cause from error
    finally:
        leader.close()


@contextmanager
def ending_alone(ranks: Ranks | None) -> Iterator[None]:
    """Inside, the failure of another rank is a RuntimeError, which ends a worker of a pool but not the run."""
    try:
        yield
    except Exception as error:
        if isinstance(ranks, Leader) and (fault := str(ranks.explained(error))) and ranks.fault is not None:
            raise RuntimeError(fault) from error
        raise


class _Follower:
    """The process of another rank. `channel` carries calls to it, and news from it."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        ours, theirs = socket.socketpair()
        with theirs:
            path = os.pathsep.join(filter(None, sys.path))
            self.process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, str(theirs.fileno())],
                stdin=subprocess.PIPE,  # it ends when this closes, whatever it is doing
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C is for rank 0, which ends the others
            )
        self.channel = Connection(ours.detach())

    def end(self, seconds: float) -> None:
        """Wait so long for the process to leave, or end it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(max(seconds, 0.0))
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.channel.close()


class Leader(Ranks):
    """Rank 0. Calls come from one thread. fault: why another rank has ended; None while all run."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self.fault: str | None = None
        self._told = threading.Event()  # a fault was found
        self._done = threading.Event()  # the group is closed
        self._inside = False
        self._interrupted = False
        self._numbers: dict[int, int] = {}  # of objects, by id
        self._dropped: list[int] = []
        self._folder = Path(tempfile.mkdtemp(prefix="nla-ranks-"))
        self._followers: list[_Follower] = []
        self.device, self.peers, self._looked = devices[0], None, False
        self._interrupts = Interrupts(self._hear)
        try:
            make_pulse(self._folder, len(devices))
            threads = max(torch.get_num_threads() // len(devices), 1)
            for rank in range(1, len(devices)):
                self._followers.append(_Follower(rank))
            for each in self._followers:
                each.channel.send(
                    (each.rank, tuple(map(str, devices)), str(self._folder), COLLECTIVE_SECONDS, threads)
                )
            for each in self._followers:
                if not each.channel.poll(START_SECONDS):
                    raise EngineError(
                        f"--tensor-parallel: rank {each.rank} did not start in {START_SECONDS:.0f} s"
                    )
                if (news := self._news(each)) != "":
                    raise EngineError(f"--tensor-parallel: {news}")
            self._watcher = threading.Thread(target=self._watch, name="ranks", daemon=True)
            self._watcher.start()
            super().__init__(0, devices, self._folder, COLLECTIVE_SECONDS)
            self._numbers[id(self)] = 0
        except BaseException:
            self.close()
            raise

    # ---- calls ----

    def together(
        self, function: Callable[..., _T], *args: Any, there: dict[str, Any] | None = None, **more: Any
    ) -> _T:
        """Calls within a call are part of it on every rank: they are not told."""
        if self._inside:
            return function(*args, **more)
        self.check_alive()
        self._inside = True
        try:
            self._tell(function, args, more | (there or {}))
            return function(*args, **more)
        finally:
            self._inside = False

    def last(self, function: Callable[..., object], *args: Any) -> None:
        """Tell the others only, unless one has failed."""
        if self.fault is None and not self._inside and not self._done.is_set():
            with contextlib.suppress(EngineError):
                self._tell(function, args, {})

    def _tell(self, function: Callable[..., object], args: tuple[Any, ...], more: dict[str, Any]) -> None:
        self.pulse.beat()
        dropped, self._dropped = self._dropped, []
        call = io.BytesIO()
        _Pickler(call, self._numbers, self.device).dump((dropped, function, args, more))
        for each in self._followers:
            try:
                each.channel.send_bytes(call.getbuffer())
            except OSError as error:
                self._told.wait(_NEWS_SECONDS)
                raise EngineError(self.fault or f"rank {each.rank} cannot be reached") from error

    def keep(self, number: int, made: Any) -> None:
        """Forget an object once nothing here refers to it."""
        self._numbers[id(made)] = number
        weakref.finalize(made, self._drop, id(made), number)

    def _drop(self, key: int, number: int) -> None:
        self._numbers.pop(key, None)
        self._dropped.append(number)

    # ---- failures ----

    def check(self) -> None:
        """See `Ranks.check`."""
        if self._looked:
            self._look.read()  # what it saw means nothing if the others have failed by then
        self.check_alive()
        super().check()

    def check_alive(self) -> None:
        """EngineError if another rank has failed."""
        if self.fault is not None:
            raise EngineError(self.fault)

    def explained(self, error: Exception) -> Exception:
        """The error, or that of another rank if it may be the cause of this one."""
        if isinstance(error, NLAError) or not isinstance(error, RuntimeError):
            return error
        self._told.wait(_NEWS_SECONDS)
        return error if self.fault is None else EngineError(self.fault)

    def _news(self, follower: _Follower) -> str:
        """What a follower says, or how it ended."""
        try:
            return str(follower.channel.recv())
        except (EOFError, OSError):
            code = follower.process.wait()
            how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
            return f"the process of rank {follower.rank} {how}"

    def _watch(self) -> None:
        """Wait for the first failure of another rank, and end what waits for it."""
        by_channel: dict[Any, _Follower] = {each.channel: each for each in self._followers}
        counts = counts_of(self._folder, 1 + len(self._followers))
        hangs, unfinished = Hangs(counts), 0
        while not self._done.is_set():
            try:
                ready = wait(list(by_channel), timeout=1.0)
            except OSError:  # closed while it was waited for
                return
            if self._done.is_set():
                return
            if ready:
                time.sleep(_OTHERS_SECONDS)  # one that fails because another one is gone may be heard first
                ready = wait(list(by_channel), timeout=0.0)
                killed = [each for each in ready if (by_channel[each].process.poll() or 0) < 0]
                self._fail(self._news(by_channel[(killed or ready)[0]]))
                return
            unfinished = unfinished + 1 if self._looked and not self._look.passed else 0
            if unfinished >= HANG_SECONDS:
                self._fail(f"the GPUs have not finished in {HANG_SECONDS} s what every process has queued")
                return
            if hung := hangs.look(HANG_SECONDS):
                self._fail(hung)
                return

    def _fail(self, why: str) -> None:
        """End what waits for another rank, and this process if that does not help."""
        if not self._interrupted:
            self.fault = f"--tensor-parallel: {why}"
            self._told.set()
        self._abort()
        if not self._done.wait(GRACE_SECONDS) and not self._interrupted:  # the run waits for a device
            print(f"error: {self.fault}", file=sys.stderr, flush=True)
            self._kill()
            os._exit(1)

    def _hear(self, number: int) -> None:
        """A signal came. If the main thread cannot hear it, end what it waits in, then the process."""
        if signal.getsignal(number) is not signal.default_int_handler:
            return
        if main_thread_waits(_HEAR_SECONDS, self._done):
            self._interrupted = True
            self.fault = self.fault or "--tensor-parallel: interrupted while one rank waited for another"
            self._abort()
            if main_thread_waits(GRACE_SECONDS, self._done):
                print(
                    "interrupted while it waits for a GPU that does not answer", file=sys.stderr, flush=True
                )
                self._kill()
                os._exit(128 + number)

    def _abort(self) -> None:
        """End the other ranks, and collectives that wait for them. On a CPU these end by themselves."""
        self._kill()
        if self.device.type == "cuda":
            import torch.distributed as dist

            if (peers := self.peers) is not None:
                peers.stop()
            group: Any = dist.group.WORLD
            with contextlib.suppress(Exception):
                threading.Thread(target=group._get_backend(self.device).abort, daemon=True).start()

    def _kill(self) -> None:
        for each in self._followers:
            each.process.kill()

    def close(self) -> None:
        """End the other ranks and leave the group."""
        self._done.set()
        for each in self._followers:
            with contextlib.suppress(OSError):
                each.channel.send(None)
        leaving = threading.Thread(target=super().close, daemon=True)
        leaving.start()
        leaving.join(END_SECONDS)  # it does not end where another rank waits for this one
        if leaving.is_alive():  # nor may the end of this process wait for it
            atexit.register(signal.alarm, int(GRACE_SECONDS))
        end = time.monotonic() + 1.0
        for each in self._followers:
            each.end(end - time.monotonic())
        self._interrupts.close()
        shutil.rmtree(self._folder, ignore_errors=True)


class _Pickler(ForkingPickler):
    """Writes a call. Objects made on every rank are written as their numbers, tensors as arrays."""

    def __init__(self, file: io.BytesIO, numbers: dict[int, int], device: torch.device) -> None:
        super().__init__(file, 5)
        self._numbers, self._device = numbers, device

    def reducer_override(self, value: Any) -> Any:
        """How to write a value; NotImplemented: as usual."""
        if (number := self._numbers.get(id(value))) is not None:
            return counterpart, (number,)
        if isinstance(value, torch.Tensor):
            return torch.from_numpy, (value.detach().cpu().numpy(),)
        if isinstance(value, torch.device) and value == self._device:
            return own_device, ()
        if isinstance(value, Request):  # vectors enter on rank 0, and what they change is passed on
            return Request, tuple(
                None if each.name == "vectors" else getattr(value, each.name) for each in fields(Request)
            )
        return NotImplemented
