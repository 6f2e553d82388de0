"""The suites of several processes: the command runs in one and in two, and their rates stand beside each other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from nla_engine.bench.__main__ import main
from nla_engine.bench.shapes import random_model
from nla_engine.bench.suites import parallel_roundtrip, workers
from nla_engine.bench.suites.workers import SimulatedWork
from nla_engine.models.load import load_model
from nla_engine.models.sidecar import read_sidecar
from nla_engine.roundtrip.reconstruct import Reconstructor
from nla_engine.roundtrip.verbalize import Verbalizer


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["parallel", "parallel-roundtrip"])
def test_one_and_two_processes(suite: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([suite, "--device", "cpu", "--repeats", "1"]) == 0
    lines = json.loads(capsys.readouterr().out.splitlines()[-1])["lines"]
    assert [line["case"].rsplit(", ", 1)[1] for line in lines] == ["1 process", "2 processes"]
    assert all(line["p50"] > 0 for line in lines)
    assert "workers waited" in lines[1]["detail"] and "workers waited" not in lines[0]["detail"]


class Shared:
    """What the suite asks a session for."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.device, self.layer = directory, torch.device("cpu"), 2
        self.lm = random_model("tiny", self.device, torch.float32)


def test_saved_models_write_and_read_one_token_per_letter(tmp_path: Path) -> None:
    """Also once transformers has read the tokenizer again, which it does by the kind of the model."""
    _, av, ar = parallel_roundtrip._saved(Shared(tmp_path), 8)  # type: ignore[arg-type]
    how = {"device": torch.device("cpu"), "dtype": torch.float32}
    writer, reader = Verbalizer.load(str(av), **how), Reconstructor.load(str(ar), **how)
    assert len(reader.lm.blocks) == 3 and read_sidecar(av, "av").marker_id == writer.prompt.token_ids[111]
    assert len(writer.prompt.token_ids) == 125
    vectors = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    for text in writer.explain(enumerate(vectors), max_new_tokens=30):
        assert text.n_tokens == 30 and text.text.isalpha() and len(text.text) == 30
        (ids,) = reader.prompts([text.text])
        assert len(ids) == 30 + len("<text></text>-<read>")
        own = load_model(str(ar), **how).tokenizer
        assert own.decode(ids) == f"<text>{text.text}</text>-<read>"


def test_simulated_workers_return_every_item(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_PASS_SECONDS", "_STEP_SECONDS", "_LANE_SECONDS"):
        monkeypatch.setattr(workers, name, 1e-6)
    told: list[tuple[float, float]] = []
    parent = type("P", (), {"announce": print, "state": lambda self, make: told.append(make())})()
    worker = SimulatedWork(64, 1, tmp_path).open("cpu", parent)
    results = dict(worker.run(iter(range(1300))))
    assert sorted(results) == list(range(1300)) and told[0][0] < told[0][1]
    assert all(captured.rows.number == item for item, captured in results.items())
