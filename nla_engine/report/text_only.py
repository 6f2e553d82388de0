"""What explanations add to the text, on the page: the figure at its head, and an area with every control."""

from __future__ import annotations

import math
from html import escape
from pathlib import Path

from nla_engine.errors import RequestError
from nla_engine.referee.added import MEAN, Added
from nla_engine.referee.intervals import Estimate
from nla_engine.report.data import Explained
from nla_engine.report.facts import Figure
from nla_engine.roundtrip.results import read_metadata
from nla_engine.store import CaptureStore

#: Id and title of the area.
AREA = ("text-only", "Text alone")


def read_added(store: CaptureStore, explained: Explained, path: Path) -> Added:
    """From the table of controls. RequestError if it is another table, or of another store, layer or AR."""
    added, made = Added.read(path), read_metadata(path)
    if made["options"].get("store") != store.attributes["store_id"]:
        raise RequestError(
            f"{path}: has controls of another store than {store.path}: give the two of one run"
        )
    if made["layer"] != explained.metadata["layer"]:
        raise RequestError(
            f"{path}: has controls of layer {made['layer']}, the explanations are of layer "
            f"{explained.metadata['layer']}: give the two of one run"
        )
    return added


def headline(added: Added) -> Figure:
    """The first figure of the page: what the words say that the text does not."""
    over, best = added.over_text, added.best
    if best is None:
        return Figure("added", "-", "no control was measured on half of the rows")
    against = 0.0 if best == MEAN else added.controls[best].fve_nrm
    control = "the mean vector, since no control text does better" if best == MEAN else best
    interval = f", 95% interval {over.low:.2f} to {over.high:.2f}" if over.bounded else ", no interval"
    return Figure(
        "added",
        f"{over.value:.2f}",
        f"of FVE over the best control that does not know the vector{interval}",
        f"{added.explained.fve_nrm:.2f} for the explanations, {against:.2f} for {control}",
    )


def area(added: Added) -> str:
    """Every control with its scores, and what they show and do not, as markup."""
    head = ("text", "rows", "FVE", "cos", "nearest to its own vector", "explanations over it")
    lines = [("explanations", added.explained), *added.controls.items()]
    rows = [
        (
            name,
            f"{found.rows:,}",
            _number(found.fve_nrm),
            _number(found.cos),
            _number(found.retrieval_top1),
            "" if found.over is None else _estimate(found.over),
        )
        for name, found in lines
    ]
    table = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    said = "".join(f"<p>{escape(text)}</p>" for text in added.says())
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    return f"{said}<table><thead><tr>{titles}</tr></thead><tbody>{table}</tbody></table>"


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "-"


def _estimate(found: Estimate) -> str:
    return _number(found.value) + (f" [{found.low:.3f}, {found.high:.3f}]" if found.bounded else "")
