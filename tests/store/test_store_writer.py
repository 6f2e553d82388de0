"""Writers: one at a time, resumed with the same options only, and harmless to what is not theirs."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from store_samples import SINK_NORM, VOCABULARY, create_store, fill_store, sample_sequences

from nla_engine.codec.rows import Codec
from nla_engine.errors import StoreError, WriteError
from nla_engine.store import CaptureStore, SequenceRows, StoreWriter, arrays, writer
from nla_engine.store.manifest import differences
from nla_engine.store.shards import ShardImage

CODEC = Codec.named("int8", 16)
OPTIONS = {"seed": 1, "capture": {"layer": 3}}


@pytest.fixture(autouse=True)
def without_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    with create_store(path, CODEC):
        with pytest.raises(StoreError, match="another process is writing"):
            StoreWriter.resume(path, options=OPTIONS)
        with pytest.raises(StoreError, match="another process is writing"):
            create_store(path, CODEC, overwrite=True)
        code = "import pathlib, sys; from nla_engine.store.lease import Lease; "
        code += f"Lease.of_directory(pathlib.Path({str(path)!r}))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert f"another process is writing here (process {os.getpid()} on " in done.stderr
    StoreWriter.resume(path, options=OPTIONS).close()
    assert CaptureStore.open(path).commit.epoch == 2


def test_other_options_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    fill_store(path, CODEC, [3])
    before = (path / "zarr.json").read_bytes()
    with pytest.raises(StoreError) as caught:
        StoreWriter.resume(path, options={"seed": 2, "capture": {"layer": 4}, "dtype": "bfloat16"})
    for line in (
        "seed was 1, is now 2",
        "capture.layer was 3, is now 4",
        'dtype was absent, is now "bfloat16"',
    ):
        assert line in str(caught.value)
    prints = [{"prompts": f"{number:016x}"} for number in (10, 11)]
    assert differences(*prints) == ["the content of prompts differs"]
    assert differences({"a": None}, {}) == ["a was not given, is now absent"]
    assert (path / "zarr.json").read_bytes() == before
    with StoreWriter.resume(path, options=OPTIONS) as resumed:
        assert (resumed.sequences, resumed.rows) == (1, 3)
        assert (resumed.sink_norm, resumed.codec, resumed.layers) == ({3: SINK_NORM}, CODEC, (3,))


def test_resuming_a_complete_store_marks_it_incomplete_until_closed(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    fill_store(path, CODEC, [3])
    resumed = StoreWriter.resume(path, options=OPTIONS)
    assert not CaptureStore.open(path).complete
    resumed.close()
    resumed.close()
    assert CaptureStore.open(path).complete


def test_an_existing_store_is_kept_or_replaced_as_told(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    fill_store(path, CODEC, [3])
    with pytest.raises(StoreError, match=r"exists: pass --overwrite to replace it"):
        create_store(path, CODEC)
    store = CaptureStore.open(path)
    assert store.rows == 3
    create_store(path, CODEC, overwrite=True).close()
    assert CaptureStore.open(path).rows == 0
    with pytest.raises(StoreError, match="was replaced by another one"):
        store.refresh()
    assert os.listdir(tmp_path) == ["run.zarr"]


def foreign_zarr(path: Path) -> None:
    zarr.create_group(path).create_array("x", shape=(3,), dtype="i4")


def broken_store(path: Path) -> None:
    fill_store(path, CODEC, [3])
    (path / "zarr.json").write_text("{")


def store_with_notes(path: Path) -> None:
    fill_store(path, CODEC, [3])
    (path / "notes.txt").write_text("mine")


def plain_directory(path: Path) -> None:
    path.mkdir()
    (path / "thesis.tex").write_text("mine")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (foreign_zarr, "without 'nla_engine' attributes"),
        (broken_store, "broken JSON"),
        (store_with_notes, "notes.txt"),
        (plain_directory, "not a Zarr store"),
        (lambda path: path.write_text("mine"), "a file is in the way"),
    ],
)
def test_overwrite_spares_what_is_not_a_store(tmp_path: Path, make, message: str) -> None:
    path = tmp_path / "run.zarr"
    make(path)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(StoreError, match=message):
        create_store(path, CODEC, overwrite=True)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_an_empty_directory_and_a_link_are_good_places(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    create_store(tmp_path / "empty", CODEC).close()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    create_store(tmp_path / "link", CODEC, overwrite=True).close()
    assert (tmp_path / "link").is_symlink()
    create_store(tmp_path / "new" / "deep" / "run.zarr", CODEC).close()


def test_leftovers_of_a_killed_creation_do_not_matter(tmp_path: Path) -> None:
    fill_store(tmp_path / "run.zarr", CODEC, [2])
    fill_store(tmp_path / ".run.zarr.nla-new", CODEC, [1])
    fill_store(tmp_path / ".run.zarr.nla-old", CODEC, [1])
    create_store(tmp_path / "run.zarr", CODEC, overwrite=True).close()
    assert os.listdir(tmp_path) == ["run.zarr"]


def test_a_failed_creation_leaves_the_old_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.zarr"
    fill_store(path, CODEC, [3])

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(WriteError, match="No space left on device"):
            create_store(path, CODEC, overwrite=True)
    assert os.listdir(tmp_path) == ["run.zarr"]
    assert CaptureStore.open(path).rows == 3


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_readonly_directory(tmp_path: Path) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        with pytest.raises(WriteError, match="Permission denied"):
            create_store(tmp_path / "run.zarr", CODEC)
    finally:
        tmp_path.chmod(stat.S_IRWXU)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sink_norm": {4: 1.0}}, "sink_norm is given for layers"),
        ({"sink_norm": {3: float("nan")}}, "sink_norm is NaN"),
        ({"layers": ()}, "layers"),
        ({"layers": (3, 3)}, "layers"),
        ({"shard_rows": 100}, "shard_rows 100 is not a power of two"),
        ({"provenance": {"x": float("nan")}}, "provenance cannot be written as JSON"),
        ({"options": {"x": object()}}, "options cannot be written as JSON"),
    ],
)
def test_unfit_arguments_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        create_store(tmp_path / "run.zarr", CODEC, **change)
    assert os.listdir(tmp_path) == []


def test_an_unfit_sequence_leaves_the_writer_usable(tmp_path: Path) -> None:
    sequences, _ = sample_sequences(0, CODEC, (3,), [3, 4])
    others, _ = sample_sequences(0, CODEC, (4,), [3])
    with create_store(tmp_path / "run.zarr", CODEC) as open_writer:
        open_writer.append(sequences[0])
        with pytest.raises(StoreError, match=r"^sequence 1: layers \[4\] were given, the store holds \[3\]"):
            open_writer.append(others[0])
        with pytest.raises(StoreError, match="layer 4 is not in the store"):
            open_writer.record_codec_error(4, {})
        open_writer.append(sequences[1])
    assert CaptureStore.open(tmp_path / "run.zarr").rows == 7


@pytest.mark.parametrize("layers", [(3,), (0, 20)])
@pytest.mark.parametrize("by_the_queue", [False, True])
def test_a_group_of_sequences_is_those_sequences(
    tmp_path: Path, layers: tuple[int, ...], by_the_queue: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = ShardImage.put

    def late(*given) -> None:
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.02)
        put(*given)

    if by_the_queue:  # who copies a large shard
        monkeypatch.setattr(arrays, "_COPIED_BY_QUEUE_BYTES", 0)
        monkeypatch.setattr(ShardImage, "put", late)
    sequences, _ = sample_sequences(0, CODEC, layers, [3, 0, 40, 1, 0, 0, 17, 8, 30])
    with create_store(tmp_path / "one.zarr", CODEC, layers, shard_rows=4) as one:
        for sequence in sequences:
            one.append(sequence)
    with create_store(tmp_path / "many.zarr", CODEC, layers, shard_rows=4) as many:
        many.append_many([])
        given: list[SequenceRows] = []
        for start, stop, wait in ((0, 1, True), (1, 7, True), (7, 8, False), (8, 9, False)):
            given += [copied(sequence) for sequence in sequences[start:stop]]
            many.append_many(given[start - stop :], wait=wait)
            if stop == 9:
                many.wait_until_copied()
            if wait or stop == 9:  # the caller's arrays are the caller's again
                for sequence in given:
                    for rows in sequence.layers.values():
                        rows.codes[:] = 99
    assert CaptureStore.open(tmp_path / "many.zarr").rows == 99
    for file in (tmp_path / "one.zarr").rglob("c/**/*"):
        if file.is_file():
            other = tmp_path / "many.zarr" / file.relative_to(tmp_path / "one.zarr")
            assert file.read_bytes() == other.read_bytes(), file


def test_copies_are_waited_for_when_writing_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What no thread will copy any more, because its shard will not be written, is nobody's to wait for."""

    def full(image: ShardImage, path: Path, rows: int) -> None:
        time.sleep(0.05)
        raise WriteError(f"{path}: no space left")

    sequences, _ = sample_sequences(0, CODEC, (3,), [8] * 30)
    open_writer = create_store(tmp_path / "run.zarr", CODEC, shard_rows=8)
    monkeypatch.setattr(arrays, "_COPIED_BY_QUEUE_BYTES", 0)
    monkeypatch.setattr(ShardImage, "write", full)
    with pytest.raises(WriteError, match="no space left"), open_writer:
        open_writer.append_many(sequences, wait=False)
    waiting = threading.Thread(target=open_writer.wait_until_copied, daemon=True)
    waiting.start()
    waiting.join(200)
    assert not waiting.is_alive()


def copied(sequence: SequenceRows) -> SequenceRows:
    layers = {layer: replace(rows, codes=rows.codes.copy()) for layer, rows in sequence.layers.items()}
    return replace(sequence, layers=layers)


def test_an_unfit_sequence_refuses_its_whole_group(tmp_path: Path) -> None:
    sequences, _ = sample_sequences(0, CODEC, (3,), [3, 4, 5])
    unfit = replace(sequences[1], token_id=sequences[1].token_id + np.int32(1))
    with create_store(tmp_path / "run.zarr", CODEC) as open_writer:
        open_writer.append(sequences[0])
        with pytest.raises(StoreError, match="^sequence 2: token_id does not hold"):
            open_writer.append_many([sequences[2], unfit])
        open_writer.append_many(sequences[1:])
    assert CaptureStore.open(tmp_path / "run.zarr").column("sequence").tolist() == [0] * 3 + [1] * 4 + [2] * 5


def test_it_commits_by_time_and_by_filled_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sequences, _ = sample_sequences(0, CODEC, (3,), [3, 3, 3, 3, 3])
    now = 100.0
    monkeypatch.setattr(writer.time, "monotonic", lambda: now)
    with create_store(tmp_path / "run.zarr", CODEC, shard_rows=8, commit_seconds=30.0) as open_writer:
        open_writer.append(sequences[0])
        assert open_writer.sequences == 0
        now += 30.0
        open_writer.append(sequences[1])
        assert open_writer.sequences == 2
        now += 1.0
        open_writer.append(sequences[2])  # row 8 is written: a shard is full
        assert open_writer.sequences == 3
        now += 29.0
        open_writer.append(sequences[3])
        assert open_writer.sequences == 3
        open_writer.commit()
        assert open_writer.sequences == 4
        before = (tmp_path / "run.zarr" / "zarr.json").stat()
        open_writer.commit()  # nothing new
        assert (tmp_path / "run.zarr" / "zarr.json").stat().st_ino == before.st_ino


def test_without_waiting_a_filled_shard_is_committed_by_the_next_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences that end together are all handed to the disk before anything waits for it."""
    sequences, _ = sample_sequences(0, CODEC, (3,), [8, 8, 3, 3])
    now = 100.0
    monkeypatch.setattr(writer.time, "monotonic", lambda: now)
    with create_store(tmp_path / "run.zarr", CODEC, shard_rows=8, commit_seconds=30.0) as open_writer:
        now += 5.0
        open_writer.append_many(sequences[:1], wait=False)
        open_writer.append_many(sequences[1:2], wait=False)
        open_writer.wait_until_copied()
        assert open_writer.sequences == 0
        open_writer.commit_if_due()
        assert open_writer.sequences == 2
        now += 29.0
        open_writer.append_many(sequences[2:3], wait=False)
        open_writer.commit_if_due()  # nothing has filled since
        assert open_writer.sequences == 2 and not open_writer.is_overdue
        now += 1.0
        assert open_writer.is_overdue
        open_writer.append_many(sequences[3:], wait=False)
        assert open_writer.sequences == 2  # left to the caller


def test_a_large_vocabulary_and_long_sequences_cross_shards(tmp_path: Path) -> None:
    vocabulary = [b"%d" % i for i in range(200_000)]
    codec = Codec.named("bf16", 2)
    sequences, vectors = sample_sequences(0, codec, (3,), [70_000, 5])
    with create_store(tmp_path / "run.zarr", codec, vocabulary=vocabulary) as open_writer:
        for sequence in sequences:
            open_writer.append(sequence)
    store = CaptureStore.open(tmp_path / "run.zarr")
    assert store.token_text([199_999, 65_536, -1, 200_000]) == ["199999", "65536", "", ""]
    assert store.sequence(1).tokens.tolist() == sequences[1].tokens.tolist()
    picked = np.array([69_999, 0, 4096, 4095, 70_004])
    wanted = vectors[3][picked]
    np.testing.assert_allclose(store.layer(3)[picked], wanted, rtol=0.01)
    assert len(VOCABULARY) < len(store.vocabulary)
    assert json.loads((tmp_path / "run.zarr/zarr.json").read_text())["node_type"] == "group"
