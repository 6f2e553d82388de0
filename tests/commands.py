"""Commands for tests: run `nla-engine` in this process or another, and look at what it left."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from nla_engine import cli

LAYER = 2


@dataclasses.dataclass(frozen=True)
class Ran:
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        return json.loads(self.out)  # all that stands on stdout


def call(*arguments: object) -> Ran:
    """`nla-engine arguments...` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["nla-engine", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as stopped,
    ):
        cli.main()
    return Ran(int(stopped.value.code or 0), out.getvalue(), err.getvalue())


def shell(*arguments: object, **changes: object) -> Ran:
    """`python -m nla_engine arguments...` in a process of its own."""
    command = [sys.executable, "-m", "nla_engine", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, **changes)  # type: ignore[call-overload]
    return Ran(done.returncode, done.stdout, done.stderr)


def contents(path: Path) -> dict[str, str]:
    """sha256 of every file under a path."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files if p.exists()}


def capture(root: Path, out: Path | str, **changes: object) -> list[object]:
    """A capture command into `out`. changes: options to replace; None leaves one out, True is a flag."""
    options = {"prompts": root / "prompts.jsonl", "layer": LAYER, "out": out, "max_new_tokens": 4}
    return ["capture", root / "base", *flags({**options, "device": "cpu", **changes})]


def roundtrip(root: Path, out: Path, store: Path | None = None, **changes: object) -> list[object]:
    """A round-trip command into `out`, of the store in `root` unless another is given."""
    options = {"av": root / "av", "ar": root / "ar", "out": out, "max_new_tokens": 8, "device": "cpu"}
    return ["roundtrip", store or root / "run.zarr", *flags({**options, **changes})]


def explain(root: Path, out: Path, **changes: object) -> list[object]:
    """An explain command into `out`, of the store that `root` holds."""
    options = {"av": root / "av", "out": out, "max_new_tokens": 8, "device": "cpu"}
    return ["explain", root / "run.zarr", *flags({**options, **changes})]


def score(root: Path, out: Path, texts: Path, store: Path | None = None, **changes: object) -> list[object]:
    """A score command into `out`, of the store that `root` holds if no other is given."""
    options = {"ar": root / "ar", "texts": texts, "out": out, "device": "cpu"}
    return ["score", store or root / "run.zarr", *flags({**options, **changes})]


def patch(root: Path, out: Path, explained: Path | None = None, **changes: object) -> list[object]:
    """A patch command into `out`, of the store and the round trip that `root` holds if no other is given."""
    given = {"model": root / "base", "explained": explained or root / "explained.parquet", "out": out}
    store = changes.pop("store", root / "run.zarr")
    return ["patch", store, *flags({**given, "device": "cpu", **changes})]


def flags(options: dict[str, object]) -> list[object]:
    out: list[object] = []
    for name, value in options.items():
        if value is not None:
            out += [f"--{name.replace('_', '-')}", *([] if value is True else [value])]
    return out


def check_refused(ran: Ran, message: str, code: int = 2) -> None:
    """Check the exit code, one line on stderr that matches the pattern `message`, and nothing on stdout."""
    lines = ran.err.splitlines()
    assert ran.code == code, ran.err
    assert len(lines) == 1 and lines[0].startswith("error: "), ran.err
    assert re.search(message, lines[0]), lines[0]
    assert "(--debug shows where)" not in lines[0], "an error that nobody foresaw"
    assert ran.out == ""


def written(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def json_lines(path: Path, records: list[object]) -> Path:
    """A file with a record per line."""
    return written(path, "".join(json.dumps(record) + "\n" for record in records))
