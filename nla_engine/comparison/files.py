"""What a comparison leaves in its directory: the page, compare.json, tables as CSV, figures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from nla_engine.comparison.compared import Compared, Line, to_dict
from nla_engine.comparison.page import context_of, render_comparison
from nla_engine.errors import RequestError, WriteError
from nla_engine.provenance import describe_run
from nla_engine.referee.intervals import Estimate
from nla_engine.store.directory import check_directory
from nla_engine.store.lease import Lease
from nla_engine.store.shards import make_directory, write_file_atomically, writing
from nla_engine.studies.figures import Figure, Panel, Series, draw, own, shuffled
from nla_engine.studies.tables import Cell, Table

PAGE, RECORD, FIGURES = "compare.html", "compare.json", "figures"
VALUES, DIFFERENCES = "values", "differences"
#: Measures with a panel in the figures; more would be too small to read.
_DRAWN = ("fve", "retrieval_top1", "fve_over_text", "loss_recovered", "top1_same", "claims_true")
_INTERVALS = "In brackets: 95% intervals by a bootstrap over sequences; the same resamples for all sides."


def check_out(out: Path, overwrite: bool) -> None:
    """RequestError unless `out` can hold a comparison: new, empty, or one that is to be replaced."""
    check_directory(out)
    held = {path.name for path in out.iterdir() if not path.name.startswith(".")} if out.is_dir() else set()
    if held and RECORD not in held:
        raise RequestError(f"{out}: holds other files and no comparison; choose another --out")
    if held and not overwrite:
        raise RequestError(f"{out}: exists; pass --overwrite to replace it, or choose another --out")


def write_comparison(
    compared: Compared, out: Path, title: str | None, page_rows: int, store: str | None
) -> None:
    """Write everything. RequestError if a store that was named cannot be read; WriteError if writing fails."""
    context = context_of(compared, store)
    values, differences, pictures = values_table(compared), differences_table(compared), figures(compared)
    with writing(out):
        make_directory(out)
    with Lease.of_directory(out):
        try:
            shutil.rmtree(out / FIGURES, ignore_errors=True)
            (out / FIGURES).mkdir()
            for picture in pictures:
                draw(picture, out / FIGURES)
        except OSError as error:
            raise WriteError(f"{error.filename or out}: cannot be written ({error.strerror})") from error
        for table in (values, differences):
            write_file_atomically(out / f"{table.name}.csv", table.csv().encode())
        page = render_comparison(
            compared, title, [values, differences], pictures, out / FIGURES, page_rows, context
        )
        write_file_atomically(out / PAGE, page)
        record = {**describe_run(), **to_dict(compared)}
        write_file_atomically(out / RECORD, (json.dumps(record, indent=1) + "\n").encode())


def values_table(compared: Compared) -> Table:
    """A line for each measure and side, with its control beside it."""
    rows: list[tuple[Cell, ...]] = [
        (
            line.measure.label,
            name,
            value.rows,
            value,
            control,
            line.measure.says,
            line.measure.control or "none needed",
        )
        for line in compared.lines
        for name, value, control in zip(compared.names, line.values, line.controls, strict=True)
    ]
    note = f"On the {compared.size:,} rows of {compared.sequences:,} sequences that all have. {_INTERVALS}"
    columns = ("measure", "side", "rows", "value", "control", "meaning", "what the control is")
    return Table(VALUES, "Measures", note, columns, rows)


def differences_table(compared: Compared) -> Table:
    """Every pair of sides: the later minus the earlier one, on the same rows."""
    names = compared.names
    pairs = list(compared.lines[0].over) if compared.lines else []
    return Table(
        DIFFERENCES,
        "Differences",
        "The first minus the second, on the same rows. An interval without 0 is a difference that chance alone rarely "
        "makes; of many intervals, one in twenty misses. Equal rows give exactly 0.",
        ("measure", *(f"{names[b]} − {names[a]}" for a, b in pairs)),
        [(line.measure.label, *(line.over[pair] for pair in pairs)) for line in compared.lines],
    )


def figures(compared: Compared) -> list[Figure]:
    """Each side beside its control, and differences from the first side."""
    places = dict(zip(compared.names, compared.names, strict=True))
    drawn = [line for line in compared.lines if line.measure.key in _DRAWN]
    values = Figure(
        "values", "Each side, and its control.", places, [_panel(line, compared.names) for line in drawn]
    )
    rest = {name: name for name in compared.names[1:]}
    over = Figure(
        "differences",
        f"Each other side minus {compared.names[0]}, on the same rows.",
        rest,
        [
            Panel(
                line.measure.label,
                "difference",
                [own({name: line.over[0, at] for at, name in enumerate(rest, 1)}, "difference")],
                mark=0.0,
            )
            for line in drawn
        ],
    )
    return [figure for figure in (values, over) if figure.panels]


def _panel(line: Line, names: list[str]) -> Panel:
    controls: dict[str, Estimate] = {
        name: control for name, control in zip(names, line.controls, strict=True) if control is not None
    }
    series: list[Series] = [own(dict(zip(names, line.values, strict=True)), "explanation of the row")]
    if controls:
        series.append(shuffled(controls, "its control"))
    return Panel(line.measure.label, line.measure.label, series)
