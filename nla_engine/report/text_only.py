"""What explanations add to the text, on the page: the figure at its head, and an area with every control."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from nla_engine.referee.added import MEAN, Added
from nla_engine.referee.table import PatchSummary
from nla_engine.report.facts import Figure

#: Id and title of the area.
AREA = ("text-only", "Text alone")


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


def area(added: Added, losses: PatchSummary | None = None) -> str:
    """Every control with its scores, and what they show and do not, as markup. losses: of the texts, if patched."""
    head = ["text", "rows", "FVE", "cos", "nearest to its own vector", "explanations over it"]
    rows = []
    for name, found in [("explanations", added.explained), *added.controls.items()]:
        numbers = map(_number, (found.fve_nrm, found.cos, found.retrieval_top1))
        over = "" if found.over is None else _bounded(found.over.numbers())
        rows.append([name, f"{found.rows:,}", *numbers, over])
    if losses is not None:
        head += ["loss recovered", "explanations over it"]
        of: dict[str, list[str]] = {
            name: [_number(each["loss_recovered"]), _bounded(each["over"])]
            for name, each in losses.controls.items()
        }
        of["explanations"] = [_bounded([losses.loss_recovered, *losses.loss_recovered_interval]), ""]
        rows = [[*row, *of.get(row[0], ["", ""])] for row in rows]
    table = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    said = "".join(f"<p>{escape(text)}</p>" for text in added.says())
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    return f"{said}<table><thead><tr>{titles}</tr></thead><tbody>{table}</tbody></table>"


def _number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.3f}"


def _bounded(numbers: Sequence[float | None]) -> str:
    """Of [value, low, high]."""
    value, low, high = map(_number, numbers)
    return value if "-" in (low, high) else f"{value} [{low}, {high}]"
