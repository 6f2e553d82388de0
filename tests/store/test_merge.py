"""Merge: the sequences of all stores in order, bit for bit; runs that differ are refused by what differs."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from commands import call, check_refused
from store_samples import SINK_NORM, VOCABULARY, create_store, fill_old_store, sample_sequences

from nla_engine.codec.rows import Codec
from nla_engine.errors import StoreError
from nla_engine.store import CaptureStore
from nla_engine.store.care.verify import verify
from nla_engine.store.exchange.merge import merge

LAYERS = (3, 9)
OPTIONS = {"seed": 1, "codec": "int8"}


@pytest.fixture(autouse=True)
def without_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr("nla_engine.store.exchange.merge.BLOCK_ROWS", 50)


def store(path: Path, seed: int, sizes: list[int], name: str = "int8", complete: bool = True, **changes):
    codec = Codec.named(name, 32)
    sequences, _ = sample_sequences(seed, codec, LAYERS, sizes)
    arguments = {"options": {**OPTIONS, "prompts": f"prompts {seed}"}, "shard_rows": 16, **changes}
    with create_store(path, codec, LAYERS, **arguments) as writer:
        for layer in LAYERS:
            writer.record_codec_error(layer, {"mean": seed, "p99": seed + 1, "worst": seed + 2, "rows": seed})
        for sequence in sequences:
            writer.append(sequence)
        writer.close(complete)
    return path, sequences


@pytest.mark.parametrize("name", ["int8", "int4", "bf16"])
def test_rows_stay_as_they_are_and_numbers_go_on(tmp_path: Path, name: str) -> None:
    parts = [
        store(tmp_path / "a.zarr", 1, [5, 0, 100, 33], name),
        store(tmp_path / "b.zarr", 2, [0], name),
        store(tmp_path / "c.zarr", 3, [40, 1, 70], name, sink_norm={3: SINK_NORM, 9: 2 * SINK_NORM}),
    ]
    merged = merge([path for path, _ in parts], tmp_path / "out.zarr")
    given = [sequence for _, sequences in parts for sequence in sequences]
    assert (merged.sequences, merged.rows, merged.complete) == (len(given), 249, True)
    assert all(check.ok for check in verify(tmp_path / "out.zarr"))
    for number, (was, now) in enumerate(zip(given, merged.iter_sequences(), strict=True)):
        assert now.number == number
        assert now.tokens.tolist() == was.tokens.tolist()
        assert (now.prompt_size, now.finish, now.record) == (was.prompt_size, was.finish, was.source)
        for column in ("token_id", "next_token_id", "position", "flags"):
            assert merged.column(column)[now.rows].tolist() == getattr(was, column).tolist()
        for layer in LAYERS:
            stored = merged.layer(layer).encoded(now.rows.start, now.rows.stop)
            for field in ("codes", "scales", "norm", "exact_index", "exact"):
                assert getattr(stored, field).tobytes() == getattr(was.layers[layer], field).tobytes()
    assert merged.column("sequence").tolist() == np.repeat(np.arange(8), merged.row_sizes()).tolist()
    assert merged.sink_norm == {3: SINK_NORM, 9: 2 * SINK_NORM}
    assert merged.codec_error[3] == {"mean": pytest.approx(14 / 6), "p99": 4, "worst": 5, "rows": 6}
    origins = merged.provenance["merged_from"]
    assert [origin["options"]["prompts"] for origin in origins] == ["prompts 1", "prompts 2", "prompts 3"]
    again = merge(
        [tmp_path / "out.zarr", store(tmp_path / "d.zarr", 4, [7], name)[0]], tmp_path / "more.zarr"
    )
    assert again.rows == 256


def test_an_unfinished_store_leaves_an_unfinished_one(tmp_path: Path) -> None:
    first, second = (
        store(tmp_path / "a.zarr", 1, [5])[0],
        store(tmp_path / "b.zarr", 2, [6], complete=False)[0],
    )
    assert not merge([first, second], tmp_path / "out.zarr").complete


def test_narrow_shards_may_differ(tmp_path: Path) -> None:
    """Those of the result are those of a new store."""
    old, new = tmp_path / "old.zarr", store(tmp_path / "new.zarr", 1, [300])[0]
    fill_old_store(old, Codec.named("int8", 32), [40, 7], layers=LAYERS, options=OPTIONS, shard_rows=16)
    merged = merge([old, new], tmp_path / "out.zarr")
    assert (merged.rows, merged.attributes["narrow_shard_rows"]) == (347, 256)
    for part, start in ((CaptureStore.open(old), 0), (CaptureStore.open(new), 47)):
        rows = merged.layer(9).encoded(start, start + part.rows)
        assert rows.scales.tobytes() == part.layer(9).encoded().scales.tobytes()
    assert all(check.ok for check in verify(tmp_path / "out.zarr"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options": {**OPTIONS, "seed": 2}}, "seed was 1, is now 2"),
        ({"options": {**OPTIONS, "more": 2}}, "more was absent, is now 2"),
        ({"name": "int4"}, 'codec.name was "int8", is now "int4"'),
        ({"shard_rows": 32}, "shard_rows was 16, is now 32"),
        ({"vocabulary": [*VOCABULARY[:-1], b"x"]}, "the content of vocabulary.text differs"),
    ],
)
def test_other_parameters_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    first, second = store(tmp_path / "a.zarr", 1, [5])[0], store(tmp_path / "b.zarr", 2, [6], **changes)[0]
    with pytest.raises(StoreError, match=message):
        merge([first, second], tmp_path / "out.zarr")
    assert not (tmp_path / "out.zarr").exists()


def test_what_cannot_be_merged(tmp_path: Path) -> None:
    path = store(tmp_path / "a.zarr", 1, [5])[0]
    other = store(tmp_path / "b.zarr", 2, [5])[0]
    with pytest.raises(StoreError, match="two or more"):
        merge([path], tmp_path / "out.zarr")
    with pytest.raises(StoreError, match="is given twice"):
        merge([path, other, path], tmp_path / "out.zarr")
    with pytest.raises(StoreError, match="one of the stores to merge"):
        merge([path, other], other, overwrite=True)
    with pytest.raises(StoreError, match="no such store"):
        merge([path, tmp_path / "none.zarr"], tmp_path / "out.zarr")


def test_the_command(tmp_path: Path) -> None:
    paths = [store(tmp_path / "a.zarr", 1, [5, 4])[0], store(tmp_path / "b.zarr", 2, [6])[0]]
    ran = call("merge", *paths, "--out", tmp_path / "out.zarr", "--json")
    assert ran.code == 0, ran.err
    assert (ran.json["rows"], ran.json["sequences"], ran.json["complete"]) == (15, 3, True)
    check_refused(call("merge", *paths, "--out", tmp_path / "out.zarr"), "out.zarr exists")
    assert call("merge", *paths, "--out", tmp_path / "out.zarr", "--overwrite").code == 0
