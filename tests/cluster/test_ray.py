"""A capture on a real Ray cluster of several nodes on this machine: workers and nodes are killed, cut off, of another
version, and every row is that of one process."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
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


def new_cluster() -> Any:
    """One whose head runs no workers."""
    from ray.cluster_utils import Cluster

    # A node that says nothing is given up after some ten seconds.
    soon = {"period_ms": 500, "timeout_ms": 2000, "failure_threshold": 4, "initial_delay_ms": 0}
    head = {
        "num_cpus": 0,
        "include_dashboard": False,
        "_system_config": {f"health_check_{key}": value for key, value in soon.items()},
    }
    # With hooks for the exit, only the main thread could add nodes.
    return Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    )
    made = new_cluster()
    made.add_node(num_cpus=1)
    made.add_node(num_cpus=1)
    yield made
    made.shutdown()


def raylet(node: Any) -> int:
    """The process that makes a node one of the cluster. Its workers are its children."""
    return node.all_processes["raylet"][0].process.pid


def stat(process: int) -> list[str]:
    """State and parent of a process, and more; of one that has gone nothing that fits."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    return ["gone", "0"]


def writers(parts: Path) -> Iterator[int]:
    """The processes that write a unit now."""
    for lease in parts.glob("*.zarr/.nla-writer"):
        with contextlib.suppress(OSError, ValueError):
            yield json.loads(lease.read_text())["process"]


def writing(parts: Path, node: Any, deadline: float) -> int:
    """A process of a node that writes a unit, once there is one; 0 if there is none in time."""
    while time.monotonic() < deadline:
        for process in writers(parts):
            if stat(process)[1] == str(raylet(node)):
                return process
        time.sleep(0.005)
    return 0


def stopped_writer(parts: Path, node: Any, deadline: float) -> int:
    """The same, stopped in the middle of its unit."""
    while process := writing(parts, node, deadline):
        os.kill(process, signal.SIGSTOP)
        while stat(process)[0] not in ("T", "gone"):
            time.sleep(0.005)
        if process in writers(parts):
            return process
        os.kill(process, signal.SIGCONT)  # the unit ended meanwhile
    return 0


def given_up(node: Any) -> bool:
    return any(each["NodeID"] == node.node_id and not each["Alive"] for each in ray.nodes())


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
        for process in writers(parts):
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)
                return
        time.sleep(0.005)


def test_workers_and_a_node_are_lost(base: Path, tmp_path: Path, cluster: Any) -> None:
    out, doomed = tmp_path / "run.zarr", cluster.add_node(num_cpus=1)

    def harm() -> None:
        kill_worker(time.monotonic() + 240, tmp_path / "run.zarr.parts")
        cluster.remove_node(doomed, allow_graceful=False)

    thread = threading.Thread(target=harm)
    thread.start()
    ran = run(base, out, ray=cluster.address, ray_units=10, json=True)
    thread.join()
    assert ran.code == 0, ran.err
    assert ran.json["sequences"] == 40 and "is tried again" in ran.err
    check_rows(base, out)
    assert not (tmp_path / "run.zarr.parts").exists()


def test_a_node_is_cut_off(base: Path, tmp_path: Path, cluster: Any) -> None:
    """Its raylet stops, and its worker in the middle of a unit, which nobody else may write. Both go on later.

    Until then there is no other node, so this one certainly has a unit.
    """
    alone, stopped = new_cluster(), []
    out, doomed = tmp_path / "run.zarr", alone.add_node(num_cpus=1)

    def harm() -> None:
        end = time.monotonic() + 240
        if process := stopped_writer(tmp_path / "run.zarr.parts", doomed, end):
            stopped.append(process)
            alone.add_node(num_cpus=1)
            os.kill(raylet(doomed), signal.SIGSTOP)
            stopped.append(raylet(doomed))
            while not given_up(doomed) and time.monotonic() < end:
                time.sleep(0.1)
            time.sleep(5)  # the unit is tried elsewhere
            os.kill(process, signal.SIGCONT)

    thread = threading.Thread(target=harm)
    thread.start()
    try:
        ran = run(base, out, ray=alone.address, ray_units=6, json=True)
        thread.join()
    finally:
        for each in stopped:
            with contextlib.suppress(OSError):
                os.kill(each, signal.SIGCONT)
        alone.shutdown()
    assert len(stopped) == 2 and ran.code == 0, ran.err
    assert "is tried again" in ran.err
    check_rows(base, out)


def test_the_last_node_vanishes(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ends with 1, and goes on with another node."""
    monkeypatch.setattr(ray_run, "PLACE_SECONDS", 5.0)
    cluster = new_cluster()
    out, only = tmp_path / "run.zarr", cluster.add_node(num_cpus=1)

    def harm() -> None:
        assert writing(tmp_path / "run.zarr.parts", only, time.monotonic() + 240)
        cluster.remove_node(only, allow_graceful=False)

    thread = threading.Thread(target=harm)
    thread.start()
    try:
        ran = run(base, out, ray=cluster.address, ray_units=4)
        thread.join()
        assert ran.code == 1, ran.err
        assert ran.err.splitlines()[-1].endswith(
            "no place for a worker: what is done is safe, --resume goes on"
        )
        assert not out.exists()
        cluster.add_node(num_cpus=1)
        monkeypatch.undo()
        ran = run(base, out, ray=cluster.address, resume=True)
        assert ran.code == 0, ran.err
    finally:
        cluster.shutdown()
    check_rows(base, out)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("errors.py", None, r"other versions: nla_engine \S+ \(code \w+\) there, .* here: install the same"),
        (
            "__init__.py",
            "import another_package",
            r"cannot import this package \(.*another_package.*\): install",
        ),
    ],
)
def test_a_node_with_another_version(
    base: Path,
    tmp_path: Path,
    cluster: Any,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    text: str | None,
    message: str,
) -> None:
    """It is the only one with room, so that no other can finish the run before it is heard."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")  # Ray's workers look for modules where the run was started, too
    package = Path(ray_run.__file__).parents[1]
    shutil.copytree(package, tmp_path / "nla_engine", ignore=shutil.ignore_patterns("__pycache__", "trio"))
    changed = tmp_path / "nla_engine" / file
    changed.write_text(changed.read_text() + "\nX = 1\n" if text is None else text)
    path = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    alone = new_cluster()
    alone.add_node(num_cpus=1, env_vars={"PYTHONPATH": path})
    try:
        ran = run(base, tmp_path / "run.zarr", ray=alone.address)
    finally:
        alone.shutdown()
    refused(ran, message)
    assert not list(tmp_path.glob("run.*"))


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
