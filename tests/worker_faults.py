"""Workers of a pool that die, or stand still, while they certainly have work, however fast each process runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from nla_engine.capture.workers import CaptureWork, CaptureWorker
from nla_engine.engine.forecast import Tally
from nla_engine.workers.job import Parent
from nla_engine.workers.process import WorkerProcess


def kill(worker: WorkerProcess) -> None:
    """SIGKILL. Returns once the process has ended."""
    worker.kill()
    worker._process.wait()


@dataclass
class Killer:
    """Kills workers of the pools of this process, each when it is given items for the second time, before it can do
    them. A worker asks for more while it has the first ones, or their results are on their way.

    left: how many more to kill; killed: numbers of those that were; how: kills one
    """

    left: int = 0
    killed: list[int] = field(default_factory=list)
    how: Callable[[WorkerProcess], None] = kill
    _given: set[int] = field(default_factory=set)

    def sends(self, worker: WorkerProcess, *message: object) -> None:
        """Called before a worker is sent a message."""
        if message[0] != "items" or not message[1]:
            return
        if self.left and worker.pid in self._given:
            self.left -= 1
            self.how(worker)
            self.killed.append(worker.number)
        self._given.add(worker.pid)


@dataclass(frozen=True)
class HeldWork(CaptureWork):
    """A capture whose workers stand still once four sequences of each have ended and others run. They go on when the
    run stops them. `held-*` in the directory of the store then names each."""

    def open(self, device: str, parent: Parent) -> CaptureWorker:
        return HeldWorker(self, device, parent)


class HeldWorker(CaptureWorker):
    """See `HeldWork`."""

    def __init__(self, work: HeldWork, device: str, parent: Parent) -> None:
        super().__init__(work, device, parent)
        self.beside = Path(work.options.out).parent

    def _watch(self, tally: Callable[[], Tally]) -> None:
        """A stop is heard here only, so not between two sequences."""
        while tally().ended >= 4 and tally().running:
            (self.beside / f"held-{id(self)}").touch()
            self.parent.state(tally)
            time.sleep(0.01)
