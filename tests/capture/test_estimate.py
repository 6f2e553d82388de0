"""A dry run stops measuring after some seconds, and tells how long the whole would take."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import language_model

from nla_engine import progress
from nla_engine.capture import estimate as dry
from nla_engine.capture import run
from nla_engine.capture.estimate import estimate_capture
from nla_engine.capture.run import run_capture
from nla_engine.config import CaptureOptions
from nla_engine.engine.generator import Generator


def test_it_ends_in_time_and_scales_what_it_saw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on when a pass is made: each takes a second."""
    now, take = 0.0, Generator._take

    def second(*given: Any) -> None:
        nonlocal now
        now += 1.0
        take(*given)

    monkeypatch.setattr(Generator, "_take", second)
    for module in (run, progress):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now, perf_counter=lambda: now))
    lm, prompts = language_model("Qwen2Config"), tmp_path / "prompts.jsonl"
    records = [{"prompt": f"{number} and what comes next " * (1 + number % 3)} for number in range(60)]
    prompts.write_text("".join(json.dumps(record) + "\n" for record in records))
    options = CaptureOptions(
        model="m", prompts=prompts, layer=(0,), out=str(tmp_path / "x.zarr"), max_new_tokens=30,
        batch_size=4, chat=False,
    )  # fmt: skip
    took = run_capture(options, lm=lm).seconds_by_phase["generating"]
    monkeypatch.setattr(dry, "MOST_SECONDS", took / 6)
    found = estimate_capture(
        CaptureOptions(**{**vars(options), "out": str(tmp_path / "y.zarr"), "dry_run": True}), lm=lm
    )
    assert took / 6 < found.sample_seconds <= took / 6 + 2
    assert 0 < found.sample_tokens < 60 * 100
    assert took / 3 < found.seconds_expected < took * 3
    assert not (tmp_path / "y.zarr").exists()
