"""A capture on a real Ray cluster of several nodes on this machine: a worker and a node are killed, and every row is
that of one process."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Ran, call, capture, check_refused, json_lines
from tiny import save_model

from nla_engine.cluster import ray_run
from nla_engine.store import CaptureStore
from nla_engine.store.care.verify import verify

ray = pytest.importorskip("ray", reason="ray is not installed")
#: Ray's own processes leave pipes and sockets to the end of the interpreter.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("ray")
    save_model(directory / "base")
    rng = np.random.default_rng(0)
    records = [{"prompt": "word " * int(rng.integers(1, 9)) + str(n)} for n in range(40)]
    json_lines(directory / "prompts.jsonl", records)
    ran = run(directory, directory / "whole.zarr")
    assert ran.code == 0, ran.err
    return directory


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    )
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    made.add_node(num_cpus=1)
    made.add_node(num_cpus=1)
    yield made
    made.shutdown()


def run(base: Path, out: Path, **changes: object) -> Ran:
    return call(*capture(base, out, **{"dtype": "float32", "batch_size": 4, "max_new_tokens": 24, **changes}))


def check_rows(base: Path, out: Path) -> None:
    """The store against that of one process, sequence by sequence."""
    one, other = CaptureStore.open(base / "whole.zarr"), CaptureStore.open(out)
    assert other.complete and all(check.ok for check in verify(out))
    assert other.numbers.tolist() == list(range(40))
    for first, second in zip(one.iter_sequences(), other.iter_sequences(), strict=True):
        assert (first.tokens.tolist(), first.record) == (second.tokens.tolist(), second.record)
        x, y = one.layer(2)[first.rows], other.layer(2)[second.rows]
        assert x.shape == y.shape
        assert (np.linalg.norm(x - y, axis=1) <= 0.01 * np.linalg.norm(x, axis=1)).all()


def refused(ran: Ran, message: str) -> None:
    """Exit code 2 and one line of error, after lines that say how far the run came."""
    last = ran.err.splitlines()[-1]
    assert (ran.code, ran.out) == (2, "") and re.search(f"^error: .*({message})", last), ran.err


def kill_worker(deadline: float, parts: Path) -> None:
    """Kill a process that writes a unit, as soon as there is one."""
    while time.monotonic() < deadline:
        for lease in parts.glob("*.zarr/.nla-writer"):
            try:
                os.kill(json.loads(lease.read_text())["process"], signal.SIGKILL)
            except (OSError, ValueError):
                continue
            return
        time.sleep(0.005)


def test_workers_and_a_node_are_lost(base: Path, tmp_path: Path, cluster: Any) -> None:
    out, doomed = tmp_path / "run.zarr", cluster.add_node(num_cpus=1)

    def harm() -> None:
        kill_worker(time.monotonic() + 60, tmp_path / "run.zarr.parts")
        cluster.remove_node(doomed, allow_graceful=False)

    thread = threading.Thread(target=harm)
    thread.start()
    ran = run(base, out, ray=cluster.address, ray_units=10, json=True)
    thread.join()
    assert ran.code == 0, ran.err
    assert ran.json["sequences"] == 40 and "is tried again" in ran.err
    check_rows(base, out)
    assert not (tmp_path / "run.zarr.parts").exists()


def test_a_run_that_stops_is_resumed(
    base: Path, tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it asks for --resume, and the number of units stays."""
    out = tmp_path / "run.zarr"
    monkeypatch.setattr(ray_run, "merge", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run(base, out, ray=cluster.address, ray_units=3).code == 1
    monkeypatch.undo()
    check_refused(run(base, out, ray=cluster.address), "holds units of an unfinished run: --resume goes on")
    check_refused(
        run(base, out, ray=cluster.address, ray_units=4, resume=True), "the run that is resumed has 3"
    )
    refused(run(base, out, ray=cluster.address, seed=5, resume=True), "other options: seed was 0, is now 5")
    assert run(base, out, ray=cluster.address, resume=True, json=True).json["tokens_generated"] == 0
    check_rows(base, out)


def test_what_is_refused_with_a_cluster(
    base: Path, tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run.zarr"
    check_refused(
        run(base, out, ray=cluster.address, ray_workers=9), "has 2 CPUs, and 9 workers were asked for"
    )
    refused(run(base, out, ray=cluster.address, layer=77), "layer 77 does not exist")
    there = {**ray_run.versions(), "torch": "1.0"}
    monkeypatch.setattr(ray_run, "versions", lambda: there)
    refused(run(base, out, ray=cluster.address), "other versions: torch .* there, 1.0 here")
    assert not out.exists() and not list(tmp_path.glob("*.parts/*"))
