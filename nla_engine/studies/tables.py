"""Tables of a study: as CSV with every digit, as Markdown and HTML for people."""

from __future__ import annotations

import csv
import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

from nla_engine.referee.intervals import Estimate

Cell = str | int | float | Estimate | None


@dataclass(frozen=True)
class Table:
    """name: of its file. note: what a reader must know, in one or two sentences.

    An `Estimate` in a cell becomes "0.95 [0.93, 0.97]" for people, and the columns NAME, NAME_low, NAME_high in CSV.
    """

    name: str
    title: str
    note: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[Cell, ...]]

    def csv(self) -> str:
        """Comma-separated, one header line; unknown values are empty."""
        split = {
            i for i in range(len(self.columns)) if any(isinstance(row[i], Estimate) for row in self.rows)
        }
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        header: list[str] = []
        for index, column in enumerate(self.columns):
            name = column.replace(" ", "_")
            header += [name, f"{name}_low", f"{name}_high"] if index in split else [name]
        writer.writerow(header)
        for row in self.rows:
            cells: list[str] = []
            for index, cell in enumerate(row):
                if index in split:
                    parts = (
                        (cell.value, cell.low, cell.high)
                        if isinstance(cell, Estimate)
                        else (cell, None, None)
                    )
                    cells += [_exact(part) for part in parts]
                else:
                    cells.append(_exact(cell))
            writer.writerow(cells)
        return out.getvalue()

    def markdown(self) -> str:
        """A heading, the note and a table."""
        lines = [f"### {self.title}", "", self.note, ""]
        lines.append("| " + " | ".join(map(_escape_pipe, self.columns)) + " |")
        lines.append(
            "|" + "|".join("---:" if self._numeric(i) else "---" for i in range(len(self.columns))) + "|"
        )
        lines += ["| " + " | ".join(_escape_pipe(show(cell)) for cell in row) + " |" for row in self.rows]
        return "\n".join(lines) + "\n"

    def html(self) -> str:
        """A caption, the note and a table; every text is escaped."""
        number = [' class="num"' if self._numeric(i) else "" for i in range(len(self.columns))]
        head = "".join(
            f"<th{kind}>{html.escape(column)}</th>" for kind, column in zip(number, self.columns, strict=True)
        )
        body = "".join(
            "<tr>"
            + "".join(
                f"<td{kind}>{html.escape(show(cell))}</td>" for kind, cell in zip(number, row, strict=True)
            )
            + "</tr>"
            for row in self.rows
        )
        return (
            f"<h3>{html.escape(self.title)}</h3><p>{html.escape(self.note)}</p>"
            f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        )

    def _numeric(self, column: int) -> bool:
        cells = [row[column] for row in self.rows if row[column] is not None]
        return bool(cells) and not any(isinstance(cell, str) for cell in cells)


def show(cell: Cell) -> str:
    """A cell for people: three decimals, an interval in brackets, "–" for what is unknown."""
    if isinstance(cell, Estimate):
        if not cell.known:
            return "–"
        value, low, high = map(decimal, (cell.value, cell.low, cell.high))
        return value if low == high or not math.isfinite(cell.low) else f"{value} [{low}, {high}]"
    if cell is None or (isinstance(cell, float) and not math.isfinite(cell)):
        return "–"
    if isinstance(cell, float):
        return decimal(cell)
    return f"{cell:,}" if isinstance(cell, int) else cell


def decimal(value: float) -> str:
    """Two decimals, or three below 0.095; a true minus sign."""
    text = f"{value:.2f}" if abs(value) >= 0.095 or value == 0 else f"{value:.3f}"
    return ("0" if float(text) == 0 else text).replace("-", "−")


def _exact(cell: Cell) -> str:
    if cell is None or (isinstance(cell, float) and not math.isfinite(cell)):
        return ""
    return f"{cell:.6g}" if isinstance(cell, float) else str(cell)


def _escape_pipe(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
