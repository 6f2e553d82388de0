"""What a recipe says on stderr of how far it is: each phase as it begins, and a line now and then."""

from __future__ import annotations

import sys
import time
from typing import Any

from nla_engine.progress import Progress

_SECONDS = 15.0


class Told(Progress):
    """Prints lines with the seconds since it was made."""

    def __init__(self) -> None:
        self._begun, self._last = time.perf_counter(), 0.0
        self._name, self._unit = "", ""

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return time.perf_counter() - self._begun

    def say(self, text: str) -> None:
        """One line on stderr, with the time."""
        print(f"[{self.seconds:6.1f} s] {text}", file=sys.stderr, flush=True)

    def phase(self, name: str, unit: str = "") -> None:
        """See `Progress`."""
        self._name, self._unit, self._last = name, unit, self.seconds
        self.say(name)

    def __call__(self, done: int, total: int, *, tokens: int = 0, **_: Any) -> None:
        """See `Progress`."""
        if self.seconds - self._last >= _SECONDS:
            self._last = self.seconds
            more = f", {tokens:,} tokens" if tokens else ""
            self.say(f"{self._name}: {done:,} of {total:,} {self._unit}{more}")
