"""The recipe of the real pair on a small model: every step of it, and its budget."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
from commands import LAYER

from nla_engine.config import TrainOptions
from nla_engine.demo import real_train
from nla_engine.errors import RequestError
from nla_engine.store import CaptureStore


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, made: Path, tmp_path: Path) -> list[str]:
    """Arguments of a recipe for the small model, with few texts."""
    texts = [{"id": f"text {n}", "text": f"word {n} and more words " * 8} for n in range(12)]
    monkeypatch.setattr(real_train, "documentation", lambda: texts)
    changes = {"LAYERS": (LAYER,), "LAYER": LAYER, "PROMPTS": 20, "REPLIES": 2, "DOCUMENTS": 10, "SMALL": 2.0}
    changes |= {
        "MIN_POSITION": 4,
        "ROWS_PER_TEXT": 4,
        "STEPS": {"ar": 2, "av": 2, "rl": 2},
        "MOST_TOKENS": 12,
    }
    for name, value in changes.items():
        monkeypatch.setattr(real_train, name, value)
    where = ["--out", str(tmp_path / "out"), "--base", str(made / "base"), "--layer", str(LAYER)]
    return [*where, "--device", "cpu"]


def test_the_recipe_makes_a_pair(small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert real_train.main([*small, "--sweep", "--budget", "10"]) == 0
    told = capsys.readouterr()
    report = json.loads(told.out.splitlines()[-1])
    assert report["steps"] == {"ar": 2, "av": 2, "rl": 2} and list(report["sweep"]) == [str(LAYER)]
    assert report["capture_seconds"] < report["total_seconds"]
    assert all((tmp_path / "out" / "pair" / role / "nla_meta.yaml").exists() for role in ("av", "ar"))
    store = CaptureStore.open(tmp_path / "out" / "rows.zarr")
    assert store.column("position").min() >= 4 and store.next_token == 3
    said = [line for line in told.err.splitlines() if line.startswith("[")]
    for phase in ("reading", "documentation", "rows and texts", "models", "ar", "av", "rl"):
        assert any(line.endswith(f"s] {phase}") for line in said), phase


def test_a_budget_that_capture_used_up_is_refused(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert real_train.main([*small, "--budget", "0.6"]) == 2
    assert "--budget 0.6" in capsys.readouterr().err
    assert not (tmp_path / "out" / "pair").exists()


def test_the_recipe_goes_on(small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the rows that are there, and then within the training: the budget is that of its beginning."""
    assert real_train.main([*small, "--no-train"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(CaptureStore, "complete", property(lambda store: False))
        patch.setattr(real_train, "write_corpus", Mock(side_effect=RequestError("again")))
        assert (
            real_train.main([*small, "--no-train", "--resume"]) == 2
        )  # rows that were cut off are read again
    monkeypatch.setattr(real_train, "write_corpus", None)  # neither of the two is called again
    monkeypatch.setattr(real_train, "capture_rows", None)
    trained = real_train.run_train

    class Cut(Exception):
        pass

    class Cutting(real_train.Told):
        def __call__(self, done: int, total: int, **_: object) -> None:
            raise Cut

    def cut(options: TrainOptions, say: object, told: object) -> object:
        return trained(replace(options, checkpoint_steps=1), say, Cutting())

    monkeypatch.setattr(real_train, "run_train", cut)
    with pytest.raises(Cut):
        real_train.main([*small, "--resume", "--budget", "9"])
    monkeypatch.setattr(real_train, "run_train", trained)
    assert real_train.main([*small, "--resume", "--budget", "7"]) == 0
    summary = json.loads((tmp_path / "out" / "pair" / "training.json").read_text())
    assert summary["steps"] == {"ar": 2, "av": 2, "rl": 2}
