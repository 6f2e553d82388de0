"""What commands print: announcements and progress on stderr; results on stdout, as a table or one JSON line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

#: Announcements and progress.
console = Console(stderr=True)
#: Width of a result that does not go to a terminal, in columns.
_FILE_WIDTH = 200

#: Progress bars inside one another: only the last one is shown.
_bars: list[Progress] = []

Json = Annotated[
    bool,
    typer.Option("--json", help="Print the summary as one line of JSON on stdout, and nothing else there."),
]


def say(text: str) -> None:
    """One line for people; markup in it stays text."""
    console.print(escape(text), highlight=False, soft_wrap=True)


@contextmanager
def progress_bar(unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar with count, rate and time left; yields progress(done, total)."""
    bar = Progress(
        TextColumn(unit),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with _alone(bar):
        task = bar.add_task(unit, total=None, rate="")

        def update(done: int, total: int) -> None:
            speed = bar.tasks[0].finished_speed or bar.tasks[0].speed
            bar.update(task, completed=done, total=total, rate=f"{speed:,.1f}/s" if speed else "")

        yield update


@contextmanager
def _alone(bar: Progress) -> Iterator[None]:
    """Show this bar; hide the one that was shown before until this one is done."""
    if _bars:
        _bars[-1].stop()
    _bars.append(bar)
    try:
        with bar:
            yield
    finally:
        _bars.pop()
        if _bars:
            _bars[-1].start()


def results(as_json: bool) -> Console:
    """Where a result for people goes: stdout, or stderr when stdout carries a JSON line."""
    out = Console(stderr=as_json)
    if not out.is_terminal:
        out.width = _FILE_WIDTH
    return out


def finish(title: str, facts: dict[str, Any], as_json: bool) -> None:
    """The summary: a table for people, and one JSON line on stdout if asked."""
    show_facts(title, facts, as_json)
    if as_json:
        print_json(facts)


def show_facts(title: str, facts: dict[str, Any], as_json: bool) -> None:
    """A table for people. as_json: a JSON line will follow."""
    table = Table(show_header=False, box=None)
    for key, value in facts.items():
        table.add_row(key, escape(show(value)))
    shown = results(as_json)
    shown.print(escape(title), style="bold", highlight=False, soft_wrap=True)
    shown.print(table)


def show(value: Any) -> str:
    """A value for people: thousands separated, fractions to four digits."""
    if isinstance(value, float) and math.isnan(value):
        return "-"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {show(entry)}" for key, entry in value.items())
    if isinstance(value, list):
        return ", ".join(map(show, value))
    return str(value)


def print_json(facts: dict[str, Any]) -> None:
    """One line of strict JSON on stdout: NaN and infinity become null."""
    print(json.dumps(_strict(facts), allow_nan=False, default=str))


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(entry) for entry in value]
    if isinstance(value, np.generic):
        return _strict(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value
