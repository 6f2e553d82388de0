"""How far a command is, on stderr: a bar on a terminal, elsewhere a line every ten seconds."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.markup import escape
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from nla_engine.cli.output import console, say
from nla_engine.progress import Progress

#: Seconds between two lines where stderr is no terminal.
LINE_SECONDS = 10.0
#: Seconds, and the part of the work, from which on the time left is told.
_KNOWN_SECONDS, _KNOWN_PART = 3.0, 0.002

#: Those inside one another: only the last one is shown.
_shown: list[Shown] = []


class Shown(Progress):
    """Shows the phase, what is done of what, tokens and their rate, the time since the phase began and what is left."""

    def __init__(self, unit: str) -> None:
        self._lock = threading.Lock()
        self._name, self._told, self._done, self._total, self._tokens = "", False, 0, 0, 0
        self._ended = threading.Event()
        self._bar: Bar | None = None
        self._thread: threading.Thread | None = None
        if console.is_terminal:
            self._bar = Bar(
                TextColumn("{task.fields[about]}"), BarColumn(), TextColumn("{task.description}"),
                console=console, transient=True, get_time=time.monotonic,
            )  # fmt: skip
        self.phase("", unit)

    def phase(self, name: str, unit: str = "") -> None:
        """See `Progress`."""
        self._end()
        with self._lock:
            self._name, self._unit, self._began = name, unit, time.monotonic()
            self._told = False
            self._first: int | None = None
            self._done = self._total = self._tokens = 0
            self._part: float | None = None
            self._least = False
            if self._bar is not None:
                for task in self._bar.task_ids:
                    self._bar.remove_task(task)
                self._bar.add_task(self._name, total=None, about=escape(name or unit))

    def __call__(
        self, done: int, total: int, *, tokens: int = 0, part: float | None = None, least: bool = False
    ) -> None:
        """See `Progress`. Without `part`, what was done before the first call counts as an earlier run's."""
        with self._lock:
            self._done, self._total, self._tokens, self._least = done, total, tokens, least
            if self._first is None:
                self._first = done if part is None and done < total else 0
            whole = total - self._first
            self._part = part if part is not None else (done - self._first) / whole if whole > 0 else None
            if self._bar is not None:
                text = escape(self._words(with_phase=False))
                self._bar.update(
                    self._bar.task_ids[0], completed=self._part or 0.0, total=1.0, description=text
                )

    def line(self) -> str:
        """All of it in one line."""
        with self._lock:
            return self._words(with_phase=True)

    def _words(self, *, with_phase: bool) -> str:
        passed = time.monotonic() - self._began
        parts = []
        if self._total:
            parts.append(f"{self._done:,} of {self._total:,} {self._unit}")
        if self._tokens:
            rate = f" ({_rate(self._tokens / passed)})" if passed >= 1 else ""
            parts.append(f"{self._tokens:,} tokens{rate}")
        elif self._total and passed >= 1 and (new := self._done - (self._first or 0)):
            parts.append(_rate(new / passed))
        parts.append(f"{clock(passed)} so far")
        if self._part and passed >= _KNOWN_SECONDS and self._part >= _KNOWN_PART:
            left = clock(passed * (1 - self._part) / self._part)
            parts.append(f"{'at most' if self._least else 'about'} {left} left")
        told = ", ".join(parts)
        return f"{self._name}: {told}" if with_phase and self._name else told

    def start(self) -> None:
        """Show it."""
        if self._bar is not None:
            self._bar.start()
            return
        self._ended.clear()
        self._thread = threading.Thread(target=self._lines, name="progress", daemon=True)
        self._thread.start()

    def _end(self) -> None:
        """The last line of a phase that lines told of: all of it is done."""
        if self._told and self._bar is None and self._name:
            with self._lock:
                count = self._done == self._total and self._total
                parts = [f"{self._total:,} {self._unit}"] if count else []
                parts += [f"{self._tokens:,} tokens"] if count and self._tokens else []
                parts += [f"done in {clock(time.monotonic() - self._began)}"]
                text = f"{self._name}: {', '.join(parts)}"
            say(text)

    def close(self) -> None:
        """The work has been done: ends the last phase."""
        self._end()
        self._told = False

    def stop(self) -> None:
        """Hide it; it may be started again."""
        if self._bar is not None:
            self._bar.stop()
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _lines(self) -> None:
        while not self._ended.wait(LINE_SECONDS):
            if self._name:
                self._told = True
            say(self.line())


@contextmanager
def progress_bar(unit: str) -> Iterator[Shown]:
    """Shows progress inside; yields what is called with (done, total), and told of phases.

    unit: what is counted until a phase says otherwise
    """
    own = Shown(unit)
    if _shown:
        _shown[-1].stop()
    _shown.append(own)
    own.start()
    try:
        yield own
        own.stop()
        own.close()
    finally:
        own.stop()
        _shown.pop()
        if _shown:
            _shown[-1].start()


def _rate(per_second: float) -> str:
    """As 2,468/s, 3.4/s or 12 per minute."""
    if per_second < 1:
        return f"{60 * per_second:.2g} per minute"
    return f"{per_second:,.{0 if per_second >= 10 else 1}f}/s"


def clock(seconds: float) -> str:
    """As 0:07, 12:30 or 3:05:00."""
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
