"""Writers that are killed, or whose disk fails, at every step: committed rows stay, and resuming makes it whole."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from store_samples import create_store, sample_sequences, shuffled

from nla_engine import extension
from nla_engine.codec.rows import Codec
from nla_engine.errors import WriteError
from nla_engine.store import CaptureStore, SequenceRows, StoreWriter, shards
from nla_engine.store.arrays import ArrayLog
from nla_engine.store.care.verify import verify

CODEC = Codec.named("int8", 16)
OPTIONS = {"seed": 1, "capture": {"layer": 3}}
SIZES = [5, 0, 14]  # with shards of 8 rows: a partial shard, nothing, one that grows full and two more


def write_all(path: Path, sequences: list[SequenceRows]) -> Iterator[int]:
    """Create a store and append, with a commit after each sequence; yields what is committed.

    A narrow shard holds 16 rows: one that grows full, and one more.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nla_engine.store.format.NARROW_SHARD_FACTOR", 2)
        opened = create_store(path, CODEC, shard_rows=8, commit_seconds=0.0)
    with opened as writer:
        yield writer.sequences
        for sequence in sequences:
            writer.append(sequence)
            yield writer.sequences


def out_of_order() -> list[SequenceRows]:
    """Three sequences, of which the last by number ends first."""
    sequences, _ = sample_sequences(5, CODEC, (3,), SIZES)
    return [replace(each, number=number) for each, number in zip(sequences, (2, 0, 1), strict=True)]


def files(path: Path) -> dict[str, bytes]:
    """Every file of a store, without what differs between two runs that did the same."""
    contents = {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    manifest = json.loads(contents["zarr.json"])
    about = manifest["attributes"]["nla_engine"]
    about["store_id"] = about["checksum"] = about["commit"]["time"] = about["commit"]["epoch"] = None
    return {**contents, "zarr.json": json.dumps(manifest).encode()}


def check_committed(path: Path, sequences: list[SequenceRows], at_least: int) -> int:
    """The store holds the first of the sequences, at least so many, bit for bit. Returns how many."""
    store = CaptureStore.open(path)
    assert at_least <= store.sequences <= at_least + 1
    for place, given in enumerate(sequences[: store.sequences]):
        stored = store.sequence(place if given.number is None else given.number)
        assert stored.tokens.tolist() == given.tokens.tolist()
        assert stored.source == json.loads(given.source)
        assert store.column("flags")[stored.rows].tolist() == given.flags.tolist()
        rows, wanted = store.layer(3).encoded(stored.rows.start, stored.rows.stop), given.layers[3]
        for name in vars(wanted):
            assert getattr(rows, name).tobytes() == getattr(wanted, name).tobytes(), name
    return store.sequences


def write_on(path: Path, sequences: list[SequenceRows]) -> Iterator[int]:
    """What a user does after a crash: resume, or start anew when there is no store yet. Yields what is committed."""
    if not path.exists():
        yield from write_all(path, sequences)
        return
    with StoreWriter.resume(path, options=OPTIONS, commit_seconds=0.0) as writer:
        missing = set(writer.missing(len(sequences)).tolist())
        for place, sequence in enumerate(sequences):
            if (place if sequence.number is None else sequence.number) in missing:
                writer.append(sequence)
                yield writer.sequences


def finish(path: Path, sequences: list[SequenceRows]) -> None:
    for _ in write_on(path, sequences):
        pass


@pytest.fixture
def fast_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: these tests write some ten thousand files."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def killed_at_random(folder: Path, seed: int, kills: int) -> None:
    """Run by a child process of the test: fork writers and kill each at a random moment of its work.

    How long a writer takes is followed, so that few end before they are killed, however fast the machine is just now.
    After each the store must hold what was committed; it is resumed until it is whole, and then begun anew.
    """
    rng = np.random.default_rng(seed)
    sequences = shuffled(sample_sequences(seed, CODEC, (3,), rng.integers(0, 20, 5).tolist())[0], rng)
    finish(folder / "whole.zarr", sequences)
    started = time.monotonic()
    finish(folder / "again.zarr", sequences)
    longest = time.monotonic() - started  # about
    whole, path = files(folder / "whole.zarr"), folder / "run.zarr"
    killed = stores = committed = 0
    while killed < kills:
        reading, writing = os.pipe()
        native = rng.random() < 0.5
        child = os.fork()
        if child == 0:
            if not native:
                extension.load = lambda: None
            for count in write_on(path, sequences):
                os.write(writing, bytes([count]))
            os._exit(0)
        os.close(writing)
        time.sleep(rng.random() * longest)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        told = os.read(reading, 100)
        os.close(reading)
        assert status in (0, signal.SIGKILL), f"the writer failed: {status}"
        killed += status != 0
        longest *= 1.02 if status else 0.8
        committed = told[-1] if told else committed
        if path.exists():
            committed = check_committed(path, sequences, committed)
        else:
            assert not told
        if status == 0 or rng.random() < 0.1:
            finish(path, sequences)
            assert all(check.ok for check in verify(path))
            assert files(path) == whole, f"kill {killed}"
            shutil.rmtree(path)
            stores, committed = stores + 1, 0
    print(killed, stores)


def test_killed_at_random_moments(fast_path: Path, seed: int) -> None:
    here = Path(__file__)
    code = f"import sys, pathlib; sys.path[:0] = {list(map(str, here.parents[:2]))!r}\n"
    code += f"import {here.stem}; {here.stem}.killed_at_random(pathlib.Path({str(fast_path)!r}), {seed}, 200)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=here.parents[2])
    assert done.returncode == 0, done.stderr
    killed, stores = map(int, done.stdout.split())
    assert killed == 200
    assert stores > 5


def test_a_real_limit_on_file_size(tmp_path: Path) -> None:
    """The system itself refuses the bytes: a part of the shard is written first."""
    code = f"""
import resource, pathlib, sys
sys.path[:0] = {list(map(str, Path(__file__).parents[:2]))!r}
import test_store_crash as t
from nla_engine.errors import WriteError
sequences, _ = t.sample_sequences(5, t.Codec.named("bf16", 4096), (3,), [6] * 4)
writer = t.create_store(pathlib.Path({str(tmp_path / "run.zarr")!r}), t.Codec.named("bf16", 4096), shard_rows=16)
writer.append(sequences[0])
writer.commit()
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
try:
    for sequence in sequences[1:]:
        writer.append(sequence)
    writer.commit()  # shards are written in the background: their errors are told here at the latest
except WriteError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert "layer_3/codes/c/0/0: cannot be written: File too large; 1 sequences with 6 rows" in done.stdout, (
        done
    )
    path = tmp_path / "run.zarr"
    assert not list(path.rglob("*.tmp"))
    sequences, _ = sample_sequences(5, Codec.named("bf16", 4096), (3,), [6] * 4)
    check_committed(path, sequences, 1)
    finish(path, sequences)
    check_committed(path, sequences, 4)


def test_a_failed_writer_stays_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sequences, _ = sample_sequences(5, CODEC, (3,), SIZES)
    writer = create_store(tmp_path / "run.zarr", CODEC)
    writer.append(sequences[0])

    def readonly(*arguments: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(shards.os, "replace", readonly)
        with pytest.raises(WriteError, match="Read-only file system"):
            writer.commit()
    for action in (writer.commit, lambda: writer.append(sequences[1])):
        with pytest.raises(Exception, match="has failed"):
            action()
    writer.close()
    assert CaptureStore.open(tmp_path / "run.zarr").sequences == 0


def test_an_exception_commits_what_was_appended(tmp_path: Path) -> None:
    sequences, _ = sample_sequences(5, CODEC, (3,), SIZES)
    path = tmp_path / "run.zarr"
    with pytest.raises(KeyboardInterrupt), create_store(path, CODEC, shard_rows=8) as writer:  # noqa: PT012
        writer.append(sequences[0])
        writer.commit()
        writer.append(sequences[1])
        raise KeyboardInterrupt
    assert not CaptureStore.open(path).complete
    check_committed(path, sequences, 2)
    finish(path, sequences)
    assert CaptureStore.open(path).complete
    check_committed(path, sequences, 3)


def test_an_interrupt_while_appending_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sequences, _ = sample_sequences(5, CODEC, (3,), SIZES)
    path = tmp_path / "run.zarr"
    append = ArrayLog.append

    def interrupted(log: ArrayLog, *parts: np.ndarray) -> None:
        append(log, *parts)
        if log.spec.path == "rows/position":
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), create_store(path, CODEC, shard_rows=8) as writer:  # noqa: PT012
        writer.append(sequences[0])
        monkeypatch.setattr(ArrayLog, "append", interrupted)
        writer.append(sequences[1])
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    check_committed(path, sequences, 2)
    finish(path, sequences)
    assert CaptureStore.open(path).sequences == 3


def test_rows_past_the_commit_are_not_shown(tmp_path: Path) -> None:
    """Shards reach the disk before the commit does; a reader sees none of it, and a resumed run may differ there."""
    sequences, _ = sample_sequences(5, CODEC, (3,), [5, 30])
    path = tmp_path / "run.zarr"
    writer = create_store(path, CODEC, shard_rows=8)
    writer.append(sequences[0])
    writer.commit()
    writer.append(sequences[1])
    writer._queue.join()
    writer._lock.release()  # all that is left to do when a process dies
    assert (path / "layer_3/codes/c/3/0").exists()
    store = CaptureStore.open(path)
    assert (store.rows, len(store.layer(3)), len(store.column("position"))) == (5, 5, 5)
    with pytest.raises(IndexError):
        store.layer(3)[5]
    others, vectors = sample_sequences(6, CODEC, (3,), [1])
    with StoreWriter.resume(path, options=OPTIONS) as resumed:
        resumed.append(others[0])
    assert not (path / "layer_3/codes/c/3/0").exists()
    check_committed(path, [sequences[0], others[0]], 2)
    assert np.isfinite(vectors[3]).any()
