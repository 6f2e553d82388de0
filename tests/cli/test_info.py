"""What a store says of itself on the page of `info`, and what a dry run says of a capture before it is made."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from commands import LAYER, call, capture, check_refused
from store_samples import create_store, fill_store

from nla_engine.codec.rows import Codec
from nla_engine.store import CaptureStore


def test_the_page_shows_the_whole_provenance(root: Path) -> None:
    ran = call("info", root / "run.zarr", "--json")
    page, about = " ".join(ran.err.split()), CaptureStore.open(root / "run.zarr")
    made = about.provenance
    for title in ("contents", "model", "run", "storage", "layers", "software"):
        assert f" {title} " in page
    for name in ("weights", "tokenizer", "chat_template", "dtype", "attention", "sampling", "started"):
        assert f"{name} {made[name]}" in page, name
    for name in ("temperature", "seed", "max_new_tokens", "positions"):
        assert f" {name} " in page
    assert f"ended {about.commit.time}" in page
    assert f"torch {made['versions']['torch']}" in page
    assert "hidden_states[K+1]" in page
    assert "rows per shard 4,096 of codes, 65,536 of the other row arrays" in page
    error = about.codec_error[LAYER]
    assert 0 < error["mean"] <= error["p99"] <= error["worst"] < 0.02
    assert f"{LAYER} {error['mean']:.4g} {error['p99']:.4g} {error['worst']:.4g}" in page
    assert ran.json["codec_error"][str(LAYER)] == error
    assert (ran.json["model"], ran.json["ended"]) == (made["model"], about.commit.time)


def test_markup_in_a_store_is_text_and_gaps_are_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    odd = {"model": "[bold]x[/bold]", "[red]": "[/red]", "options": "none", "versions": None}
    fill_store(tmp_path / "odd.zarr", Codec.named("int4", 32), [3], provenance=odd)
    ran = call("info", tmp_path / "odd.zarr")
    assert ran.code == 0
    assert "[bold]x[/bold]" in ran.out
    assert "[red]" in ran.out
    with create_store(tmp_path / "open.zarr", Codec.named("bf16", 32)):
        ran = call("info", tmp_path / "open.zarr", "--json")
    assert (ran.code, ran.json["complete"], ran.json["ended"]) == (0, False, None)
    assert "not complete" in ran.err


def test_a_dry_run_measures_and_writes_nothing(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nla_engine.capture.estimate.MOST_SECONDS", 1e6)
    ran = call(*capture(root, tmp_path / "x.zarr", max_new_tokens=4, dry_run=True), "--json")
    assert ran.code == 0, ran.err
    assert not list(tmp_path.iterdir())
    made = CaptureStore.open(root / "run.zarr")
    assert (ran.json["sequences"], ran.json["already_done"], ran.json["dry_run"]) == (5, 0, True)
    assert made.rows <= ran.json["rows"] == 20
    assert ran.json["bytes"] == 20 * made.codec.row_bytes
    assert ran.json["sample_sequences"] == 5
    assert ran.json["rows_expected"] == made.rows, "the sample was the whole"
    assert ran.json["bytes_expected"] == made.rows * ran.json["bytes"] // ran.json["rows"]
    assert ran.json["seconds_expected"] == pytest.approx(ran.json["sample_seconds"], abs=2e-3)
    assert ran.json["sample_seconds"] > 0
    check_refused(call(*capture(root, root / "run.zarr", dry_run=True)), "pass --resume")
    ran = call(*capture(root, root / "run.zarr", dry_run=True, resume=True), "--json")
    assert (ran.code, ran.json["sequences"], ran.json["already_done"], ran.json["rows"]) == (0, 0, 5, 0)
    assert ran.json["seconds_expected"] == 0
