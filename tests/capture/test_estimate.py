"""A dry run stops measuring after some seconds, and tells how long the whole would take."""

from __future__ import annotations

import json
from pathlib import Path

from tiny import language_model

from nla_engine.capture import estimate as dry
from nla_engine.capture.estimate import estimate_capture
from nla_engine.capture.run import run_capture
from nla_engine.config import CaptureOptions


def test_it_ends_in_time_and_scales_what_it_saw(tmp_path: Path, monkeypatch) -> None:
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
    assert found.sample_seconds < took / 2  # one more step, on a busy machine
    assert 0 < found.sample_tokens < 60 * 100
    assert took / 3 < found.seconds_expected < took * 3
    assert not (tmp_path / "y.zarr").exists()
