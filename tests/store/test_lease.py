"""Leases: one holder at a time, on one machine and on several; who looks is in nobody's way."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import call
from store_samples import create_store, fill_store, sample_sequences

from nla_engine.codec.rows import Codec
from nla_engine.errors import StoreError, WriteError
from nla_engine.store import CaptureStore, StoreWriter, WriterWatch, lease
from nla_engine.store.care.verify import verify
from nla_engine.store.exchange.export import export
from nla_engine.store.lease import Lease

CODEC = Codec.named("int8", 16)
OPTIONS = {"seed": 1, "capture": {"layer": 3}}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a holder that is silent in truth is silent for so long."""
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(lease, "SILENT_SECONDS", 200.0)
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.1)
    monkeypatch.setattr(lease, "CHECK_SECONDS", 0.0)


def hang(held: Lease, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine of this holder hangs, and others take no long time to see it."""
    held._ended.set()
    held._beating.join()
    monkeypatch.setattr(lease, "SILENT_SECONDS", 0.5)


def elsewhere(monkeypatch: pytest.MonkeyPatch, machine: str = "another machine") -> None:
    """From here on this process is on another machine, which sees no lock of the first."""
    monkeypatch.setattr(lease, "this_machine", lambda: machine)
    monkeypatch.setattr(lease, "_lock", lambda fd: True)


def child(path: Path, then: str) -> subprocess.Popen[str]:
    """A process that holds the lease of a directory."""
    code = "import sys, time, os, pathlib; from nla_engine.store.lease import Lease; "
    code += "held = Lease.of_directory(pathlib.Path(sys.argv[1])); print('held', flush=True); " + then
    command = [sys.executable, "-c", code, str(path)]
    started = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None and started.stdout.readline() == "held\n"
    return started


def test_one_holder_at_a_time_and_nothing_is_left(tmp_path: Path) -> None:
    with Lease.of_directory(tmp_path) as held:
        held.check()
        wanted = rf"another process is writing here \(process {os.getpid()} on .*\): wait for it or end it"
        with pytest.raises(StoreError, match=wanted):
            Lease.of_directory(tmp_path)
        with Lease.beside(tmp_path / "report.html"):
            assert len(os.listdir(tmp_path)) == 2
    assert os.listdir(tmp_path) == []
    held.release()
    with pytest.raises(WriteError, match="cannot be written: No such file"):
        Lease.of_directory(tmp_path / "nowhere")


def test_a_killed_holder_of_this_machine_is_followed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def waits(*_: object) -> None:
        raise AssertionError("it waits for a sign of life")

    monkeypatch.setattr(Lease, "_wait_while_silent", waits)
    process = child(tmp_path, "sys.stdin.read()")
    watch = WriterWatch(tmp_path)
    with process:
        assert watch.has_writer()
        with pytest.raises(StoreError, match=f"process {process.pid} on"):
            Lease.of_directory(tmp_path)
        process.send_signal(signal.SIGKILL)
    assert (tmp_path / lease.LOCK_NAME).exists()
    assert not watch.has_writer()
    with Lease.of_directory(tmp_path):
        assert watch.has_writer()
    assert not watch.has_writer()


def test_looking_never_stops_a_writer(tmp_path: Path) -> None:
    """Many looks while a writer takes and leaves its lease: none makes it fail."""
    done = threading.Event()
    looks = 0

    def look() -> None:
        nonlocal looks
        watch = WriterWatch(tmp_path)
        while not done.is_set():
            watch.has_writer()
            looks += 1

    watchers = [threading.Thread(target=look) for _ in range(3)]
    for watcher in watchers:
        watcher.start()
    try:
        takes = 0
        while takes < 200 or looks <= 200:
            Lease.of_directory(tmp_path).release()
            takes += 1
    finally:
        done.set()
        for watcher in watchers:
            watcher.join()


@pytest.mark.usefixtures("quick")
def test_a_living_holder_of_another_machine_is_seen_by_its_beat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Lease.of_directory(tmp_path) as held:
        elsewhere(monkeypatch)
        assert WriterWatch(tmp_path).has_writer()
        with pytest.raises(StoreError, match="another process is writing here"):
            Lease.of_directory(tmp_path)
        held.check()


@pytest.mark.usefixtures("quick")
def test_a_silent_holder_of_another_machine_is_taken_over_and_finds_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Lease.of_directory(tmp_path)
    with monkeypatch.context() as patch:
        elsewhere(patch)
        watch = WriterWatch(tmp_path)
        assert watch.has_writer()
        hang(first, patch)
        started = time.monotonic()
        second = Lease.of_directory(tmp_path)
        assert time.monotonic() - started >= 0.5
        with pytest.raises(WriteError, match="deleted or replaced while this process was writing"):
            first.check()
        second.check()
        first.release()
        second.check()
        second.release()
        assert not watch.has_writer()


@pytest.mark.usefixtures("quick")
def test_without_any_locks_the_beat_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(lease.fcntl, "fcntl", no_locks)
    held = Lease.of_directory(tmp_path)
    with pytest.raises(StoreError, match="another process is writing here"):
        Lease.of_directory(tmp_path)
    assert WriterWatch(tmp_path).has_writer()
    held.release()
    (tmp_path / lease.LOCK_NAME).write_bytes(held._data)  # of one that was killed
    monkeypatch.setattr(lease, "SILENT_SECONDS", 0.5)
    Lease.of_directory(tmp_path).release()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("found", [b"", b"{", b'{"host": 1}', b"[]"])
def test_a_file_that_names_nobody(tmp_path: Path, found: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "SILENT_SECONDS", 0.5)
    (tmp_path / lease.LOCK_NAME).write_bytes(found)
    with Lease.of_directory(tmp_path):
        assert json.loads((tmp_path / lease.LOCK_NAME).read_bytes())["process"] == os.getpid()


class AtOnce:
    """The clock of processes that take over one file at once. Each has its own time, which passes only while it sleeps.

    None removes the file before all have found its holder silent. None has waited long enough for the others before
    each of these has made a file, or has given up.
    """

    def __init__(self, takers: int) -> None:
        self.takers, self.own = takers, threading.local()
        self.sure, self.resting = set[int](), set[int]()
        self.changed = threading.Condition()
        self.time_ns = time.time_ns

    def monotonic(self) -> float:
        return getattr(self.own, "now", 0.0)

    def sleep(self, seconds: float) -> None:
        self.own.now = self.monotonic() + seconds
        if seconds == lease.SETTLE_SECONDS:
            self.join(self.resting)

    def join(self, those: set[int], wait: bool = True) -> None:
        with self.changed:
            those.add(threading.get_ident())
            self.changed.notify_all()
            assert not wait or self.changed.wait_for(lambda: len(those) == self.takers, 200)


@pytest.mark.usefixtures("quick")
def test_two_machines_that_take_over_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = {"host": "gone", "process": 1, "machine": "gone", "token": "1"}
    (tmp_path / lease.LOCK_NAME).write_text(json.dumps(record))
    clock, wait = AtOnce(4), Lease._wait_while_silent

    def waits(taken: Lease, found: bytes) -> None:
        wait(taken, found)
        clock.join(clock.sure)

    monkeypatch.setattr(lease, "_lock", lambda fd: True)
    monkeypatch.setattr(lease, "SILENT_SECONDS", 0.5)
    monkeypatch.setattr(lease, "time", clock)
    monkeypatch.setattr(Lease, "_wait_while_silent", waits)
    outcomes: list[object] = []

    def take() -> None:
        try:
            outcomes.append(Lease.of_directory(tmp_path))
        except StoreError as error:
            outcomes.append(str(error))
        clock.join(clock.resting, wait=False)

    takers = [threading.Thread(target=take) for _ in range(4)]
    for taker in takers:
        taker.start()
    for taker in takers:
        taker.join()
    held = [each for each in outcomes if isinstance(each, Lease)]
    assert len(outcomes) == 4 and len(held) == 1
    held[0].check()
    held[0].release()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("step", ["append", "commit"])
def test_a_writer_whose_store_was_taken_writes_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """A machine that hung wakes up when another one has gone on: the store is the other's."""
    sequences, _ = sample_sequences(5, CODEC, (3,), [20, 20, 20])
    path = tmp_path / "run.zarr"
    first = create_store(path, CODEC, shard_rows=8)
    first.append(sequences[0])
    first.commit()
    if step == "commit":
        first.append(sequences[1])
    with monkeypatch.context() as patch:
        elsewhere(patch)
        hang(first._lock, patch)
        second = StoreWriter.resume(path, options=OPTIONS)
        before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
        action: Callable[[], None] = first.commit if step == "commit" else lambda: first.append(sequences[1])
        with pytest.raises(WriteError, match="deleted or replaced while this process was writing"):
            action()
        first.close()
        assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before
        second.append(sequences[1])
        second.close()
    store = CaptureStore.open(path)
    assert (store.sequences, store.rows, store.commit.epoch) == (2, 40, 2)


def test_the_lock_is_one_that_file_servers_keep(tmp_path: Path) -> None:
    """Not `flock`, which they may not, and not the kind that any close of the file ends."""
    with Lease.of_directory(tmp_path):
        (tmp_path / lease.LOCK_NAME).read_bytes()
        fd = os.open(tmp_path / lease.LOCK_NAME, os.O_RDWR)
        with pytest.raises(BlockingIOError):
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(fd)
        assert WriterWatch(tmp_path).has_writer()


@pytest.mark.parametrize("command", [("study", "multiplication"), ("demo",)])
def test_a_directory_that_another_run_fills_is_refused(tmp_path: Path, command: tuple[str, ...]) -> None:
    with Lease.of_directory(tmp_path):
        done = call(*command, "--out", tmp_path)
        assert (done.code, "another process is writing here" in done.err) == (2, True)
    assert os.listdir(tmp_path) == []


def test_two_that_write_one_file_at_once(tmp_path: Path) -> None:
    fill_store(tmp_path / "run.zarr", CODEC, [3])
    store, out = CaptureStore.open(tmp_path / "run.zarr"), tmp_path / "deep" / "rows.npy"
    out.parent.mkdir()
    with Lease.beside(out), pytest.raises(StoreError, match="another process is writing here"):
        export(store, "npy", out)
    assert os.listdir(out.parent) == []
    assert export(store, "npy", out) == 3
    assert os.listdir(out.parent) == ["rows.npy"]


def test_a_stale_lease_is_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    fill_store(path, CODEC, [3])
    (path / lease.LOCK_NAME).write_bytes(lease._record())
    assert all(check.ok for check in verify(path))
    create_store(path, CODEC, overwrite=True).close()
    assert sorted(os.listdir(path)) == ["layer_3", "rows", "sequences", "vocabulary", "zarr.json"]
