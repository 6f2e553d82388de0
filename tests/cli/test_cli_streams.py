"""Output that cannot be written: a reader that has gone, a sign that the encoding lacks, a full disk; strict JSON."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from commands import call, check_refused, roundtrip, shell

from nla_engine.cli.output import print_json, show


def run(*arguments: object, stdout: int, stderr: int = subprocess.PIPE, **more: str) -> tuple[int, str]:
    """Exit code and stderr of a command in a process of its own."""
    command = [sys.executable, "-m", "nla_engine", *map(str, arguments)]
    done = subprocess.run(
        command, stdout=stdout, stderr=stderr, timeout=250, env={**os.environ, **more}, text=True
    )
    return done.returncode, done.stderr or ""


@pytest.fixture
def gone() -> Iterator[int]:
    """The writing end of a pipe whose reader has closed it."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@pytest.mark.parametrize(
    "command",
    [["--help"], ["--version"], ["verify", "run.zarr"], ["info", "run.zarr", "--json"], ["verify", "--help"]],
    ids=" ".join,
)
def test_a_reader_that_has_gone_ends_the_command_without_a_word(
    command: list[str], root: Path, gone: int
) -> None:
    arguments = [root / word if word == "run.zarr" else word for word in command]
    code, said = run(*arguments, stdout=gone)
    assert code == 141
    assert not re.search(r"^(error|Traceback|Exception)", said, re.MULTILINE)


def test_a_reader_of_stderr_that_has_gone(root: Path, gone: int, tmp_path: Path) -> None:
    """The line that says what is wrong cannot be written: that is not the exit code of a wrong request."""
    assert run("info", tmp_path / "none", stdout=subprocess.DEVNULL, stderr=gone)[0] == 141


def test_nobody_reads_and_nothing_is_open(root: Path) -> None:
    """`>&- 2>&-`"""
    command = [sys.executable, "-m", "nla_engine", "info", root / "run.zarr"]
    done = subprocess.run(["sh", "-c", '"$@" >&- 2>&-', "sh", *map(str, command)], timeout=250)
    assert done.returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_under_stdout_is_an_error() -> None:
    with open("/dev/full", "wb") as full:
        code, said = run("--version", stdout=full.fileno())
    assert code == 1
    assert said == "error: the output could not be written: No space left on device\n"


def test_signs_that_the_encoding_lacks_are_escaped(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "run.zarr", tmp_path / "größe.zarr")
    ran = shell("info", tmp_path / "größe.zarr", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert ran.code == 0 and r"gr\xf6\xdfe.zarr" in ran.out
    missing = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.zarr")
    check_refused(shell("info", missing), r"\\udcff.zarr")


def strictly(text: str) -> dict:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_json_is_strict(capsys: pytest.CaptureFixture[str]) -> None:
    facts = {
        "a": math.nan,
        "b": [1.5, math.inf, {"c": (-math.inf, 2)}],
        "d": np.float32(0.5),
        "e": np.int64(1 << 62),
        "f": np.float64(np.nan),
        "g": Path("x"),
    }
    print_json(facts)
    assert strictly(capsys.readouterr().out) == {
        "a": None,
        "b": [1.5, None, {"c": [None, 2]}],
        "d": 0.5,
        "e": 1 << 62,
        "f": None,
        "g": "x",
    }
    assert show(math.nan) == "-"


def test_a_store_of_nothing_to_explain_has_a_summary(root: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "zero.npy", np.zeros((3, 64), np.float32))
    imported = call("import", tmp_path / "zero.npy", "--layer", 2, "--out", tmp_path / "zero.zarr", "--json")
    assert imported.code == 0 and strictly(imported.out.splitlines()[-1])["rows"] == 3
    for more in ({}, {"resume": True}):
        ran = call(*roundtrip(root, tmp_path / "x.parquet", tmp_path / "zero.zarr", **more), "--json")
        assert ran.code == 0, ran.err
        summary = strictly(ran.out.splitlines()[-1])
        assert summary["cos"] is None and summary["status"] == {"zero_vector": 3}
    info = call("info", tmp_path / "zero.zarr", "--json")
    assert info.code == 0 and strictly(info.out.splitlines()[-1])["rows"] == 3
