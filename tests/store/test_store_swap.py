"""Overwriting and repairing a store, stopped at every step: the whole old one or the whole new one stands there."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import power_cut
import pytest
from store_samples import create_store, sample_sequences
from test_store_crash import CODEC, SIZES, check_committed
from test_store_power import folder, library, run

from nla_engine import extension
from nla_engine.errors import StoreError, WriteError
from nla_engine.store import CaptureStore, SequenceRows, lease, swap
from nla_engine.store.care.repair import repair
from nla_engine.store.care.verify import verify
from nla_engine.store.shards import write_file_atomically

__all__ = ["folder", "library"]  # fixtures

pytestmark = pytest.mark.skipif(
    power_cut.COMPILER is None, reason="no C compiler: calls cannot be written down"
)
DAMAGED = "layer_3/codes/c/0/0"


def old_sequences() -> list[SequenceRows]:
    return sample_sequences(5, CODEC, (3,), SIZES)[0]


def new_sequences() -> list[SequenceRows]:
    return sample_sequences(6, CODEC, (3,), [9, 2])[0]


def write(path: Path, sequences: list[SequenceRows], **how: object) -> None:
    with create_store(path, CODEC, shard_rows=8, commit_seconds=0.0, **how) as writer:
        power_cut.note("begun")
        for sequence in sequences:
            writer.append(sequence)
            power_cut.note(f"committed {writer.sequences}")


def log_of_a_run(folder: Path, job: str, atomic: bool) -> None:
    """An old store, and then the job on it. Without `atomic` the file system cannot exchange names."""
    if not atomic:
        swap.exchange = lambda first, second: False  # type: ignore[assignment]
    path = folder / "disk" / "run.zarr"
    power_cut.watch(folder / "disk", folder / "log")
    write(path, old_sequences())
    if job == "repair":
        data = bytearray((path / DAMAGED).read_bytes())
        data[9] ^= 16
        write_file_atomically(path / DAMAGED, data)
    power_cut.note("job")
    if job == "repair":
        repair(path)
    else:
        write(path, new_sequences(), overwrite=True)
    power_cut.note("done")


def contents_of(path: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file() and file.name != lease.LOCK_NAME
    }


@pytest.mark.parametrize("atomic", [True, False])
@pytest.mark.parametrize("job", ["overwrite", "repair"])
def test_stopped_after_every_call(
    library: Path,
    folder: Path,
    job: str,
    atomic: bool,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (folder / "disk").mkdir()
    run("log_of_a_run", library, folder, False, job, atomic, module=Path(__file__).stem)
    log = (folder / "log").read_text().splitlines()
    assert sum(line.startswith("exchange") for line in log) == int(atomic)
    assert log[-1] == "note\tdone"
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr(extension, "load", lambda: None)
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.01)
    disk, cut = power_cut.Disk(), folder / "cut"
    path, start = cut / "run.zarr", log.index("note\tjob")
    for line in log[:start]:
        disk.call(line)
    cut.mkdir()
    power_cut.lay_out(disk.after_power_cut("everything", rng), cut, {})
    old, old_id = contents_of(path), CaptureStore.open(path).attributes["store_id"]
    new = new_sequences()
    seen, found, begun, committed = set(), [], False, 0
    for number, line in enumerate(log[start:]):
        disk.call(line)
        begun |= line == "note\tbegun" or line == "note\tdone"
        if line.startswith("note\tcommitted"):
            committed = int(line.split()[-1])
        for kept in ("nothing", "everything", "some"):
            contents = disk.after_power_cut(kept, rng)
            state = hash((begun, committed, frozenset(contents.items())))
            if state in seen:
                continue
            seen.add(state)
            shutil.rmtree(cut)
            cut.mkdir()
            power_cut.lay_out(contents, cut, {})
            where = f"{kept} kept after call {number}: {line[:200]}"
            store = CaptureStore.open(path)  # gives the old one its name back if it has none
            is_old = store.attributes["store_id"] == old_id
            found.append(is_old)
            if is_old:
                assert not begun, where
                assert contents_of(path) == old, where
            elif job == "repair":
                assert all(check.ok for check in verify(path)), where
                assert store.sequences == len(SIZES), where
                assert set(store.attributes["dropped"]) == {"0", "2"}, where
            else:
                check_committed(path, new, committed)
            with pytest.raises(StoreError, match="exists: pass --overwrite to replace it"):
                create_store(path, CODEC)
            if number % 12 == 0:
                create_store(path, CODEC, overwrite=True).close()
                assert os.listdir(cut) == ["run.zarr"], where
    assert {True, False} == set(found)
    assert len(seen) > 60


@pytest.mark.parametrize("atomic", [True, False])
def test_an_overwrite_of_which_one_call_fails(
    library: Path, folder: Path, atomic: bool, rng: np.random.Generator
) -> None:
    failures = run(
        "fail_every_call", library, folder, False, atomic, int(rng.integers(7)), module=Path(__file__).stem
    )
    assert int(failures) > 8


def fail_every_call(folder: Path, atomic: bool, first: int) -> None:
    """One call of an overwrite fails, then a later one: the whole old or the whole new store is left."""
    if not atomic:
        swap.exchange = lambda first, second: False  # type: ignore[assignment]
    path, calls, failures, kept = folder / "run.zarr", 10_000, 0, 0
    n = first
    while n < calls:
        shutil.rmtree(path, ignore_errors=True)
        power_cut.watch(folder / "elsewhere", folder / "log")
        write(path, old_sequences())
        old, told = contents_of(path), ""
        power_cut.watch(folder, folder / "log", n, errno.EIO)
        try:
            create_store(path, CODEC, overwrite=True).close()
        except WriteError as raised:
            told = str(raised)
        power_cut.watch(folder, folder / "log2")
        if not told:  # as many calls as there are, or a failure that harms nobody: what is left lies about
            calls = min(calls, len((folder / "log").read_text().splitlines()))
        failures += bool(told)
        if CaptureStore.open(path).rows:
            assert contents_of(path) == old
            assert f": {os.strerror(errno.EIO)}" in told
            kept += 1
        create_store(path, CODEC, overwrite=True).close()  # whatever was left is in nobody's way
        assert [name for name in os.listdir(folder) if "run.zarr" in name] == ["run.zarr"], told
        n += 7
    assert kept > 8
    print(failures)
