"""Power cuts and failing calls under the Python and the C++ writer: committed rows stay, resuming makes them whole.

The writer runs in a process whose calls are written down (syscalls.c, power_cut.py).
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import power_cut
import pytest
from store_samples import fill_old_store, sample_sequences
from test_store_crash import CODEC, OPTIONS, SIZES, check_committed, files, finish, out_of_order, write_all

from nla_engine import extension
from nla_engine.errors import WriteError
from nla_engine.store import CaptureStore, StoreWriter
from nla_engine.store.care.verify import verify
from nla_engine.store.shards import make_directory, write_file_atomically

pytestmark = pytest.mark.skipif(
    power_cut.COMPILER is None, reason="no C compiler: calls cannot be written down"
)
WRITERS = [pytest.param(True, marks=pytest.mark.skipif(extension.load() is None, reason="not built")), False]


def write_in_stages(path: Path) -> None:
    """A run that is killed once, half a commit behind, and resumed. Every commit is noted in the log."""
    sequences = out_of_order()
    for committed in write_all(path, sequences[:2]):
        power_cut.note(f"committed {committed}")
    child = os.fork()
    if child == 0:
        power_cut.note("resumed, to be killed")
        with StoreWriter.resume(path, options=OPTIONS) as writer:
            writer.append(sequences[2])  # its full shards are written, and no commit follows
            writer._queue.join()
            os._exit(0)
    os.waitpid(child, 0)
    with StoreWriter.resume(path, options=OPTIONS, commit_seconds=0.0) as writer:
        for sequence in sequences[2:]:
            writer.append(sequence)
            power_cut.note(f"committed {writer.sequences}")
    power_cut.note("done")


def run(
    job: str, library: Path, folder: Path, native: bool, *arguments: object, module: str = Path(__file__).stem
) -> str:
    """Call a function of a test module in a process whose calls are watched."""
    words = ", ".join([f"Path({str(folder)!r})", *map(repr, arguments)])
    code = f"""
import sys; sys.path[:0] = {list(map(str, Path(__file__).parents[:2]))!r}
from pathlib import Path
import {module} as here
from nla_engine import extension
if not {native}: extension.load = lambda: None
here.{job}({words})
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return power_cut.build_library(tmp_path_factory.mktemp("library"))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where that can be: these tests write many files."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as name:
        yield Path(os.path.realpath(name))


def log_of_a_run(folder: Path) -> None:
    power_cut.watch(folder / "disk", folder / "log")
    write_in_stages(folder / "disk" / "deep" / "run.zarr")


@pytest.mark.parametrize("native", WRITERS)
def test_a_power_cut_after_every_call(
    library: Path, folder: Path, native: bool, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "disk").mkdir()
    run("log_of_a_run", library, folder, native)
    log = (folder / "log").read_text().splitlines()
    assert sum(line.startswith("write") for line in log) > 100
    assert log[-1] == "note\tdone"
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr(extension, "load", lambda: None)
    sequences = out_of_order()
    whole = files(folder / "disk/deep/run.zarr")
    disk, committed, seen = power_cut.Disk(), None, set()
    cut, held = folder / "cut", {}
    cut.mkdir()
    for number, line in enumerate(log):
        disk.call(line)
        if line.startswith("note\tcommitted"):
            committed = int(line.split()[-1])
        for kept in ("nothing", "everything", "some")[: 3 if number % 3 == 0 else 2]:
            contents = disk.after_power_cut(kept, rng)
            state = hash((committed, frozenset(contents.items())))
            if state in seen:
                continue
            seen.add(state)
            power_cut.lay_out(contents, cut, held)
            held, path = contents, cut / "deep" / "run.zarr"
            where = f"{kept} kept after call {number}: {line[:200]}"
            assert committed is None or path.exists(), where
            if path.exists():
                check_committed(path, sequences, committed or 0)
            if kept == "some" and number % 12 == 0:
                finish(path, sequences)
                assert files(path) == whole, where
                assert all(check.ok for check in verify(path)), where
                shutil.rmtree(cut)
                cut.mkdir()
                held = {}
    assert len(seen) > 400


def old_store_resumed(folder: Path) -> None:
    """A store of format version 1 becomes one of version 2, with two more sequences."""
    power_cut.watch(folder / "disk", folder / "log")
    path, old = folder / "disk" / "run.zarr", folder / "old.zarr"
    for file in sorted(old.rglob("*"), reverse=True):  # the root's zarr.json last
        if file.is_file():
            make_directory((path / file.relative_to(old)).parent)
            write_file_atomically(path / file.relative_to(old), file.read_bytes())
    power_cut.note("old")
    with StoreWriter.resume(path, options=OPTIONS, commit_seconds=0.0) as writer:
        for number in (4, 3):
            writer.append(replace(out_of_order()[0], number=number))
            power_cut.note(f"committed {number}")


def test_a_power_cut_while_an_old_store_gets_numbers(
    library: Path, folder: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_old_store(folder / "old.zarr", CODEC, SIZES, shard_rows=8)
    (folder / "disk").mkdir()
    run("old_store_resumed", library, folder, False)
    log = (folder / "log").read_text().splitlines()
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    given, _ = sample_sequences(0, CODEC, (3,), SIZES)
    disk, versions, resumed = power_cut.Disk(), set(), 0
    cut, begun, committed = folder / "cut", log.index("note\told"), log.index("note\tcommitted 4")
    for line in log[:begun]:
        disk.call(line)
    for number, line in enumerate(log[begun:committed]):
        disk.call(line)
        cut.mkdir()
        power_cut.lay_out(disk.after_power_cut(("nothing", "everything", "some")[number % 3], rng), cut, {})
        path = cut / "run.zarr"
        versions.add(CaptureStore.open(path).attributes["format_version"])
        assert CaptureStore.open(path).numbers[:3].tolist() == [0, 1, 2]
        if number % 10 == 0:
            with StoreWriter.resume(path, options=OPTIONS) as writer:
                for missing in writer.missing(5).tolist():
                    writer.append(replace(out_of_order()[0], number=missing))
            assert CaptureStore.open(path).numbers.tolist() == [0, 1, 2, 3, 4]
            assert all(check.ok for check in verify(path)), f"call {number}: {line[:200]}"
            for place, each in enumerate(given):
                assert CaptureStore.open(path).sequence(place).tokens.tolist() == each.tokens.tolist()
            resumed += 1
        shutil.rmtree(cut)
    assert resumed > 10 and versions == {1, 2}


def fail_every_few_calls(folder: Path, first: int, step: int, error: int) -> None:
    """One call of a run fails, the next time a later one, until none does: nothing committed is harmed."""
    sequences = out_of_order()
    finish(folder / "whole.zarr", sequences)
    whole, failures = files(folder / "whole.zarr"), 0
    for n in range(first, 10_000, step):
        path, told, committed = folder / "run.zarr", None, 0
        power_cut.watch(folder, folder / "log", n, error)
        try:
            for committed in write_all(path, sequences):  # noqa: B007
                pass
        except WriteError as raised:
            told = str(raised)
        power_cut.watch(folder, folder / "log")
        if told is None:
            break
        failures += 1
        assert f": {os.strerror(error)}" in told
        assert "\n" not in told
        assert not list(folder.rglob("*.tmp"))
        assert not list(folder.glob(".run.zarr*"))
        if path.exists():
            shown = check_committed(path, sequences, committed)
            safe = re.search(r"; (\d+) sequences with \d+ rows are committed and safe: .* --resume$", told)
            # Nothing is said before there is a store; a commit whose last sync fails shows, but is not called safe.
            assert committed <= int(safe[1]) <= shown if safe else committed == 0
        finish(path, sequences)
        assert files(path) == whole, f"call {n} failed"
        shutil.rmtree(path)
    print(failures)


@pytest.mark.parametrize(("native", "error"), [(True, errno.ENOSPC), (False, errno.EIO)])
def test_a_call_that_fails(
    library: Path, folder: Path, native: bool, error: int, rng: np.random.Generator
) -> None:
    if native and extension.load() is None:
        pytest.skip("the extension is not built")
    assert int(run("fail_every_few_calls", library, folder, native, int(rng.integers(61)), 61, error)) > 12
