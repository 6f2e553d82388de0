"""No row is lost or doubled, whatever happens to the workers: units that are tried again, and who gets them. No Ray.

NLA_KILL_ROUNDS: how often, each time with other faults.
"""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fork_server import Forked, Server
from tiny import save_model, write_records

from nla_engine.capture.run import run_capture
from nla_engine.cluster import ray_run
from nla_engine.cluster.worker import Loaded, Worker
from nla_engine.config import CaptureOptions
from nla_engine.errors import EngineError, HeldError, RequestError, WriteError
from nla_engine.progress import Phases, Progress
from nla_engine.shard import Shard
from nla_engine.store import CaptureStore, StoreWriter
from nla_engine.store.care.verify import verify
from nla_engine.store.exchange.merge import merge

ROUNDS = range(int(os.environ.get("NLA_KILL_ROUNDS", "1")))


# ---- a unit is done again ----


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("units") / "base")


def do_a_unit(directory: str, model: str, unit: str, moment: int, seed: int) -> None:
    """As a worker does. moment: the change to the store, counted from 1, at which the process kills itself; 0: none."""
    rng, left = np.random.default_rng(seed), [moment]

    def ending(name: str) -> None:
        real = getattr(StoreWriter, name)

        def method(writer: StoreWriter, *given: Any, **more: Any) -> None:
            left[0] -= 1
            if not left[0] and seed % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            real(writer, *given, **more)
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

        setattr(StoreWriter, name, method)

    for name in ("_append", "_write_commit"):
        ending(name)
    StoreWriter._passed = lambda writer, part: bool(rng.integers(2))  # commits at any time
    worker = Worker()
    worker.load(options_in(Path(directory), Path(model)), datetime(2026, 1, 2))
    print(*worker.do(unit))


def options_in(directory: Path, model: Path) -> CaptureOptions:
    return CaptureOptions(
        model=str(model), prompts=directory / "p.jsonl", out=str(directory / "run.zarr"), layer=(1,), device="cpu",
        max_new_tokens=8, batch_size=2, codec="bf16", dtype="float32",
    )  # fmt: skip


@pytest.mark.parametrize("number", ROUNDS)
def test_a_unit_that_is_tried_again_is_the_same(
    number: int, base: Path, tmp_path: Path, rng: np.random.Generator, fork_server: Server
) -> None:
    """Workers are killed at random changes to the store, and others go on. Finished units are done once more."""
    sizes = rng.integers(1, 30, 17)
    write_records(tmp_path, [{"prompt": "a" * int(size), "n": n} for n, size in enumerate(sizes)])
    options = options_in(tmp_path, base)
    run_capture(replace(options, out=str(tmp_path / "one.zarr")))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    def worker(unit: str, moment: int) -> tuple[int, str]:
        given = (str(tmp_path), str(base), unit, moment, int(rng.integers(2**31)))
        code = f"import {Path(__file__).stem} as t; t.do_a_unit(*{given!r})"
        with (tmp_path / "said").open("w+") as said:
            process = Forked(
                fork_server, [sys.executable, "-c", code], env=environment, stdout=said, stderr=said
            )
            ended = process.wait(250)
            return ended, (tmp_path / "said").read_text()

    units, killed = [str(Shard(n + 1, 2)) for n in range(2)], 0
    for unit in rng.permutation(units).tolist():
        for moment in (*rng.integers(1, 7, 2).tolist(), 0):
            ended, said = worker(unit, moment)
            assert ended in ((-signal.SIGKILL, 0) if moment else (0,)), said
            killed += ended != 0
        count = len(Shard.parse(unit).takes(np.arange(17)).nonzero()[0])
        ended, said = worker(unit, 1)
        assert (ended, said.split()[-2:]) == (0, [str(count), "0"]), "a finished unit is left as it is"
    assert killed
    merge([Shard.parse(unit).name(options.out) for unit in units], tmp_path / "joined.zarr")
    assert all(check.ok for check in verify(tmp_path / "joined.zarr"))
    check_equal(CaptureStore.open(tmp_path / "one.zarr"), CaptureStore.open(tmp_path / "joined.zarr"))


def check_equal(one: CaptureStore, other: CaptureStore) -> None:
    """Every sequence once, with its tokens, its record and its rows."""
    assert sorted(other.numbers.tolist()) == sorted(one.numbers.tolist()) and other.complete
    first = {s.number: s for s in one.iter_sequences()}
    for found in other.iter_sequences():
        wanted = first.pop(found.number)
        assert (found.tokens.tolist(), found.record) == (wanted.tokens.tolist(), wanted.record)
        np.testing.assert_allclose(other.layer(1)[found.rows], one.layer(1)[wanted.rows], 2**-7, 1e-3)
    assert not first


# ---- who gets which unit ----


class Lost(Exception):
    """What Ray raises of a worker that it has lost."""


class Actor:
    """A worker: what it is asked is found in `Cluster.get`."""

    def __init__(self) -> None:
        for name in ("versions", "load", "do"):
            setattr(self, name, SimpleNamespace(remote=partial(self._asked, name)))

    def _asked(self, name: str, *given: Any) -> tuple[Any, ...]:
        return (self, name, given, object())


class Cluster:
    """Stands in for Ray. Workers are lost before they finish a unit, or after; cut off, they go on unseen for a while.

    units: sequences by unit; rng: what happens; worst: faults of one unit
    """

    def __init__(self, units: dict[str, int], rng: np.random.Generator, worst: int = 2) -> None:
        self.units, self.rng, self.worst = units, rng, worst
        self.written, self.faults, self.held = Counter[str](), Counter[str](), Counter[str]()
        self.happened = Counter[str]()

    def wait(self, waiting: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        ready = [each for each in waiting if self.rng.random() < 0.5]
        return ready, [each for each in waiting if each not in ready]

    def kill(self, worker: Actor) -> None:
        self.happened["kill"] += 1

    def get(self, reference: tuple[Any, ...]) -> Any:
        _, name, given, _ = reference
        if name == "versions":
            return ray_run.versions()
        if name == "load":
            if self.rng.random() < 0.1 and self.happened["lost while loading"] < 2:
                self.happened["lost while loading"] += 1
                raise Lost("node died")
            return Loaded(sum(self.units.values()), ["loaded"], 0)
        return self._do(given[0])

    def _do(self, unit: str) -> tuple[int, int]:
        if self.held[unit]:
            self.held[unit] -= 1
            self.happened["held"] += 1
            raise HeldError("another process is writing here")
        kind = (
            "done"
            if self.faults[unit] >= self.worst
            else str(self.rng.choice(["done", "lost", "after", "cut", "failed"]))
        )
        self.happened[kind] += 1
        new = 0 if self.written[unit] else 1
        if kind in ("done", "after", "cut"):
            self.written[unit] |= 1
        if kind != "done":
            self.faults[unit] += 1
            self.held[unit] = 3 if kind == "cut" else 0
            raise WriteError("disk full") if kind == "failed" else Lost("worker died\nmore")
        return self.units[unit], new


def work(cluster: Cluster, workers: int, said: list[str]) -> ray_run._Run:
    run = ray_run._Run(cluster, Actor, (None, None), said.append, Phases(Progress()))  # type: ignore[arg-type]
    run.work(list(cluster.units), workers)
    return run


@pytest.mark.parametrize("number", range(40))
def test_every_unit_counts_once(
    number: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_run, "HELD_SECONDS", 0.0)
    sizes = {str(Shard(n + 1, 9)): int(size) for n, size in enumerate(rng.integers(0, 50, 9))}
    cluster, said = Cluster(sizes, rng), []
    run = work(cluster, int(rng.integers(1, 6)), said)
    assert run.sequences == sum(sizes.values())
    assert cluster.written == Counter(dict.fromkeys(sizes, 1))
    lost = sum(cluster.happened[kind] for kind in ("lost", "after", "cut"))
    assert cluster.happened["kill"] == lost, "a worker that seems lost is ended, and another one started"
    assert sum("is tried again: " in line for line in said) == sum(cluster.faults.values())
    waited = {line.split()[1] for line in said if " waits: another process is writing here" in line}
    assert len(waited) == sum(" waits: " in line for line in said) and bool(waited) == bool(
        cluster.happened["held"]
    )
    assert not any("more" in line for line in said) and said.count("loaded") == 1


def test_a_unit_that_fails_three_times_stops_the_run(rng: np.random.Generator) -> None:
    cluster = Cluster({"1/1": 5}, rng, worst=9)
    for kind, error in {"failed": WriteError, "lost": EngineError}.items():
        cluster.faults.clear()
        cluster.rng = SimpleNamespace(random=lambda: 0.4, choice=lambda kinds, kind=kind: kind)
        with pytest.raises(
            error, match="disk full" if kind == "failed" else "unit 1/1 failed 3 times: worker died"
        ):
            work(cluster, 2, [])


def test_no_place_for_a_worker(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    """It ends, but not while a worker that has its place loads the model, however long that takes."""
    now, place = 100.0, ray_run.PLACE_SECONDS
    monkeypatch.setattr(ray_run, "time", SimpleNamespace(monotonic=lambda: now))
    cluster = Cluster({"1/1": 5}, rng, worst=0)

    def wait(waiting: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        nonlocal now
        now += place / 5
        loading = [each for each in waiting if each[1] == "load"]
        return ([] if loading and now < 100 + 6 * place else waiting), []

    cluster.wait = wait  # type: ignore[method-assign]
    assert work(cluster, 1, []).sequences == 5 and now > 100 + 6 * place

    def nothing(waiting: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        nonlocal now
        now += place / 5
        return [], waiting

    cluster.wait = nothing  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="no place for a worker: what is done is safe, --resume goes on"):
        work(cluster, 1, [])


def test_workers_that_are_another_version(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    """Told before the worker is given anything; one that has no such package cannot even tell."""
    cluster = Cluster({"1/1": 5}, rng)
    real = cluster.get
    cluster.get = lambda reference: {**real(reference), "torch": "1.0"}  # type: ignore[method-assign]
    with pytest.raises(RequestError, match=r"other versions: torch 1\.0 there, .* here: install the same"):
        work(cluster, 1, [])

    def get(reference: Any) -> Any:
        raise Lost("The actor died because of an error raised in its creation task, x\nImportError: no nla\n")

    cluster.get = get  # type: ignore[method-assign]
    with pytest.raises(RequestError, match=r"cannot import this package \(ImportError: no nla\): install"):
        work(cluster, 1, [])
