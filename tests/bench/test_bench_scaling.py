"""The suite of costs that must not grow: it runs, and what it counts stays flat."""

from __future__ import annotations

import json
import os

import pytest

from nla_engine.bench.__main__ import main
from nla_engine.bench.suites import scaling


def test_costs_at_three_sizes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("obstore", reason="requests are counted with the extra s3")
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr(scaling, "_ROWS", (100, 200, 400))
    monkeypatch.setattr(scaling, "_SEQUENCES", (100, 200, 400))
    assert main(["scaling", "--device", "cpu", "--repeats", "1"]) == 0
    lines = json.loads(capsys.readouterr().out.splitlines()[-1])["lines"]
    figures = {unit: [line["p50"] for line in lines if line["unit"] == unit] for unit in ("GiB", "requests")}
    assert len(lines) == 24
    assert all(line["p50"] > 0 for line in lines)
    assert max(figures["GiB"]) <= 1  # a quarter of the host memory
    assert figures["requests"] == [1, 1, 1]
    graphs = [line["p50"] for line in lines if line["unit"] == "graphs"]
    assert graphs == [21, 29, 37]  # eight more where the lanes are four times as many
