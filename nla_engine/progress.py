"""What a run tells of how far it is: the phase it is in, what is done of what, tokens, and which part of the work."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


class Progress:
    """Hears how far a run is. This one ignores it."""

    def phase(self, name: str, unit: str = "") -> None:
        """A new phase begins. unit: what its `done` and `total` count."""

    def __call__(
        self, done: int, total: int, *, tokens: int = 0, part: float | None = None, least: bool = False
    ) -> None:
        """done: of `total`, including what an earlier run did; tokens: generated or read in this phase so far.

        part: of this run's work in the phase, 0 to 1; None: as done is of total. least: the part may be larger, as no
        reply has ended yet
        """


#: announce(line for the user)
Announce = Callable[[str], None]
#: progress(done, total), as far as is known, or one that is told the phases too
Heard = Callable[[int, int], None] | Progress


class _Plain(Progress):
    """Calls a function (done, total) whenever one of the two has changed."""

    def __init__(self, call: Callable[[int, int], None]) -> None:
        self._call, self._last, self._counts = call, (-1, -1), ""

    def phase(self, name: str, unit: str = "") -> None:
        """The function is not told; it counts one phase only."""
        self._counts = unit

    def __call__(self, done: int, total: int, **_: Any) -> None:
        if self._counts != "tokens" and (done, total) != self._last:
            self._last = (done, total)
            self._call(done, total)


def heard(progress: Callable[[int, int], None] | Progress) -> Progress:
    """The same, or a Progress that calls a plain function (done, total)."""
    return progress if isinstance(progress, Progress) else _Plain(progress)


class Phases(Progress):
    """Passes everything on to another, and keeps the seconds of each phase."""

    def __init__(self, progress: Callable[[int, int], None] | Progress) -> None:
        self._to = heard(progress)
        self._name, self._since = "", time.perf_counter()
        self._seconds: dict[str, float] = {}

    @classmethod
    def of(cls, progress: Callable[[int, int], None] | Progress) -> Phases:
        """The same if it keeps seconds already, so that these go on."""
        return progress if isinstance(progress, cls) else cls(progress)

    def phase(self, name: str, unit: str = "") -> None:
        """Also ends the phase before. One that comes again adds to its seconds."""
        self._close()
        self._name = name
        self._to.phase(name, unit)

    def __call__(
        self, done: int, total: int, *, tokens: int = 0, part: float | None = None, least: bool = False
    ) -> None:
        """Passed on."""
        self._to(done, total, tokens=tokens, part=part, least=least)

    def _close(self) -> None:
        now = time.perf_counter()
        if self._name:
            self._seconds[self._name] = self._seconds.get(self._name, 0.0) + now - self._since
        self._since = now

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase up to now, rounded to milliseconds."""
        self._close()
        return {name: round(seconds, 3) for name, seconds in self._seconds.items()}
