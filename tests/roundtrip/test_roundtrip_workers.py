"""Stage 2 in several processes writes the table of one, whatever dies on the way."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from store_samples import random_store
from transformers import AutoConfig
from worker_faults import Killer

from nla_engine.config import ExplainOptions, RoundtripOptions, ScoreOptions
from nla_engine.demo.run import LAYER, TRIO
from nla_engine.errors import EngineError, RequestError
from nla_engine.progress import Phases, Progress
from nla_engine.roundtrip import parallel
from nla_engine.roundtrip.job import prepare_run
from nla_engine.roundtrip.pipeline import Item
from nla_engine.roundtrip.results import ResultTable, but_last, committed
from nla_engine.roundtrip.run import run_explain, run_roundtrip, run_score

AV, AR = (str(TRIO / name) for name in ("av", "ar"))
ROWS = 77


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random rows, of which some have no direction: at the start, alone, and more than an item in a row."""
    width = int(AutoConfig.from_pretrained(TRIO / "base").hidden_size)
    vectors = np.random.default_rng().standard_normal((ROWS, width)).astype(np.float32)
    vectors[[0, 5, *range(30, 52)]] = 0.0
    vectors[60, 3] = np.inf
    sizes = [20, 13, 30, 14]
    return random_store(tmp_path_factory.mktemp("shared") / "made.zarr", vectors, LAYER, sizes)


def roundtrip(store: Path, out: Path, **changes: Any) -> RoundtripOptions:
    given = {"store": str(store), "av": AV, "ar": AR, "out": out, "max_new_tokens": 12, "device": "cpu"}
    return RoundtripOptions(**{**given, **changes})


def check_same(one: Path, other: Path) -> None:
    """Sums in another order differ in the last place; nothing else may."""
    first, second = pq.read_table(one), pq.read_table(other)
    assert first.column_names == second.column_names and len(first) == len(second)
    for name in first.column_names:
        a, b = first[name].to_pylist(), second[name].to_pylist()
        if first[name].type in ("double", "float"):
            a, b = np.array(a, np.float64), np.array(b, np.float64)
            assert np.allclose(a, b, atol=2e-6, equal_nan=True), name
        else:
            assert a == b, name


@pytest.mark.slow
def test_the_table_of_workers_that_split_their_models(store: Path, tmp_path: Path) -> None:
    """Two workers of two ranks each."""
    run_roundtrip(roundtrip(store, tmp_path / "one.parquet"))
    shared = run_roundtrip(
        roundtrip(store, tmp_path / "two.parquet", workers=2, tensor_parallel=2, batch_size=7)
    )
    check_same(tmp_path / "one.parquet", tmp_path / "two.parquet")
    assert shared.to_dict()["workers"] == 2


@pytest.mark.usefixtures("forked_workers")
def test_the_table_is_that_of_one_process(store: Path, tmp_path: Path) -> None:
    samples = 2
    how = {"samples": samples, "temperature": 1.0}
    seen: list[tuple[int, int]] = []
    alone = run_roundtrip(roundtrip(store, tmp_path / "one.parquet", **how))
    shared = run_roundtrip(
        roundtrip(store, tmp_path / "two.parquet", workers=2, batch_size=7, **how),
        progress=lambda done, total: seen.append((done, total)),
    )
    check_same(tmp_path / "one.parquet", tmp_path / "two.parquet")
    assert seen[-1] == (ROWS * samples, ROWS * samples) and all(done <= total for done, total in seen)
    told = shared.to_dict()
    assert told["workers"] == 2 and "workers_lost" not in told and "workers" not in alone.to_dict()
    assert set(told["workers_waited"]) == {"start", "items", "results", "end"}
    phases = ["loading", "preparing", "starting", "explaining", "finishing"]
    assert list(shared.seconds_by_phase) == phases, "loading the models in the processes is not explaining"
    for key, value in alone.to_dict().items():
        if "second" not in key and key != "out":
            assert (
                told[key] == pytest.approx(value, abs=2e-6)
                if isinstance(value, float)
                else told[key] == value
            )


@pytest.mark.usefixtures("forked_workers")
def test_fewer_parts_than_workers(store: Path, tmp_path: Path) -> None:
    said: list[str] = []
    how: dict[str, Any] = {"av": AV, "max_new_tokens": 3, "limit": 20, "device": "cpu"}
    given = ExplainOptions(store=str(store), out=tmp_path / "few.parquet", workers=5, **how)
    told = run_explain(given, announce=said.append).to_dict()
    assert told["workers"] == 2 and told["rows"] == 20
    assert "2 parts of the rows: 2 of 5 workers have work" in said


def test_each_half_alone(store: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The first in processes that start as they do for users."""
    how: dict[str, Any] = {"store": str(store), "device": "cpu"}
    texts = {workers: tmp_path / f"{name}.parquet" for workers, name in ((1, "one"), (2, "two"))}
    for workers, out in texts.items():
        run_explain(ExplainOptions(av=AV, out=out, max_new_tokens=9, workers=workers, **how))
    request.getfixturevalue("forked_workers")
    for workers, given in texts.items():
        out = given.with_name(f"{given.stem}-scored.parquet")
        run_score(ScoreOptions(ar=AR, texts=given, out=out, workers=workers, prefixes=True, **how))
    for name in (".parquet", "-scored.parquet"):
        check_same(tmp_path / f"one{name}", tmp_path / f"two{name}")


@pytest.mark.usefixtures("forked_workers")
def test_a_killed_worker_costs_only_what_it_had(store: Path, tmp_path: Path, killer: Killer) -> None:
    """The rows make five parts, handed out one at a time: one of two workers is given a second one."""
    said: list[str] = []
    run_roundtrip(roundtrip(store, tmp_path / "one.parquet"))
    killer.left = 1
    shared = run_roundtrip(
        roundtrip(store, tmp_path / "two.parquet", workers=2, batch_size=3), announce=said.append
    )
    check_same(tmp_path / "one.parquet", tmp_path / "two.parquet")
    assert len(killer.killed) == shared.workers_lost == 1 and shared.parts_again > 0
    assert any("killed by SIGKILL" in line for line in said)


@pytest.mark.usefixtures("forked_workers")
def test_an_interrupted_run_is_resumed_by_one_process(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C comes between two commits."""
    monkeypatch.setattr(parallel, "CHUNK", 16)
    out, append = tmp_path / "two.parquet", ResultTable.append

    def interrupted(table: ResultTable, columns: dict[str, Any]) -> None:
        append(table, columns)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(ResultTable, "append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_roundtrip(roundtrip(store, out, workers=2, batch_size=3))
    left = committed(out)
    assert 0 < left < ROWS and not out.exists()
    run_roundtrip(roundtrip(store, out, resume=True))
    run_roundtrip(roundtrip(store, tmp_path / "one.parquet"))
    check_same(tmp_path / "one.parquet", out)


class Silent:
    def announce(self, text: str) -> None:
        pass

    def state(self, make: Callable[[], Any]) -> None:
        make()


def work_of(options: RoundtripOptions) -> parallel.StageTwoWork:
    run = prepare_run(options, lambda text: None, Phases(Progress()))
    models = parallel.fingerprints(run.pair.verbalizer, run.pair.reconstructor)
    return parallel.StageTwoWork(options, run.layer, None, run.chosen.sample, but_last(run.schema()), models)


def test_a_worker_goes_on_when_nothing_is_handed_out_for_a_while(store: Path, tmp_path: Path) -> None:
    """None while texts are missing is waited out, None with nothing to do is not given; every item has its lines."""
    work = work_of(roundtrip(store, tmp_path / "out.parquet", batch_size=4))
    worker = work.open("cpu", Silent())
    rows, open_ = np.arange(ROWS), [0]
    bounds = [0, 3, 30, 52, 53, 70, ROWS]  # the third item has no text

    def items() -> Iterator[Item | None]:
        for number in range(6):
            open_[0] += 1
            yield Item(number, rows[bounds[number] : bounds[number + 1]], bounds[number])
            while open_[0] > number % 3:
                yield None

    found = {}
    for number, lines in worker.run(items()):
        open_[0] -= 1
        found[number] = lines["row"].to_pylist()
    assert found == {n: list(range(bounds[n], bounds[n + 1])) for n in range(6)}


def test_models_that_changed_meanwhile_are_refused(store: Path, tmp_path: Path) -> None:
    work = replace(work_of(roundtrip(store, tmp_path / "out.parquet")), models=("another", "model"))
    with pytest.raises(EngineError, match="changed after the run began"):
        work.open("cpu", Silent())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": 2, "follow": True}, "--workers shares known rows out"),
        ({"workers": 2, "dry_run": True}, "--workers and --dry-run exclude each other"),
        ({"gpus": "2", "workers": 2, "device": None}, "exclude each other"),
        ({"gpus": "2"}, "--gpus and --device cpu exclude each other"),
        ({"gpus": "none"}, "all, a number from 1 on"),
        ({"workers": 0}, "--workers"),
    ],
)
def test_what_cannot_be_is_refused(store: Path, tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        run_roundtrip(roundtrip(store, tmp_path / "out.parquet", **changes))
    assert list(tmp_path.iterdir()) == []
