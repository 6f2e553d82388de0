"""The suite of several processes: the command runs in one and in two, and their rates stand beside each other."""

from __future__ import annotations

import json

import pytest

from nla_engine.bench.__main__ import main


@pytest.mark.slow
def test_one_and_two_processes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parallel", "--device", "cpu", "--repeats", "1"]) == 0
    lines = json.loads(capsys.readouterr().out.splitlines()[-1])["lines"]
    assert [line["case"].rsplit(", ", 1)[1] for line in lines] == ["1 process", "2 processes"]
    assert all(line["p50"] > 0 for line in lines)
