"""What commands print: announcements on stderr; results on stdout, as a table or one JSON line."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

#: Announcements and progress (`cli.progress`).
console = Console(stderr=True)
#: Width of a result that does not go to a terminal, in columns.
_FILE_WIDTH = 200

Json = Annotated[
    bool,
    typer.Option("--json", help="Print the summary as one line of JSON on stdout, and nothing else there."),
]


def say(text: str) -> None:
    """One line for people; markup in it stays text."""
    console.print(escape(text), highlight=False, soft_wrap=True)


def results(as_json: bool) -> Console:
    """Where a result for people goes: stdout, or stderr when stdout carries a JSON line."""
    out = Console(stderr=as_json)
    if not out.is_terminal:
        out.width = _FILE_WIDTH
    return out


def finish(title: str, facts: dict[str, Any], as_json: bool, *, told: dict[str, Any] | None = None) -> None:
    """The summary: a table for people, and one JSON line on stdout if asked. told: what people are shown instead."""
    show_facts(title, facts if told is None else told, as_json)
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
