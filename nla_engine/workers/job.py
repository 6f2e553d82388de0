"""What a pool runs: the interface of a job, of a worker that does it, and of what a worker may tell the run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

#: What a worker's `run` is told of an item; None: nothing just now.
Told = Any


@dataclass(frozen=True)
class Waited:
    """Seconds that a worker stood still: it began later than the first one, had no items although others waited to be
    handed out or were with others, could not hand over results, or had nothing more to do."""

    start: float = 0.0
    items: float = 0.0
    results: float = 0.0
    end: float = 0.0


class Stopped(Exception):
    """Raised inside a worker if the run ends before its work is done."""


class Parent(Protocol):
    """The run that a worker belongs to."""

    def announce(self, text: str) -> None:
        """Say a line. The same line of several workers is said once."""

    def state(self, make: Callable[[], Any]) -> None:
        """Report how far the worker is. Cheap: `make` is called a few times per second only; what it returns must be
        picklable. Stopped if the run is over."""


class Worker(Protocol):
    """Does the work in a process of its own. It may also have `unfinished() -> Iterable[Any]`, which a pool that stops
    early can ask for. The process ends after `run`, and what the worker holds with it."""

    def run(self, items: Iterator[Told | None]) -> Iterator[tuple[int, Any]]:
        """Yield (item, result) for each item, in any order. Arrays in a result must not change after it is yielded.

        items: read it when there is room for more work. None means that there is nothing just now, and comes only while
            results of items read before have not been yielded. Its end means that all results are there, or with others
        """


class Job(Protocol):
    """A picklable description of the work. Its class must be importable by name."""

    def open(self, device: str, parent: Parent) -> Worker:
        """Called once in the new process. device: as the pool was given it, such as "cuda:1" or "cpu".

        Errors of `nla_engine.errors` end the whole run; any other, or the end of the process, ends this worker only.
        """


def unfinished_of(worker: Worker) -> Iterable[Any]:
    """What a stopped worker leaves, if it can say so."""
    tell: Callable[[], Iterable[Any]] = getattr(worker, "unfinished", tuple)
    return tell()
