"""Jobs for tests of the worker pool: they compute nothing that a model would."""

import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nla_engine.errors import EngineError
from nla_engine.workers.job import Parent


@dataclass(frozen=True)
class Squares:
    """Result of item n: its square, and an array of `size` numbers n. at: item -> what happens there, once per entry
    that is left in the directory `marks`; "always" entries happen every time. meet: workers that must have an item each
    before any returns one."""

    marks: Path
    size: int = 3
    seconds: float = 0.0
    held: int = 1
    at: dict[int, str] = field(default_factory=dict)
    always: bool = False
    at_open: str = ""
    meet: int = 0

    def open(self, device: str, parent: Parent) -> "SquaresWorker":
        if self.at_open:
            happen(self.at_open)
        parent.announce("opened")
        return SquaresWorker(self, device, parent)


class SquaresWorker:
    def __init__(self, job: Squares, device: str, parent: Parent) -> None:
        self.job, self.device, self.parent = job, device, parent
        self.have: list[int] = []

    def run(self, items: Iterator[Any]) -> Iterator[tuple[int, Any]]:
        """Holds several items at once, as a batch does, and returns the last one first."""
        over, done = False, 0
        while not over or self.have:
            while not over and len(self.have) < self.job.held:
                item = next(items, ...)
                if item is None:
                    assert self.have, "None came although nothing is running"
                    break
                over = item is ...
                if not over:
                    self.have.append(item)
            if self.have:
                self.parent.state(lambda n=done: n)
                item = self.have.pop()
                self.act(item)
                time.sleep(self.job.seconds)
                done += 1
                yield item, (item * item, np.full(self.job.size, item), self.device, os.getpid())
        self.parent.state(lambda: done)

    def act(self, item: int) -> None:
        if self.job.meet:
            (self.job.marks / f"met-{os.getpid()}").touch()
            until(lambda: len(list(self.job.marks.glob("met-*"))) >= self.job.meet)
        what = self.job.at.get(item)
        mark = self.job.marks / str(item)
        if what and (self.job.always or not mark.exists()):
            mark.touch()
            if what == "wait":
                until((self.job.marks / "go").exists)
            happen(what)

    def unfinished(self) -> list[int]:
        return self.have


def until(true: Callable[[], object]) -> None:
    """Wait for what must come. EngineError if it does not."""
    end = time.monotonic() + 200
    while not true():
        if time.monotonic() > end:
            raise EngineError("it did not come")
        time.sleep(0.005)


def happen(what: str) -> None:
    """A way to fail."""
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "segfault":
        ctypes.string_at(0)
    if what == "exception":
        raise RuntimeError("CUDA error: an illegal\nmemory access")
    if what == "failed":
        raise EngineError("layer 3: 2 rows were never written")
    if what == "exit":
        os._exit(7)
