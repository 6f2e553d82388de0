"""Damage of every kind of file: always found, never a wrong row, never a traceback; repair loses no other sequence."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import zarr
from commands import call
from store_samples import create_store, fill_store, sample_sequences

from nla_engine.codec.rows import Codec
from nla_engine.errors import NLAError, StoreError, WriteError
from nla_engine.store import CaptureStore, SequenceRows, StoreWriter, swap
from nla_engine.store.care.repair import Repair, repair
from nla_engine.store.care.verify import verify
from nla_engine.store.manifest import attributes_checksum

CODEC = Codec.named("int8", 48)
LAYERS = (3, 7)
SIZES = [5, 0, 30, 200, 20, 33, 0, 9, 40, 140, 7]
OPTIONS = {"seed": 1, "capture": {"layer": 3}}


@pytest.fixture(autouse=True)
def without_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where that can be."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as name:
        yield Path(name)


@pytest.fixture
def path(folder: Path) -> Path:
    fill_store(folder / "run.zarr", CODEC, SIZES, layers=LAYERS, shard_rows=256)
    return folder / "run.zarr"


def samples() -> list[SequenceRows]:
    return sample_sequences(0, CODEC, LAYERS, SIZES)[0]


def failed(path: Path) -> dict[str, str]:
    return {check.name: check.detail for check in verify(path) if not check.ok}


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 16
    file.write_bytes(data)


def check_sequences(path: Path, dropped: dict[int, str]) -> None:
    """Everything but the dropped sequences is there bit for bit, and they are there without rows."""
    assert [check for check in verify(path) if not check.ok] == []
    store = CaptureStore.open(path)
    assert store.sequences == len(SIZES)
    assert store.attributes["dropped"] == {str(number): fault for number, fault in dropped.items()}
    for stored, given in zip(store.iter_sequences(), samples(), strict=True):
        if stored.number in dropped:
            assert stored.rows.start == stored.rows.stop
            continue
        assert stored.tokens.tolist() == given.tokens.tolist()
        assert (stored.prompt_size, stored.finish) == (given.prompt_size, given.finish)
        assert stored.source == json.loads(given.source)
        for name in ("flags", "token_id", "next_token_id", "position"):
            assert store.column(name)[stored.rows].tolist() == getattr(given, name).tolist()
        for layer, wanted in given.layers.items():
            rows = store.layer(layer).encoded(stored.rows.start, stored.rows.stop)
            for name in vars(wanted):
                assert getattr(rows, name).tobytes() == getattr(wanted, name).tobytes(), name
    for _, array in zarr.open_group(path, mode="r").members(max_depth=None):
        if isinstance(array, zarr.Array):
            array[:]


def test_a_whole_store_is_left_alone(path: Path) -> None:
    before = (path / "zarr.json").stat()
    checks, done = repair(path)
    assert done is None
    assert all(check.ok for check in checks)
    assert (path / "zarr.json").stat() == before


@pytest.mark.parametrize(
    ("file", "place", "first", "last"),
    [
        ("layer_3/codes/c/0/0", 200, 0, 128),
        ("layer_3/codes/c/0/0", 128 * 48 + 4 + 9, 128, 256),
        ("layer_7/codes/c/1/0", 9, 256, 384),
        ("layer_7/scales/c/0/0", 3, 0, 128),
        ("layer_7/scales/c/0/0", 2 * (128 * 2 * CODEC.scale_width + 4) + 3, 256, 384),
        ("rows/position/c/0", 3, 0, 256),
        ("layer_3/norm/c/0", 256 * 4 + 4 + 3, 256, 512),
    ],
)
def test_rows_that_are_lost_are_dropped_and_no_others(
    path: Path, file: str, place: int, first: int, last: int
) -> None:
    flip(path / file, place)
    starts = np.cumsum([0, *SIZES])
    store_id = CaptureStore.open(path).attributes["store_id"]
    checks, done = repair(path)
    assert isinstance(done, Repair)
    named = re.search(r"\d+ sequences: ([\d, ]+)", {c.name: c.detail for c in checks}["damaged sequences"])
    assert [int(word) for word in named[1].split(", ")] == sorted(done.dropped)
    dropped = [k for k, size in enumerate(SIZES) if size and starts[k] < last and starts[k + 1] > first]
    assert sorted(done.dropped) == dropped
    assert done.rows_lost == sum(SIZES[number] for number in dropped)
    for fault in done.dropped.values():
        assert re.fullmatch(rf"{file}: damaged: inner chunk \d fails its checksum", fault)
    check_sequences(path, dict(done.dropped))
    store = CaptureStore.open(path)
    assert store.complete
    assert store.attributes["store_id"] != store_id
    with StoreWriter.resume(path, options=OPTIONS) as writer:  # it goes on where the run was
        assert writer.sequences == len(SIZES)
    assert os.listdir(path.parent) == ["run.zarr"]


@pytest.mark.parametrize("name", ["rows/position/c/0", "layer_7/scales/c/0/0"])
def test_a_shard_without_its_index_is_lost_and_no_other(folder: Path, name: str) -> None:
    """A narrow shard holds 256 rows."""
    path = folder / "small.zarr"
    fill_store(path, CODEC, SIZES, layers=LAYERS, shard_rows=16)
    flip(path / name, -20)
    _, done = repair(path)
    assert sorted(done.dropped) == [0, 2, 3, 4, 5]
    check_sequences(path, dict(done.dropped))


@pytest.mark.parametrize("name", ["finish", "prompt_size", "tokens", "source"])
def test_a_sequence_without_its_text_is_dropped(path: Path, name: str) -> None:
    flip(path / "sequences" / name / "c" / "0", 2)
    _, done = repair(path)
    assert sorted(done.dropped) == list(range(len(SIZES)))  # so small a store has one chunk of them
    check_sequences(path, dict(done.dropped))
    assert CaptureStore.open(path).rows == 0


@pytest.mark.parametrize(
    "name",
    [
        *(f"sequences/{prefix}_{end}" for prefix in ("row", "token", "source") for end in ("start", "size")),
        *("rows/sequence", "rows/token_id", "rows/next_token_id", "rows/flags", "layer_7/exact_row"),
    ],
)
def test_what_is_said_twice_is_restored(path: Path, name: str) -> None:
    flip(path / name / "c" / "0", 3)
    assert f"{name}: can be restored from other arrays" in failed(path)["damaged sequences"]
    _, done = repair(path)
    assert (done.dropped, done.rows_lost, done.restored) == ({}, 0, [name])
    check_sequences(path, {})


def test_rows_alone_tell_where_sequences_lie(path: Path) -> None:
    for name in ("row_start", "row_size"):
        (path / "sequences" / name / "c" / "0").unlink()
    (path / "rows/flags/c/0").write_bytes(b"")
    _, done = repair(path)
    assert done.dropped == {}
    assert set(done.restored) == {"sequences/row_start", "sequences/row_size", "rows/flags"}
    check_sequences(path, {})


def test_metadata_is_written_anew(path: Path) -> None:
    (path / "rows/zarr.json").unlink()
    (path / "layer_3/codes/zarr.json").write_text("{")
    document = json.loads((path / "zarr.json").read_text())
    document["consolidated_metadata"]["metadata"]["rows/flags"]["shape"] = [1]
    (path / "zarr.json").write_text(json.dumps(document))
    assert set(failed(path)) == {"groups", "layer_3/codes metadata", "consolidated metadata"}
    shard = (path / "layer_3/codes/c/0/0").stat()
    _, done = repair(path)
    assert done == Repair({}, 0, [])
    assert (path / "layer_3/codes/c/0/0").stat() == shard  # no row is touched
    check_sequences(path, {})


def test_what_repair_cannot_mend_is_left_as_it_is(path: Path) -> None:
    def refused(message: str, kind: type[NLAError] = StoreError) -> None:
        before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
        with pytest.raises(kind, match=message):
            repair(path)
        assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before
        assert os.listdir(path.parent) == ["run.zarr"]

    flip(path / "layer_3/codes/c/0/0", 200)
    with StoreWriter.resume(path, options=OPTIONS):
        refused("another process is writing here")
    (path / "notes.txt").write_text("mine")
    refused("'notes.txt', which is no part of a store")
    (path / "notes.txt").unlink()
    flip(path / "vocabulary/text/c/0", 3)
    refused("vocabulary/text: damaged, and the damage cannot be assigned")
    flip(path / "vocabulary/text/c/0", 3)
    document = json.loads((path / "zarr.json").read_text())
    about = document["attributes"]["nla_engine"]
    about["commit"]["sequences"] -= 1
    about["checksum"] = attributes_checksum(about)
    (path / "zarr.json").write_text(json.dumps(document))
    refused("rows of sequences add up: .* its arrays disagree")


@pytest.mark.parametrize("failing", ["exchange", 1, 2])
def test_a_repair_that_fails_leaves_the_store(
    path: Path, monkeypatch: pytest.MonkeyPatch, failing: str | int
) -> None:
    """The exchange fails; or, where names cannot be exchanged, the first or the second rename does."""
    flip(path / "layer_3/codes/c/0/0", 200)
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    calls, rename = 0, os.rename

    def full(*names: Path) -> bool:
        nonlocal calls
        calls += 1
        if failing in ("exchange", calls):
            raise OSError(28, "No space left on device")
        rename(*names)
        return True

    with monkeypatch.context() as patch:
        patch.setattr(swap, "exchange", full if failing == "exchange" else lambda *_: False)
        patch.setattr(swap.os, "rename", full)
        with pytest.raises(WriteError, match="No space left on device"):
            repair(path)
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before
    assert os.listdir(path.parent) == ["run.zarr"]
    assert repair(path)[1].dropped


def test_the_command(path: Path) -> None:
    assert call("verify", path, "--repair").code == 0
    flip(path / "layer_3/codes/c/0/0", 200)
    assert call("verify", path).code == 1
    done = call("verify", path, "--repair", "--json")
    assert done.code == 0
    result = json.loads(done.out.splitlines()[-1])
    assert result["ok"]
    assert list(result["repair"]["dropped"]) == ["0", "2", "3"]
    assert result["repair"]["rows_lost"] == 235
    assert "3 sequences with 235 rows dropped" in done.out + done.err
    assert call("verify", path).code == 0


@dataclass(frozen=True)
class Contents:
    """All that a store says, to be compared."""

    numbers: list[bytes]

    @classmethod
    def of(cls, path: Path) -> Contents:
        store = CaptureStore.open(path)
        arrays = [store.column(n) for n in ("token_id", "next_token_id", "position", "sequence", "flags")]
        arrays += [store.layer(layer)[:] for layer in store.layers]
        arrays += [store.layer(layer)[[1, 7, 300]] for layer in store.layers]
        said = [
            f"{s.tokens.tolist()} {s.rows} {s.finish} {s.source} {s.text()}" for s in store.iter_sequences()
        ]
        return cls([array.tobytes() for array in arrays] + [text.encode() for text in said])


def remove_file(file: Path, rng: np.random.Generator) -> None:
    file.unlink()


def empty_file(file: Path, rng: np.random.Generator) -> None:
    file.write_bytes(b"")


def directory_instead(file: Path, rng: np.random.Generator) -> None:
    file.unlink()
    file.mkdir()


def cut_file(file: Path, rng: np.random.Generator) -> None:
    file.write_bytes(file.read_bytes()[: rng.integers(file.stat().st_size)])


def lengthen_file(file: Path, rng: np.random.Generator) -> None:
    file.write_bytes(file.read_bytes() + rng.bytes(int(rng.integers(1, 100))))


def flip_bit(file: Path, rng: np.random.Generator) -> None:
    data = bytearray(file.read_bytes())
    data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    file.write_bytes(data)


def scramble(file: Path, rng: np.random.Generator) -> None:
    data = bytearray(file.read_bytes())
    start = int(rng.integers(len(data)))
    data[start : start + 20] = rng.bytes(len(data[start : start + 20]))
    file.write_bytes(data)


KINDS = [remove_file, empty_file, directory_instead, cut_file, lengthen_file, flip_bit, scramble]


def test_fuzzed_files(folder: Path, rng: np.random.Generator) -> None:
    """Files of each kind damaged in each way: reading gives the right values or one line that names the file."""
    whole, path = folder / "whole.zarr", folder / "run.zarr"
    fill_store(whole, CODEC, SIZES, layers=LAYERS, shard_rows=256)
    truth = Contents.of(whole)
    files = sorted(file.relative_to(whole) for file in whole.rglob("*") if file.is_file())
    shutil.copytree(whole, path)
    for number, name in enumerate(files):
        file = path / name
        root = len(name.parts) == 1
        for damage in KINDS if root else rng.choice(KINDS, 2, replace=False):
            damage(file, rng)
            where = f"{damage.__name__} {name}"
            if not same(file, whole / name):
                assert refusal(lambda: must_fail(path), file, where), where
            for use in (Contents.of, resume) if root else ((Contents.of, resume)[number % 2],):
                refusal(lambda use=use: check_same(use(path), truth), file, where)
            shutil.rmtree(path)
            shutil.copytree(whole, path)


def resume(path: Path) -> Contents:
    StoreWriter.resume(path, options=OPTIONS).close()
    return Contents.of(path)


def check_same(contents: Contents, truth: Contents) -> None:
    assert contents == truth


def same(file: Path, other: Path) -> bool:
    """Whether two files say the same (JSON may have another space)."""
    if not file.is_file():
        return False
    if file.name != "zarr.json":
        return file.read_bytes() == other.read_bytes()
    try:
        return json.loads(file.read_bytes()) == json.loads(other.read_bytes())
    except ValueError:
        return False


def must_fail(path: Path) -> None:
    details = failed(path)
    if details:
        raise StoreError(" ".join(details.values()))


def refusal(action: Callable[[], object], file: Path, where: str) -> str:
    """What an action says when it refuses, one line of our own that names the file or its array; else nothing."""
    try:
        action()
        return ""
    except NLAError as error:
        told = str(error)
    assert "\n" not in told, where
    assert str(file) in told or str(file.parent) in told, f"{where}: {told}"
    return told


def test_leftover_temporary_files_do_not_matter(folder: Path, rng: np.random.Generator) -> None:
    sequences = samples()
    path = folder / "run.zarr"
    with create_store(path, CODEC, LAYERS, shard_rows=256) as writer:
        for sequence in sequences[:5]:
            writer.append(sequence)
    for file in [file for file in path.rglob("*") if file.is_file()]:
        file.with_name(file.name + ".tmp").write_bytes(rng.bytes(int(rng.integers(50))))
    assert failed(path) == {}
    with StoreWriter.resume(path, options=OPTIONS) as writer:
        writer.append_many(sequences[5:])
    check_sequences(path, {})
