"""The page of a comparison: its tables and figures, and the explanations of each row next to each other.

What Python puts into the markup is escaped; the rest is data that the script inserts as text. Rows stand in the order
of their disagreement: how far the sides' scores lie apart, or, where nothing was scored, how few words they share.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from itertools import combinations, groupby
from pathlib import Path
from typing import Any

import numpy as np

from nla_engine.comparison.compared import Compared, Line, about
from nla_engine.errors import NLAError, RequestError
from nla_engine.report.data import token_pieces
from nla_engine.report.models import short_name
from nla_engine.report.page import assemble
from nla_engine.store import CaptureStore
from nla_engine.studies.figures import Figure
from nla_engine.studies.tables import Table

STYLES, SCRIPTS = ("page.css", "compare.css"), ("tools.js", "compare.js")
#: Measures by which rows are ordered and shown, the first of them that there is.
_BY_ROW = ("fve", "cos", "loss_recovered", "kl")
#: Characters of text before and behind the token.
_BEFORE, _BEHIND = 160, 60
#: Characters of an explanation that are shown.
_LONGEST = 6000


def context_of(compared: Compared, given: str | None) -> CaptureStore | None:
    """The store of the rows: the given one, or that which the tables name, if it is there and still the same.

    Raises StoreError, RequestError for a given one that cannot be read or is another.
    """
    first = compared.sides[0]
    if given is not None:
        store = CaptureStore.open(given)
        if store.attributes["store_id"] not in {side.store for side in compared.sides}:
            raise RequestError(f"--store {given}: is not the store of {first.name}")
        return store
    try:
        store = CaptureStore.open(str(first.metadata["run"]["store"]))
    except (NLAError, KeyError, OSError):
        return None
    return store if store.attributes["store_id"] == first.store else None


def disagreement(compared: Compared) -> tuple[Line | None, np.ndarray, np.ndarray]:
    """The measure of rows, and float64 [n] each: how far the sides lie apart in it, and in their words (0 to 1)."""
    line = next((found for key in _BY_ROW if (found := compared.line(key)) is not None), None)
    apart = np.zeros(compared.size)
    if line is not None:
        values = np.where(np.isfinite(line.row_values), line.row_values, np.nan)
        known = np.isfinite(values).all(0)
        apart[known] = values[:, known].max(0) - values[:, known].min(0)
    words = [[set(" ".join(texts).lower().split()) for texts in side] for side in compared.texts]
    pairs = list(combinations(range(len(words)), 2))
    differ = np.array(
        [
            np.mean([1 - _share(words[a][row], words[b][row]) for a, b in pairs])
            for row in range(compared.size)
        ]
    )
    return line, apart, differ


def _share(a: set[str], b: set[str]) -> float:
    return len(a & b) / len(a | b) if a | b else 1.0


def render_comparison(
    compared: Compared,
    title: str | None,
    tables: Sequence[Table],
    pictures: Sequence[Figure],
    directory: Path,
    most: int,
    store: CaptureStore | None,
) -> bytes:
    """The page in UTF-8. directory: where the figures lie; most: rows that it holds; store: for the text around."""
    title = title or ", ".join(compared.names[:-1]) + f" and {compared.names[-1]}, side by side"
    data = page_data(compared, most, store)
    shown = len(data["rows"]["token"])
    parts = {
        "title": html.escape(title),
        "lead": html.escape(_lead(compared)),
        "notes": "".join(f"<li>{html.escape(note)}</li>" for note in _notes(compared, shown, store)),
        "sides": _sides(compared),
        "tables": "".join(table.html() for table in tables),
        "figures": "".join(_picture(figure, directory) for figure in pictures),
    }
    return assemble("compare.html", STYLES, SCRIPTS, parts, data).encode("utf-8", "replace")


def page_data(compared: Compared, most: int, store: CaptureStore | None) -> dict[str, Any]:
    """The rows that differ most, ready for JSON."""
    line, apart, differ = disagreement(compared)
    order = np.lexsort((-differ, -apart))[:most]
    rows = compared.rows
    around = _around(store, rows, order) if store is not None else {}
    values = None if line is None else [[_number(v) for v in side[order]] for side in line.row_values]
    return {
        "names": compared.names,
        "measure": None if line is None else line.measure.label,
        "better": 1 if line is None else line.measure.better,
        "coloured": line is not None and line.measure.key == "fve",
        "rows": {
            "sequence": rows["sequence"][order].tolist(),
            "position": rows["position"][order].tolist(),
            "token": rows["token"][order].tolist(),
            "next": rows["next_token"][order].tolist(),
            "before": [around[at][0] for at in order.tolist()] if around else None,
            "behind": [around[at][1] for at in order.tolist()] if around else None,
            "apart": [_number(v) for v in apart[order]],
            "differ": [_number(v) for v in differ[order]],
        },
        "texts": [[[t[:_LONGEST] for t in side[at]] for at in order.tolist()] for side in compared.texts],
        "values": values,
    }


def _around(
    store: CaptureStore, rows: dict[str, np.ndarray] | Any, order: np.ndarray
) -> dict[int, tuple[str, str]]:
    """The text before and behind each of these rows, by their number."""
    out: dict[int, tuple[str, str]] = {}
    by_sequence = sorted(order.tolist(), key=lambda at: int(rows["sequence"][at]))
    for number, places in groupby(by_sequence, key=lambda at: int(rows["sequence"][at])):
        pieces = token_pieces(store.sequence(number))
        for at in places:
            position = int(rows["position"][at])
            before, behind = "".join(pieces[:position]), "".join(pieces[position + 1 :])
            out[at] = (before[-_BEFORE:], behind[:_BEHIND])
    return out


def _number(value: float) -> float | None:
    return float(f"{value:.5g}") if np.isfinite(value) else None


def _lead(compared: Compared) -> str:
    side = compared.sides[0]
    layers = ", ".join(dict.fromkeys(each.site.label for each in compared.sides))
    return (
        f"{len(compared.sides)} sides over the same {compared.size:,} rows of {layers}, from {compared.sequences:,} "
        f"sequences{' of store ' + side.store[:8] if len({s.store for s in compared.sides}) == 1 else ''}."
    )


def _notes(compared: Compared, shown: int, store: CaptureStore | None) -> list[str]:
    out = [
        f"{name}: {left:,} rows are left out, since another side lacks them."
        for name, left in zip(compared.names, compared.left_out, strict=True)
        if left
    ]
    out += compared.notes
    out += [f"{key} is not compared: {why}." for key, why in compared.absent.items()]
    if shown < compared.size:
        out.append(f"Of the texts, those of the {shown:,} rows that differ most are shown.")
    if store is None:
        out.append("The text around each token is not shown: the store was not found (--store names it).")
    return out


def _sides(compared: Compared) -> str:
    """What each side is, as a definition list."""
    items = []
    for side in compared.sides:
        facts = about(side)
        told = [f"AV {short_name(facts['av'])}"] if facts["av"] else []
        told += [f"AR {short_name(facts['ar'])}"] if facts["ar"] else []
        told += [f"{name} {facts[name]}" for name in ("dtype", "precision") if facts[name] is not None]
        if facts["temperature"]:
            told.append(
                f"temperature {facts['temperature']:g}, {facts['samples']} per row, seed {facts['seed']}"
            )
        items.append(f"<dt>{html.escape(side.name)}</dt><dd>{html.escape(', '.join(told))}</dd>")
    return "".join(items)


def _picture(figure: Figure, directory: Path) -> str:
    data = base64.b64encode((directory / f"{figure.name}.svg").read_bytes()).decode()
    caption = html.escape(figure.caption)
    return (
        f'<figure><img alt="{caption}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{caption} Bars are 95% intervals.</figcaption></figure>"
    )
