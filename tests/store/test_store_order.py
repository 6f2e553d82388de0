"""Sequences in any order: each is there once, under its number, whatever was stored before it."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from commands import call
from store_samples import create_store, fill_old_store, sample_sequences, shuffled

from nla_engine.codec.rows import Codec
from nla_engine.errors import StoreError
from nla_engine.store import CaptureStore, SequenceRows, StoreWriter
from nla_engine.store import sequences as table
from nla_engine.store.care.repair import repair
from nla_engine.store.care.verify import verify
from nla_engine.store.exchange.merge import merge

CODEC = Codec.named("int8", 16)
OPTIONS = {"seed": 1, "capture": {"layer": 3}}


@pytest.fixture(autouse=True)
def without_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def check_sequence(store: CaptureStore, given: SequenceRows) -> None:
    """One sequence, bit for bit."""
    assert given.number is not None
    stored = store.sequence(given.number)
    assert (stored.number, stored.record) == (given.number, given.source)
    assert stored.tokens.tolist() == given.tokens.tolist()
    assert (store.column("sequence")[stored.rows] == given.number).all()
    for name in ("token_id", "next_token_id", "position", "flags"):
        assert store.column(name)[stored.rows].tolist() == getattr(given, name).tolist()
    rows = store.layer(3).encoded(stored.rows.start, stored.rows.stop)
    for name, wanted in vars(given.layers[3]).items():
        assert getattr(rows, name).tobytes() == wanted.tobytes(), name


def fill(path: Path, sequences: list[SequenceRows], rng: np.random.Generator, **how: object) -> CaptureStore:
    """A store of these, appended some at a time."""
    writer = create_store(path, CODEC, shard_rows=8, **how)
    with writer:
        while sequences:
            size = int(rng.integers(1, 9))
            writer.append_many(sequences[:size])
            sequences = sequences[size:]
            if rng.random() < 0.3:
                writer.commit()
    return CaptureStore.open(path)


def test_readers_see_the_order_of_the_numbers(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole or with gaps, and with tables and blocks that are smaller than the store."""
    monkeypatch.setattr(table, "BLOCK_SEQUENCES", 7)
    monkeypatch.setattr(table, "_BLOCKS_HELD", 1)
    given, _ = sample_sequences(int(rng.integers(1000)), CODEC, (3,), rng.integers(0, 9, 60).tolist())
    for count in (60, 33):
        ended = shuffled(given, rng)[:count]
        store = fill(tmp_path / f"{count}.zarr", ended, rng)
        numbers = sorted(each.number for each in ended)
        assert store.numbers.tolist() == numbers and all(check.ok for check in verify(store.path))
        for each in ended:
            check_sequence(store, each)
        assert [each.number for each in store.iter_sequences()] == numbers
        assert [each.number for each in store.iter_sequences(10, 30)] == [n for n in numbers if 10 <= n < 30]
        some = rng.choice(numbers, 20).tolist()
        found = list(store.some_sequences(some))
        assert [each.number for each in found] == some
        assert all(each.record == given[each.number].source for each in found)
        for absent in {*range(60)} - {*numbers} | {-1, 60}:
            with pytest.raises(IndexError, match=f"sequence {absent} is not among the {count} of"):
                store.sequence(absent)
        rows = store.where(f"sequence == {numbers[3]}")
        assert rows.tolist() == list(range(*store.sequence(numbers[3]).rows.indices(store.rows)))
        told = store.column("record.id")
        assert all(
            told[row] == json.loads(given[n].source)["id"] for row, n in enumerate(store.column("sequence"))
        )
        half = store.rows // 2
        assert store.where("record.id >= 50", half).tolist() == [
            r for r in range(half, store.rows) if told[r] >= 50
        ]


def test_what_bare_zarr_shows(tmp_path: Path, rng: np.random.Generator) -> None:
    given, _ = sample_sequences(3, Codec.named("bf16", 16), (3,), [4, 0, 7, 1])
    order = rng.permutation(4).tolist()
    with create_store(tmp_path / "run.zarr", Codec.named("bf16", 16)) as writer:
        for number in order:
            writer.append(replace(given[number], number=number))
    root = zarr.open_group(tmp_path / "run.zarr", mode="r")
    assert root.attrs["nla_engine"]["format_version"] == 2
    assert root["sequences/number"][:].tolist() == order
    assert np.array_equal(
        np.repeat(root["sequences/number"][:], root["sequences/row_size"][:]), root["rows/sequence"][:]
    )
    position = [root["rows/position"][:][root["rows/sequence"][:] == n].tolist() for n in range(4)]
    assert position == [each.position.tolist() for each in given]


def test_a_number_is_taken_once(tmp_path: Path) -> None:
    given, _ = sample_sequences(1, CODEC, (3,), [2, 3, 4, 5])
    with create_store(tmp_path / "run.zarr", CODEC) as writer:
        writer.append(replace(given[0], number=5))
        for wrong, fault in (
            ([5], "sequence 5 is in the store already"),
            ([7, 7], "sequence 7 is in the store already"),
            ([8, -1], "sequence -1: numbers are counted from 0"),
        ):
            with pytest.raises(StoreError, match=fault):
                writer.append_many([replace(given[1], number=number) for number in wrong])
        writer.append(given[2])  # after the highest, and all of what was refused is free
        writer.append(replace(given[3], number=0))
        assert writer.missing(9).tolist() == [1, 2, 3, 4, 7, 8]
    with StoreWriter.resume(tmp_path / "run.zarr", options=OPTIONS) as writer:
        assert writer.missing(9).tolist() == [1, 2, 3, 4, 7, 8]
        with pytest.raises(StoreError, match="sequence 6 is in the store already"):
            writer.append(replace(given[1], number=6))
    assert CaptureStore.open(tmp_path / "run.zarr").numbers.tolist() == [0, 5, 6]


def test_stopped_and_resumed_in_other_orders(tmp_path: Path, rng: np.random.Generator) -> None:
    """Each run ends others first, and is stopped after some of them: in the end each is there once."""
    given, _ = sample_sequences(int(rng.integers(1000)), CODEC, (3,), rng.integers(0, 12, 40).tolist())
    path, ended = tmp_path / "run.zarr", shuffled(given, rng)
    create_store(path, CODEC, shard_rows=8).close(complete=False)
    runs = 0
    while True:
        with StoreWriter.resume(path, options=OPTIONS) as writer:
            missing = writer.missing(40).tolist()
            if not missing:
                break
            todo = [each for each in shuffled(given, rng) if each.number in missing]
            some = int(rng.integers(1, 15))
            writer.append_many(todo[:some])
            writer.commit()
            if len(todo) > some:
                writer.append_many(todo[-1:])  # lost: it is not committed
                writer._queue.join()
                writer._usable = False
        runs += 1
    store = CaptureStore.open(path)
    assert runs > 2 and store.numbers.tolist() == list(range(40))
    assert all(check.ok for check in verify(path))
    for each in ended:
        check_sequence(store, each)


def test_an_old_store_is_read_and_resumed_in_any_order(tmp_path: Path, rng: np.random.Generator) -> None:
    path, sizes = tmp_path / "run.zarr", [3, 0, 9, 5]
    fill_old_store(path, CODEC, sizes)
    given, _ = sample_sequences(0, CODEC, (3,), sizes)
    more, _ = sample_sequences(1, CODEC, (3,), [4, 6])
    old = CaptureStore.open(path)
    assert old.numbers.tolist() == [0, 1, 2, 3] and old.attributes["format_version"] == 1
    assert all(check.ok for check in verify(path))
    before = (path / "zarr.json").read_bytes()
    with StoreWriter.resume(path, options=OPTIONS) as writer:
        assert writer.missing(6).tolist() == [4, 5]
        for number in (5, 4):
            writer.append(replace(more[number - 4], number=number))
    store = CaptureStore.open(path)
    assert store.attributes["format_version"] == 2 and store.numbers.tolist() == list(range(6))
    assert all(check.ok for check in verify(path))
    for number, each in enumerate([*given, *more]):
        check_sequence(store, replace(each, number=number))
    assert zarr.open_group(path, mode="r")["sequences/number"][:].tolist() == [0, 1, 2, 3, 5, 4]
    (path / "zarr.json").write_bytes(before)  # as if killed before the first commit of the new format
    with StoreWriter.resume(path, options=OPTIONS):
        pass
    store = CaptureStore.open(path)
    assert store.numbers.tolist() == [0, 1, 2, 3] and all(check.ok for check in verify(path))


def test_merged_parts_keep_their_order(tmp_path: Path, rng: np.random.Generator) -> None:
    """Of an unfinished part the numbers that are missing stay free."""
    a, _ = sample_sequences(1, CODEC, (3,), rng.integers(0, 9, 12).tolist())
    b, _ = sample_sequences(2, CODEC, (3,), rng.integers(0, 9, 9).tolist())
    ended = [each for each in shuffled(a, rng) if each.number not in (4, 7)]
    fill(tmp_path / "a.zarr", ended, rng)
    fill(tmp_path / "b.zarr", shuffled(b, rng), rng)
    fill_old_store(tmp_path / "c.zarr", CODEC, [3, 0, 2], shard_rows=8)
    c, _ = sample_sequences(0, CODEC, (3,), [3, 0, 2])
    store = merge([tmp_path / f"{name}.zarr" for name in "abc"], tmp_path / "out.zarr")
    assert all(check.ok for check in verify(store.path))
    wanted = {each.number: each for each in ended}
    wanted |= {12 + n: replace(each, number=12 + n) for n, each in enumerate([*b, *c])}
    assert store.numbers.tolist() == sorted(wanted)
    for each in wanted.values():
        check_sequence(store, each)


@pytest.mark.parametrize("to", ["parquet", "safetensors"])
def test_exported_rows_come_back_under_their_numbers(
    to: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    given, _ = sample_sequences(1, CODEC, (3,), rng.integers(1, 9, 12).tolist())
    ended = shuffled(given, rng)[:9]
    store = fill(tmp_path / "run.zarr", [*ended, replace(given[0], number=1 << 40)], rng)
    for command in (
        ("export", store.path, "--to", to, "--out", tmp_path / f"rows.{to}"),
        ("import", tmp_path / f"rows.{to}", "--out", tmp_path / "back.zarr", "--layer", 3),
    ):
        ran = call(*command)
        assert ran.code == 0, ran.err
    back = CaptureStore.open(tmp_path / "back.zarr")
    assert all(check.ok for check in verify(back.path))
    assert back.numbers.tolist() == store.numbers.tolist()
    for column in ("sequence", "position", "token_id"):
        assert back.column(column).tolist() == store.column(column).tolist()


def damage(path: Path, array: str, place: int = 3) -> None:
    file = path / array / "c" / "0"
    data = bytearray(file.read_bytes())
    data[place] ^= 16
    file.write_bytes(data)


def test_repair_restores_numbers_and_keeps_them(tmp_path: Path, rng: np.random.Generator) -> None:
    given, _ = sample_sequences(7, CODEC, (3,), rng.integers(1, 9, 30).tolist())
    ended = shuffled(given, rng)[:25]
    path = tmp_path / "run.zarr"
    fill(path, ended, rng)
    shutil.copytree(path, tmp_path / "copy.zarr")
    for array in ("sequences/number", "rows/sequence", "sequences/row_start", "sequences/row_size"):
        shutil.rmtree(path)
        shutil.copytree(tmp_path / "copy.zarr", path)
        damage(path, array)
        if array == "sequences/row_size":
            damage(path, "sequences/row_start")
        assert not all(check.ok for check in verify(path))
        _, done = repair(path)
        assert done is not None and not done.dropped and array in done.restored
        assert all(check.ok for check in verify(path))
        store = CaptureStore.open(path)
        assert store.numbers.tolist() == sorted(each.number for each in ended)
        for each in ended:
            check_sequence(store, each)
    codes = path / "layer_3/codes/c/0/0"
    data = bytearray(codes.read_bytes())
    data[5] ^= 1
    codes.write_bytes(data)
    lost, rows = set(), 0
    for stored in sorted(CaptureStore.open(path).iter_sequences(), key=lambda each: each.rows.start):
        if stored.rows.start < 8:  # a shard, and a chunk, has 8 rows
            lost.add(stored.number)
            rows += stored.rows.stop - stored.rows.start
    shown = next(check.detail for check in verify(path) if check.name == "damaged sequences")
    assert shown == f"{len(lost)} sequences: {', '.join(map(str, sorted(lost)))}"
    _, done = repair(path)
    assert done is not None and list(done.dropped) == sorted(lost) and done.rows_lost == rows
    store = CaptureStore.open(path)
    assert [int(number) for number in store.attributes["dropped"]] == sorted(lost)
    for each in ended:
        if each.number not in lost:
            check_sequence(store, each)


def test_a_number_that_nothing_else_tells_is_not_guessed(tmp_path: Path, rng: np.random.Generator) -> None:
    given, _ = sample_sequences(7, CODEC, (3,), [2, 0, 3])
    fill(tmp_path / "run.zarr", shuffled(given, rng), rng)
    damage(tmp_path / "run.zarr", "sequences/number")
    with pytest.raises(StoreError, match="sequences/number: damaged, and the damage cannot be assigned"):
        repair(tmp_path / "run.zarr")


def test_numbers_that_are_there_twice_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, _ = sample_sequences(7, CODEC, (3,), [2, 1, 3])
    path = tmp_path / "run.zarr"
    with monkeypatch.context() as patch:
        patch.setattr("nla_engine.store.numbers.Numbers.check", lambda *_: None)
        with create_store(path, CODEC) as writer:
            writer.append_many([replace(each, number=n) for each, n in zip(given, (1, 0, 1), strict=True)])
    failed = [check.name for check in verify(path) if not check.ok]
    assert failed == ["numbers of sequences are there once"]
    with pytest.raises(StoreError, match="two sequences have one number"):
        StoreWriter.resume(path, options=OPTIONS)


def test_info_says_how_many_are_done(tmp_path: Path, rng: np.random.Generator) -> None:
    given, _ = sample_sequences(7, CODEC, (3,), [2, 1, 3, 2])
    ended = [replace(given[n], number=n) for n in (3, 1)]
    provenance = {"model": "sample", "sequences_asked": 4}
    writer = create_store(tmp_path / "run.zarr", CODEC, provenance=provenance)
    writer.append_many(ended)
    writer.close(complete=False)
    assert "2 of 4" in call("info", tmp_path / "run.zarr").out
