"""What a command shows of its progress, on a terminal and elsewhere."""

from __future__ import annotations

import io
import re
import threading
from types import SimpleNamespace

import pytest
from rich.console import Console

from nla_engine import progress
from nla_engine.cli import output
from nla_engine.cli import progress as shown
from nla_engine.progress import Phases, Progress, heard


class Lines(threading.Event):
    """The pause between two lines lasts until the next one is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self._turn, self._asked, self._pausing = threading.Condition(), False, False

    def wait(self, seconds: float | None = None) -> bool:
        assert seconds == shown.LINE_SECONDS == 10
        with self._turn:
            self._pausing = True
            self._turn.notify_all()
            assert self._turn.wait_for(lambda: self._asked or self.is_set(), 200)
            self._asked = self._pausing = False
        return self.is_set()

    def set(self) -> None:
        super().set()
        with self._turn:
            self._turn.notify_all()

    def pass_pause(self) -> None:
        """Returns when the line has been shown, and the next pause has begun."""
        with self._turn:
            assert self._turn.wait_for(lambda: self._pausing, 200)
            self._asked = True
            self._turn.notify_all()
            assert self._turn.wait_for(lambda: self._pausing and not self._asked, 200)


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """stderr that is no terminal. A line comes where a test says so, and no time passes."""
    console = Console(file=io.StringIO(), width=200)
    monkeypatch.setattr(shown, "console", console)
    monkeypatch.setattr(output, "console", console)
    monkeypatch.setattr(shown, "threading", SimpleNamespace(**{**vars(threading), "Event": Lines}))
    monkeypatch.setattr(shown, "time", SimpleNamespace(monotonic=lambda: 100.0))
    return console.file  # type: ignore[return-value]


def test_without_a_terminal_lines_come_by_themselves(lines: io.StringIO) -> None:
    """Also while nothing is counted, as when a large model is loaded."""
    with shown.progress_bar("sequences") as bar:
        bar.phase("loading")
        bar._ended.pass_pause()  # type: ignore[attr-defined]
        bar.phase("generating", "sequences")
        bar(2, 8, tokens=1234, part=0.3)
        bar._ended.pass_pause()  # type: ignore[attr-defined]
    assert bar._thread is None, "none comes afterwards"
    assert lines.getvalue().splitlines() == [
        "loading: 0:00 so far",
        "loading: done in 0:00",
        "generating: 2 of 8 sequences, 1,234 tokens, 0:00 so far",
        "generating: done in 0:00",
    ]


def test_a_phase_that_was_told_of_ends_with_a_line(lines: io.StringIO) -> None:
    with shown.progress_bar("sequences") as bar:
        bar.phase("reading", "sequences")
        bar._ended.pass_pause()  # type: ignore[attr-defined]
        bar(8, 8, tokens=1234)
        bar.phase("quick")
    told = lines.getvalue().splitlines()
    assert told[-1] == "reading: 8 sequences, 1,234 tokens, done in 0:00"


def test_a_phase_that_fails_has_no_such_line(lines: io.StringIO) -> None:
    def fail() -> None:
        with shown.progress_bar("sequences") as bar:
            bar.phase("failing")
            bar._ended.pass_pause()  # type: ignore[attr-defined]
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        fail()
    assert "failing: 0:00" in lines.getvalue()
    assert "failing: done" not in lines.getvalue()


def test_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(shown, "time", SimpleNamespace(monotonic=lambda: now))
    bar = shown.Shown("texts")
    bar.phase("generating", "sequences")
    now += 60
    bar(5, 9, tokens=6000, part=0.25)
    assert bar.line() == "generating: 5 of 9 sequences, 6,000 tokens (100/s), 1:00 so far, about 3:00 left"
    bar(0, 9, tokens=6000, part=0.25, least=True)
    assert bar.line().endswith("at most 3:00 left")
    bar.phase("scoring", "texts")
    bar(500, 1000)  # from an earlier run: they took no time now
    now += 50
    bar(600, 1000)
    assert bar.line() == "scoring: 600 of 1,000 texts, 2.0/s, 0:50 so far, about 3:20 left"
    bar(501, 1000)
    assert bar.line().startswith("scoring: 501 of 1,000 texts, 1.2 per minute, 0:50 so far")
    bar(1000, 1000, tokens=25)
    assert "25 tokens (30 per minute)" in bar.line()


def test_a_bar_names_its_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=160)
    monkeypatch.setattr(shown, "console", console)
    with shown.progress_bar("sequences") as bar:
        bar.phase("calibrating", "tokens")
        bar(3, 9)
        bar.phase("generating", "sequences")
        bar(1, 4, tokens=50, part=0.2)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())  # type: ignore[attr-defined]
    assert "calibrating" in text and "generating" in text and "1 of 4 sequences, 50 tokens" in text


@pytest.mark.parametrize(("seconds", "text"), [(6.6, "0:07"), (750, "12:30"), (11_100, "3:05:00")])
def test_clock(seconds: float, text: str) -> None:
    assert shown.clock(seconds) == text


def test_a_plain_function_hears_of_what_it_counts() -> None:
    calls: list[tuple[int, int]] = []
    phases = Phases(lambda done, total: calls.append((done, total)))
    phases.phase("calibrating", "tokens")
    phases(100, 200)
    phases.phase("generating", "sequences")
    phases(0, 3, tokens=5, part=0.1)
    phases(0, 3, tokens=9, part=0.2)
    phases(3, 3)
    assert calls == [(0, 3), (3, 3)]
    told = Progress()
    assert heard(told) is told and Phases.of(phases) is phases


def test_phases_add_up_to_what_was_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: now))
    phases = Phases(Progress())
    for name, seconds in (("a", 3.0), ("b", 1.25), ("a", 0.5)):
        phases.phase(name)
        now += seconds
    assert phases.seconds() == {"a": 3.5, "b": 1.25}
