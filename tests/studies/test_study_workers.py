"""A study in several processes: the results of one, and where its runs go on machines with several GPUs."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from commands import call, check_refused

from nla_engine.studies import stages as stages_module
from nla_engine.studies.directory import CLAIMS, CLAUSES, EXPLAINED, PATCHED, REREAD, SAMPLES
from nla_engine.studies.models import Models
from nla_engine.studies.stages import Stages

SMALL = (
    "--problems", 4, "--samples", 2, "--sampled-problems", 2, "--ablated-problems", 2, "--device", "cpu",
)  # fmt: skip


def test_the_tables_are_those_of_one_process(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    alone = call("study", "multiplication", "--out", one, *SMALL, "--json")
    assert alone.code == 0, alone.err
    shutil.copytree(one, two)
    for name in (EXPLAINED, SAMPLES, REREAD, PATCHED, CLAUSES, CLAIMS):
        (two / name).unlink()
    shared = call("study", "multiplication", "--out", two, *SMALL, "--workers", 2, "--resume", "--json")
    assert shared.code == 0, shared.err
    for name in (EXPLAINED, SAMPLES, REREAD):
        mine, theirs = (pq.read_table(directory / name) for directory in (one, two))
        assert mine.column_names == theirs.column_names and len(mine) == len(theirs) > 0
        for column in mine.column_names:
            a, b = mine[column], theirs[column]
            if a.type in ("double", "float"):
                assert np.allclose(a.to_numpy(), b.to_numpy(), atol=1e-5, equal_nan=True), (name, column)
            else:
                assert a.to_pylist() == b.to_pylist(), (name, column)


@contextmanager
def uncounted(_counted: str) -> Iterator[Callable[[int, int], None]]:
    yield lambda done, total: None


@pytest.mark.parametrize(
    ("given", "device", "gpus", "workers", "loaded"),
    [
        ({"gpus": "all"}, None, "all", 1, False),
        ({"gpus": "1,0"}, None, "1,0", 1, False),
        ({"gpus": "1"}, "cuda:0", None, 1, True),
        ({"device": "cpu", "workers": 3}, "cpu", None, 3, False),
        ({"device": "cuda:1"}, "cuda:1", None, 1, True),
    ],
)
def test_where_its_runs_go(
    given: dict[str, Any],
    device: str | None,
    gpus: str | None,
    workers: int,
    loaded: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With several processes nothing is loaded here before the AR reads again."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("nla_engine.workers.devices.cores", lambda: 3)
    asked: list[Any] = []
    monkeypatch.setattr(stages_module, "run_capture", lambda options, **_: asked.append(options))
    monkeypatch.setattr(
        stages_module, "run_roundtrip", lambda options, verbalizer, **_: asked.append((options, verbalizer))
    )
    monkeypatch.setattr(stages_module, "run_reread", lambda *inputs, **_: asked.append(inputs[3]))
    monkeypatch.setattr(stages_module.CaptureStore, "open", lambda path: None)
    monkeypatch.setattr(stages_module, "read_metadata", lambda path: {"variance": 1.0})
    monkeypatch.setattr(stages_module, "pick_device", str)
    monkeypatch.setattr(stages_module, "pick_dtype", lambda dtype, device: None)
    for name in ("Verbalizer", "Reconstructor"):
        monkeypatch.setattr(getattr(stages_module, name), "load", lambda path, device, **_: (path, device))
    models = Models("base", "av", "ar", 1, bundled=False)
    stages = Stages(tmp_path, models, lambda text: None, uncounted, **given)
    stages.capture([], max_new_tokens=1, positions="all")
    av, ar = stages.load_pair()
    stages.explain(np.arange(2), av, ar, max_new_tokens=1)
    stages.reread([], ar or stages.load_ar(), variance=1.0)
    captured, (explained, verbalizer), reader = asked
    for options in (captured, explained):
        assert (options.device, options.gpus, options.workers) == (device, gpus, workers)
    first = device or f"cuda:{(gpus or '').replace('all', '0').split(',')[0]}"
    assert (verbalizer is not None) == loaded and reader == ("ar", first)


def test_processes_that_cannot_be_had_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "s"
    for more, message in (
        (("--gpus", "all", "--device", "cpu"), "--gpus and --device cpu exclude each other"),
        (("--workers", 2, "--gpus", "all"), "--gpus and --workers exclude each other"),
        (("--gpus", "0,x"), "--gpus is '?0,x"),
        (("--workers", 0), "--workers is 0"),
    ):
        check_refused(call("study", "multiplication", "--out", out, *more), message)
        assert not out.exists()
