"""The suite that joins parts of a run: linked and copied, and what the disk has no room for is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from nla_engine.bench.__main__ import main


def run(capsys: pytest.CaptureFixture[str], directory: Path) -> dict:
    sizes = ["--join-rows", "3000", "--join-rows", "20000"]
    assert main(["join", "--device", "cpu", "--repeats", "1", *sizes, "--store", str(directory)]) == 0
    assert not list(directory.iterdir())
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_each_size_is_linked_and_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(capsys, tmp_path)
    assert [line["case"] for line in result["lines"]] == [
        f"{how} {rows} of 4 parts"
        for rows in ("3000 x 128", "20000 x 128", "3000 x 64")
        for how in ("link", "copy")
    ]
    assert all(line["p50"] > 0 and line["unit"] == "us/row" for line in result["lines"])
    assert [bool(line["ratio"]) for line in result["lines"]] == [True, False] * 3
    assert not result["failed"] and not result["skipped"]


def test_what_the_disk_has_no_room_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """20,000 rows take 3.2 MB: no room; 3,000 take 0.48: parts have room, their copy has none."""
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1e6))
    result = run(capsys, tmp_path)
    assert [line["case"] for line in result["lines"]] == [
        "link 3000 x 128 of 4 parts",
        "link 3000 x 64 of 4 parts",
        "copy 3000 x 64 of 4 parts",
    ]
    assert result["skipped"] == [
        "join: copy 3000 x 128 of 4 parts: the disk has no room",
        "join: 20000 x 128 of 4 parts: the disk has no room",
    ]
