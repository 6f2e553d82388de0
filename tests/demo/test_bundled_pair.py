"""The pair that was trained for SmolLM2: what ships, and what it does on the real model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nla_engine.demo import real_run


def test_the_pair_is_small_and_names_its_base() -> None:
    files = [each for each in real_run.PAIR.rglob("*") if each.is_file()]
    assert sum(each.stat().st_size for each in files) <= 16_000_000
    for role in ("av", "ar"):
        config = json.loads((real_run.PAIR / role / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.real
def test_it_puts_replies_of_the_real_model_into_words(
    smollm2: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    given = [
        "--base",
        smollm2,
        "--out",
        tmp_path,
        "--questions",
        3,
        "--rows",
        4,
        "--tokens",
        16,
        "--device",
        "cpu",
    ]
    assert real_run.main([str(each) for each in given]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    scored, believed = summary["round_trip"], summary["patch"]
    assert scored["rows"] == 12 and scored["status"] == {"ok": 12}
    assert scored["cos"] > 0.85 > 0.75 > scored["cos_shuffled"]
    assert believed["loss_recovered"] > 0.5 > 0 > believed["loss_recovered_shuffled"]
