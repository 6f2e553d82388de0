"""Exports, read back with the tools they are for."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors import safe_open
from store_samples import fill_store

from nla_engine.codec.rows import Codec
from nla_engine.errors import RequestError, StoreError, WriteError
from nla_engine.store import CaptureStore, RowFlag
from nla_engine.store.exchange.export import export
from nla_engine.store.views.dataset import RowDataset, ShuffledRows
from nla_engine.store.views.labelled import open_dataset

SIZES = [5, 0, 100, 33]
WHERE = "position > 3 and not nonfinite"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CaptureStore:
    """Two layers; batches of 16 rows, so that every export takes several."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr(sys.modules[export.__module__], "BATCH_BYTES", 16 * 4 * 24)
    fill_store(tmp_path / "run.zarr", Codec.named("int4", 24), SIZES, layers=(3, 9))
    return CaptureStore.open(tmp_path / "run.zarr")


@pytest.mark.parametrize("where", [None, WHERE])
@pytest.mark.parametrize("layer", [3, 9])
def test_parquet(store: CaptureStore, tmp_path: Path, where: str | None, layer: int) -> None:
    out = tmp_path / "out.parquet"
    rows = np.arange(store.rows) if where is None else store.where(where)
    assert export(store, "parquet", out, layer=layer, where=where) == len(rows)
    table = pq.read_table(out)
    assert table.schema.field("activation_vector").type.list_size == 24
    vectors = table["activation_vector"].combine_chunks().flatten().to_numpy().reshape(-1, 24)
    np.testing.assert_array_equal(vectors, store.layer(layer)[rows])
    assert table["row"].to_pylist() == rows.tolist()
    for name in ("sequence", "position", "token_id", "next_token_id"):
        assert table[name].to_pylist() == store.column(name)[rows].tolist()
    for name in ("token", "next_token"):
        assert table[name].to_pylist() == store.token_text(store.column(f"{name}_id")[rows])
    for flag in RowFlag:
        assert table[flag.name.lower()].to_pylist() == (store.column("flags")[rows] & flag != 0).tolist()
    np.testing.assert_array_equal(table["norm"].to_numpy(), store.layer(layer).norm()[rows])
    assert table.schema.metadata[b"layer"] == str(layer).encode()
    assert json.loads(table.schema.metadata[b"nla_engine"])["provenance"] == {"model": "sample"}
    assert pq.ParquetFile(out).num_row_groups > 1


@pytest.mark.parametrize("where", [None, WHERE])
def test_safetensors(store: CaptureStore, tmp_path: Path, where: str | None) -> None:
    out = tmp_path / "out.safetensors"
    rows = np.arange(store.rows) if where is None else store.where(where)
    assert export(store, "safetensors", out, layer=9, where=where) == len(rows)
    with safe_open(out, "np") as file:
        assert sorted(file.keys()) == [
            "activation",
            "next_token_id",
            "position",
            "record.id",
            "row",
            "sequence",
            "token_id",
        ]
        np.testing.assert_array_equal(file.get_tensor("activation"), store.layer(9)[rows])
        assert file.get_tensor("row").tolist() == rows.tolist()
        ids = [store.sequence(n).source["id"] for n in store.column("sequence")[rows]]
        assert file.get_tensor("record.id").tolist() == ids
        for name in ("sequence", "position", "token_id", "next_token_id"):
            assert file.get_tensor(name).dtype == store.column(name).dtype
            assert file.get_tensor(name).tolist() == store.column(name)[rows].tolist()
        assert json.loads(file.metadata()["nla_engine"])["d_model"] == 24
        assert file.metadata()["layer"] == "9"


@pytest.mark.parametrize("where", [None, WHERE])
def test_npy(store: CaptureStore, tmp_path: Path, where: str | None) -> None:
    out = tmp_path / "out.npy"
    rows = np.arange(store.rows) if where is None else store.where(where)
    assert export(store, "npy", out, where=where, layer=3) == len(rows)
    values = np.load(out, mmap_mode="r")
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, store.layer(3)[rows])


def test_existing_output_is_kept_unless_told(store: CaptureStore, tmp_path: Path) -> None:
    out = tmp_path / "out.npy"
    out.write_text("mine")
    with pytest.raises(StoreError, match="exists: pass --overwrite"):
        export(store, "npy", out, layer=3)
    assert out.read_text() == "mine"
    export(store, "npy", out, overwrite=True, layer=3)
    assert np.load(out).shape == (sum(SIZES), 24)
    with pytest.raises(StoreError, match="a directory, which is never replaced"):
        export(store, "npy", tmp_path, overwrite=True, layer=3)


def test_requests_that_cannot_be_met(store: CaptureStore, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RequestError, match="'csv' is unknown: choose one of parquet"):
        export(store, "csv", out, layer=3)
    with pytest.raises(StoreError, match="no row fits 'position > 1000'"):
        export(store, "npy", out, where="position > 1000", layer=3)
    with pytest.raises(StoreError, match="layer 4 is not in"):
        export(store, "npy", out, layer=4)
    with pytest.raises(StoreError, match="inside the store"):
        export(store, "npy", store.path / "out.npy", layer=3)
    fill_store(tmp_path / "empty.zarr", store.codec, [])
    with pytest.raises(StoreError, match="holds no rows"):
        export(CaptureStore.open(tmp_path / "empty.zarr"), "npy", out)
    with pytest.raises(StoreError, match=r"out: a file of format npy ends in .npy: readers need this ending"):
        export(store, "npy", out, layer=3)
    assert not out.exists()
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match="file is no directory"):
        export(store, "npy", tmp_path / "file" / "below" / "out.npy", layer=3)
    export(store, "npy", tmp_path / "new" / "directory" / "out.npy", layer=3)
    assert np.load(tmp_path / "new" / "directory" / "out.npy").shape == (sum(SIZES), 24)


@pytest.mark.parametrize("to", ["parquet", "safetensors", "npy"])
def test_a_failed_export_leaves_nothing(
    store: CaptureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match="No space left on device"):
        export(store, to, tmp_path / f"out.{to}", layer=3)
    assert os.listdir(tmp_path) == ["run.zarr"]


def test_datasets_finds_its_shards(store: CaptureStore, tmp_path: Path) -> None:
    """The layout and the types from which Hugging Face `datasets` makes a split without a loading script."""
    assert export(store, "datasets", tmp_path / "out", layer=9, shard_rows=60) == 138
    files = sorted((tmp_path / "out").rglob("*"))
    names = [f"data/train-0000{i}-of-00003.parquet" for i in range(3)]
    assert [str(path.relative_to(tmp_path / "out")) for path in files] == ["data", *names]
    whole = pq.read_table(tmp_path / "out" / "data")
    assert whole.schema.field("activation_vector").type == pa.list_(pa.float32(), 24)
    assert whole["row"].to_pylist() == list(range(138))
    vectors = whole["activation_vector"].combine_chunks().flatten().to_numpy().reshape(-1, 24)
    np.testing.assert_array_equal(vectors, store.layer(9)[:])
    assert [pq.ParquetFile(path).metadata.num_rows for path in files[1:]] == [60, 60, 18]


def test_shards_are_named_by_an_index(store: CaptureStore, tmp_path: Path) -> None:
    export(store, "npy", tmp_path / "out", shard_rows=100, layer=3)
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert (index["format"], index["rows"], index["metadata"]["layer"]) == ("npy", 138, "3")
    assert [(s["start"], s["rows"]) for s in index["shards"]] == [(0, 100), (100, 38)]
    parts = [np.load(tmp_path / "out" / shard["file"]) for shard in index["shards"]]
    np.testing.assert_array_equal(np.concatenate(parts), store.layer(3)[:])
    with pytest.raises(RequestError, match="shard_rows must be 1 or more"):
        export(store, "npy", tmp_path / "other", shard_rows=0, layer=3)
    with pytest.raises(StoreError, match="a directory, which is never replaced"):
        export(store, "npy", tmp_path / "out", shard_rows=100, overwrite=True, layer=3)


def test_of_several_layers_one_must_be_named(store: CaptureStore, tmp_path: Path) -> None:
    for ask in (
        lambda: export(store, "npy", tmp_path / "x.npy"),
        lambda: RowDataset(store),
        lambda: ShuffledRows(store, batch_size=4),
        lambda: open_dataset(store),
    ):
        with pytest.raises(StoreError, match="holds layers 3, 9: name one of them"):
            ask()
    assert not list(tmp_path.glob("x*"))
