"""Results: one line per case, as a table for people, as CSV to be kept, as JSON for programs."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from nla_engine.bench.timing import percentiles
from nla_engine.errors import RequestError, first_line
from nla_engine.provenance import now

COLUMNS = [
    "date",
    "commit",
    "gpu",
    "versions",
    "suite",
    "case",
    "unit",
    "p20",
    "p50",
    "p80",
    "limit",
    "limit_fraction",
    "baseline",
    "baseline_p50",
    "ratio",
]


@dataclass
class Line:
    """One case. values: one per repeat, in `unit`; limit: what the hardware allows, in the same unit.

    detail: the figure in another unit, or a remark; peak_gib: most GPU memory that torch held.
    """

    suite: str
    case: str
    unit: str
    values: list[float]
    limit: float | None = None
    detail: str = ""
    peak_gib: float | None = None
    baseline: str = ""
    baseline_p50: float | None = None

    @property
    def p50(self) -> float:
        return percentiles(self.values)[1]

    def compare(self, *baselines: Line | None) -> None:
        """Set the baseline of this line: the largest of those that were measured."""
        found = [line for line in baselines if line is not None]
        if found:
            best = max(found, key=lambda line: line.p50)
            self.baseline, self.baseline_p50 = best.case, best.p50

    def to_dict(self) -> dict[str, Any]:
        """The columns that differ from line to line, with numbers rounded to five digits."""
        p20, p50, p80 = percentiles(self.values)
        return {
            "suite": self.suite,
            "case": self.case,
            "unit": self.unit,
            "p20": _round(p20),
            "p50": _round(p50),
            "p80": _round(p80),
            "limit": _round(self.limit),
            "limit_fraction": _round(p50 / self.limit if self.limit else None),
            "baseline": self.baseline or None,
            "baseline_p50": _round(self.baseline_p50),
            "ratio": _round(p50 / self.baseline_p50 if self.baseline_p50 else None),
        }


@dataclass(frozen=True)
class Machine:
    """Where and with what a run was made."""

    date: str
    commit: str
    gpu: str
    versions: str

    @classmethod
    def here(cls, device: torch.device) -> Machine:
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
        return cls(now(), _commit(), gpu, _versions())


def to_json(machine: Machine, lines: Sequence[Line], **more: Any) -> dict[str, Any]:
    """The JSON object of a run."""
    entries = [
        line.to_dict()
        | {"repeats": len(line.values), "detail": line.detail, "peak_gib": _round(line.peak_gib)}
        for line in lines
    ]
    return {**vars(machine), **more, "lines": entries}


def append_csv(path: Path, machine: Machine, model: str, lines: Sequence[Line]) -> None:
    """Append lines to a CSV file, with a header if it is new. Each case begins with the name of its model."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        with contextlib.suppress(
            OSError
        ):  # several runs may add to one file: one at a time, where there are locks
            fcntl.flock(file, fcntl.LOCK_EX)
        writer = csv.DictWriter(file, COLUMNS)
        if os.fstat(file.fileno()).st_size == 0:
            writer.writeheader()
        writer.writerows(vars(machine) | line.to_dict() | {"case": f"{model}: {line.case}"} for line in lines)


def check_csv(path: Path) -> None:
    """RequestError if the file exists and was not written by `append_csv`."""
    if path.exists() and path.stat().st_size:
        try:
            read_csv(path)
        except (ValueError, csv.Error) as error:
            raise RequestError(f"--csv {first_line(error)}: choose another file") from error


def read_csv(path: Path) -> list[dict[str, Any]]:
    """The lines of a CSV file; numbers as float, or None if empty. ValueError for other columns."""
    numbers = ("p20", "p50", "p80", "limit", "limit_fraction", "baseline_p50", "ratio")
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if list(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path}: its columns are not {','.join(COLUMNS)}")
        return [
            {k: (float(v) if v else None) if k in numbers else v for k, v in row.items()} for row in reader
        ]


def table(machine: Machine, lines: Sequence[Line]) -> Table:
    """The table for people."""
    out = Table(title=f"{machine.gpu}; commit {machine.commit}; {machine.versions}", title_justify="left")
    for name in ("suite", "case"):
        out.add_column(name, overflow="fold")
    for name in ("p20", "p50", "p80", "unit", "of limit", "x baseline", "detail"):
        out.add_column(name, justify="left" if name in ("unit", "detail") else "right")
    for line in lines:
        p20, p50, p80 = percentiles(line.values)
        out.add_row(
            line.suite,
            line.case,
            *(format_number(value) for value in (p20, p50, p80)),
            line.unit,
            f"{p50 / line.limit:.1%}" if line.limit else "",
            f"{p50 / line.baseline_p50:.2f}" if line.baseline_p50 else "",
            line.detail,
        )
    return out


def format_number(value: float) -> str:
    """Four significant digits, or all digits before the point, with thousands separators."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _round(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def _commit() -> str:
    """NLA_COMMIT if set (for a copy without git), else the short hash, with -dirty if files differ from it."""
    if given := os.environ.get("NLA_COMMIT"):
        return given
    try:
        return _git("rev-parse", "--short", "HEAD") + ("-dirty" if _git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*words: str) -> str:
    root = Path(__file__).parent
    return subprocess.run(
        ["git", "-C", root, *words], check=True, capture_output=True, text=True
    ).stdout.strip()


def _versions() -> str:
    found = [f"python {platform.python_version()}"]
    for name in ("torch", "transformers", "triton"):
        try:
            found.append(f"{name} {torch.__version__ if name == 'torch' else version(name)}")
        except PackageNotFoundError:
            continue
    return " ".join(found)
