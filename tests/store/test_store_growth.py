"""What must not grow with a store: work of opening, resuming, sizing, and of reading one sequence."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from store_samples import create_store, fill_store, sample_sequences

from nla_engine.codec.rows import Codec
from nla_engine.store import CaptureStore, StoreWriter
from nla_engine.store.arrays import ArrayReader
from nla_engine.store.sequences import TABLE_BLOCK

OPTIONS = {"seed": 1, "capture": {"layer": 3}}


@pytest.fixture(autouse=True)
def without_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.mark.parametrize("codec", ["int8", "int4", "bf16"])
@pytest.mark.parametrize("sizes", [[], [1], [100, 0, 300], [512]])
def test_the_size_follows_from_the_commit(tmp_path: Path, codec: str, sizes: list[int]) -> None:
    fill_store(tmp_path / "run.zarr", Codec.named(codec, 32), sizes, shard_rows=16, layers=(3, 9))
    files = [file.stat().st_size for file in (tmp_path / "run.zarr").rglob("*") if file.is_file()]
    assert CaptureStore.open(tmp_path / "run.zarr").nbytes == sum(files)


def test_a_writer_looks_into_no_shard_but_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one may have been written anew, and those behind it are stale."""
    codes = tmp_path / "run.zarr" / "layer_3" / "codes" / "c"
    fill_store(tmp_path / "run.zarr", Codec.named("int8", 32), [50], shard_rows=1)
    for stale in ("49/0.tmp", "50/0", "50/0.tmp", "7000/0"):
        (codes / stale).parent.mkdir(exist_ok=True)
        (codes / stale).write_bytes(b"x")
    looked, real = [], Path.rglob

    def rglob(self: Path, pattern: str) -> object:
        looked.append(self)
        return real(self, pattern)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rglob", rglob)
        StoreWriter.resume(tmp_path / "run.zarr", options=OPTIONS).close()
    assert sorted(path.name for path in looked if codes in path.parents) == ["49", "50", "7000"]
    left = [str(path.relative_to(codes)) for path in codes.rglob("*") if path.is_file()]
    assert sorted(left) == sorted(f"{shard}/0" for shard in range(50))


def test_of_the_table_of_sequences_what_is_asked_for_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, codec = 2 * TABLE_BLOCK + 100, Codec.named("int8", 16)
    sequences, _ = sample_sequences(0, codec, (3,), [i % 3 for i in range(count)])
    with create_store(tmp_path / "run.zarr", codec) as writer:
        writer.append_many(sequences)
    read, real = [], ArrayReader.read

    def counted(self: ArrayReader, start: int = 0, stop: int | None = None) -> object:
        if self.spec.path in ("sequences/row_start", "sequences/source_size"):
            read.append((start, stop))
        return real(self, start, stop)

    monkeypatch.setattr(ArrayReader, "read", counted)
    store = CaptureStore.open(tmp_path / "run.zarr")
    assert store.sequence(5000).record == sequences[5000].source
    assert read == [(4096, 8192)] * 2
    assert store.sequence(8191).record == sequences[8191].source
    assert len(read) == 2  # the block stays
    assert store.sequence(8192).tokens.tolist() == sequences[8192].tokens.tolist()
    assert read[2:] == [(8192, 8292)] * 2
    for start, stop in ((0, count), (250, 4100), (4096, 4096), (8191, 8193)):
        found = list(store.iter_sequences(start, stop))
        assert [s.number for s in found] == list(range(start, stop))
        for held, was in zip(found, sequences[start:stop], strict=True):
            assert held.record == was.source
            assert held.tokens.tolist() == was.tokens.tolist()
            assert held.rows.stop - held.rows.start == len(was.position)


COLUMNS = ("token_id", "flags", "sequence", "position")
EXPRESSION = "token == '1' or early and norm > 0 and record.id in [3, 7] or row in [9000] or position > 1"


def test_a_look_at_new_rows_reads_no_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codec, first = Codec.named("int8", 16), 9_000
    sequences, _ = sample_sequences(0, codec, (3,), [2] * 5_000)
    with create_store(tmp_path / "run.zarr", codec) as writer:
        writer.append_many(sequences)
    store = CaptureStore.open(tmp_path / "run.zarr")
    expected, store = store.where(EXPRESSION), CaptureStore.open(tmp_path / "run.zarr")
    starts: dict[str, list[int]] = {}
    real = ArrayReader.read

    def read(self: ArrayReader, start: int = 0, stop: int | None = None) -> object:
        starts.setdefault(self.spec.path, []).append(start)
        return real(self, start, stop)

    monkeypatch.setattr(ArrayReader, "read", read)
    assert store.where(EXPRESSION, first).tolist() == expected[expected >= first].tolist()
    read_of = {name: min(at) for name, at in starts.items() if name.startswith(("rows/", "layer_3/"))}
    assert read_of == dict.fromkeys([*(f"rows/{c}" for c in COLUMNS), "layer_3/norm"], first)
    assert min(starts["sequences/source_start"]) == 4096  # the block of the table with sequence 4,500
    assert len(expected[expected >= first]) > 100
