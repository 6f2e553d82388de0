"""How an object shows itself in a notebook: a small table. Every text in it is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any


def facts_html(title: str, facts: Mapping[str, Any]) -> str:
    """A heading, and a line per fact: its name and value as text."""
    lines = "".join(
        f'<tr><th style="text-align:left">{escape(name)}</th>'
        f'<td style="text-align:left;white-space:pre-wrap">{escape(str(value))}</td></tr>'
        for name, value in facts.items()
    )
    return f"<div><b>{escape(title)}</b><table>{lines}</table></div>"


def table_html(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A heading, the names of the columns, and a line per row: its values as text."""
    head = "".join(f'<th style="text-align:left">{escape(name)}</th>' for name in columns)
    lines = "".join(
        "<tr>"
        + "".join(f'<td style="text-align:left;white-space:pre-wrap">{escape(str(v))}</td>' for v in row)
        + "</tr>"
        for row in rows
    )
    return f"<div><b>{escape(title)}</b><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>"


def shortened(text: str, characters: int) -> str:
    """The text, or its beginning and `…`."""
    return text if len(text) <= characters else text[:characters] + "…"


def plural(number: int, noun: str) -> str:
    """`1 row`, `2,000 rows`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
