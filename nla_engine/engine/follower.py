"""A rank other than the first: does what rank 0 tells it, until rank 0 is gone.

`main` takes the file descriptor of a socket that only rank 0 holds the other end of.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from nla_engine.engine.ranks import Ranks
from nla_engine.errors import NLAError, first_line

#: PR_SET_PDEATHSIG in linux/prctl.h.
_SIGNAL_AT_PARENTS_END = 1


class Follower(Ranks):
    """Keeps what calls made here, by number. 0 is the rank itself."""

    objects: dict[int, Any]

    def keep(self, number: int, made: Any) -> None:
        """Until rank 0 has dropped its own."""
        self.objects[number] = made


#: The rank of this process, once it has joined its group.
_here: list[Follower] = []


def counterpart(number: int) -> Any:
    """The object that stands here for one of rank 0."""
    return _here[0].objects[number]


def own_device() -> torch.device:
    """The device that stands here for that of rank 0."""
    return _here[0].device


def follow(channel: Connection) -> None:
    """Join the group, then run calls as they come."""
    rank, devices, folder, timeout, threads = channel.recv()
    torch.set_num_threads(threads)
    channel.send("")
    ranks = Follower(rank, [torch.device(name) for name in devices], Path(folder), timeout)
    ranks.objects = {0: ranks}
    _here.append(ranks)
    while True:
        if (call := channel.recv()) is None:
            ranks.close()
            return
        ranks.pulse.beat()
        dropped, function, args, more = call
        for number in dropped:
            ranks.objects.pop(number, None)
        _run(function, args, more)
        del call, function, args, more  # nothing here keeps what rank 0 drops


def _run(function: Callable[..., object], args: tuple[Any, ...], more: dict[str, Any]) -> None:
    with torch.inference_mode():
        function(*args, **more)


def _end_with_the_leader() -> None:
    """Standard input closes when rank 0 ends, also while this process waits for it on the device."""
    while os.read(0, 1):
        pass
    os._exit(0)


def _end_at_once_with_the_leader() -> None:
    """The same on Linux, also of a process that is stopped. It ends with the thread that made the leader."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SIGNAL_AT_PARENTS_END, signal.SIGKILL)


def main() -> None:
    """Run as a process of `Leader`."""
    channel = Connection(int(sys.argv[1]))
    _end_at_once_with_the_leader()
    threading.Thread(target=_end_with_the_leader, daemon=True).start()
    try:
        follow(channel)
    except (EOFError, ConnectionError):
        os._exit(0)
    except Exception as error:
        rank = _here[0].rank if _here else "another rank"
        text = str(error) if isinstance(error, NLAError) else f"{type(error).__name__}: {first_line(error)}"
        channel.send(f"rank {rank} failed: {text}")
        os._exit(1)
