"""Import: what export wrote comes back, foreign files are read for what they are, bad ones are refused by name."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from commands import call, check_refused
from safetensors.numpy import save_file
from store_samples import fill_store

from nla_engine.codec.rows import Codec, bf16_bits, bf16_values
from nla_engine.errors import RequestError, StoreError
from nla_engine.store import CaptureStore
from nla_engine.store.care.verify import verify
from nla_engine.store.exchange.export import export
from nla_engine.store.exchange.importing import import_rows

SIZES = [5, 0, 100, 33]
D = 24


@pytest.fixture(autouse=True)
def without_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    for module in ("importing", "vectors"):
        monkeypatch.setattr(f"nla_engine.store.exchange.{module}.BATCH_ROWS", 32)


@pytest.fixture
def store(tmp_path: Path) -> CaptureStore:
    """bf16 rows of two layers, NaN, Inf and sinks among them."""
    fill_store(tmp_path / "run.zarr", Codec.named("bf16", D), SIZES, layers=(3, 9))
    return CaptureStore.open(tmp_path / "run.zarr")


def nla_file(path: Path, n: int = 50, layer: int = 20, **changes: object) -> tuple[Path, np.ndarray]:
    """NLA training data as others write it, and the vectors in it. changes: columns instead of these."""
    rng = np.random.default_rng(0)
    vectors = bf16_values(bf16_bits(rng.normal(size=(n, D)).astype(np.float32) * 10))
    columns = {
        "n_raw_tokens": pa.array(range(1, n + 1), pa.int64()),
        "detokenized_text_truncated": pa.array([f"é text {i}" for i in range(n)]),
        "activation_vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), D),
        "activation_layer": pa.array([layer] * n, pa.int64()),
        "doc_id": pa.array([f"doc:{i // 3}" for i in range(n)]),
        "api_explanation": pa.array(["says a thing"] * n),
    }
    columns = {name: column for name, column in {**columns, **changes}.items() if column is not None}
    pq.write_table(pa.table(columns), path)
    return path, vectors


@pytest.mark.parametrize("to", ["parquet", "nla", "datasets", "safetensors", "npy"])
@pytest.mark.parametrize("shard_rows", [None, 40])
def test_out_and_in_again(store: CaptureStore, tmp_path: Path, to: str, shard_rows: int | None) -> None:
    if to == "nla" and shard_rows:
        pytest.skip("one file")
    directory = to == "datasets" or shard_rows
    out = tmp_path / ("out" if directory else {"nla": "out.parquet"}.get(to, f"out.{to}"))
    rows = export(store, to, out, layer=9, where="position > 1", shard_rows=shard_rows)
    told = 9 if to == "npy" else None  # a bare array says nothing of itself
    made = import_rows(out, tmp_path / "back.zarr", layer=told)
    assert (made.rows, made.layer, made.d_model, made.codec) == (rows, 9, D, "bf16")
    back, chosen = CaptureStore.open(tmp_path / "back.zarr"), store.where("position > 1")
    np.testing.assert_array_equal(back.layer(9)[:], store.layer(9)[chosen])
    assert back.complete
    assert all(check.ok for check in verify(tmp_path / "back.zarr"))
    if to in ("nla", "npy"):
        assert back.sequences == rows
    if to != "npy":
        assert back.column("position").tolist() == store.column("position")[chosen].tolist()
    if to in ("parquet", "datasets", "safetensors"):
        for name in ("sequence", "token_id", "next_token_id"):
            assert back.column(name).tolist() == store.column(name)[chosen].tolist()
        records = {n: store.sequence(n).source for n in back.column("sequence").tolist()}
        if to == "safetensors":  # holds numbers alone
            records = {n: {"id": record["id"], "activation_layer": 9} for n, record in records.items()}
        else:
            records = {n: {**record, "activation_layer": 9} for n, record in records.items()}
        assert {n: back.sequence(n).source for n in records} == records
    if to in ("parquet", "datasets"):
        assert back.token_text(back.column("token_id")) == store.token_text(store.column("token_id")[chosen])
        for flag in ("generated", "sequence_end", "early", "nonfinite"):
            wanted = store.where(f"position > 1 and next_token == '1' and not {flag}")
            np.testing.assert_array_equal(chosen[back.where(f"next_token == '1' and not {flag}")], wanted)
    if to == "npy":
        assert [back.sequence(i).source["row"] for i in (0, 1)] == [0, 1]


def test_training_data_in_and_out_again(tmp_path: Path) -> None:
    source, vectors = nla_file(tmp_path / "base.parquet")
    sidecar = {"kind": "nla_dataset", "extraction": {"d_model": D, "layer_index": 20, "base_model": "Qwen"}}
    Path(f"{source}.nla_meta.yaml").write_text(yaml.safe_dump(sidecar))
    assert import_rows(source, tmp_path / "in.zarr").layer == 20
    store = CaptureStore.open(tmp_path / "in.zarr")
    np.testing.assert_array_equal(store.layer(20)[:], vectors)
    assert store.provenance["sidecar"] == sidecar
    assert store.where("record.doc_id == 'doc:2'").tolist() == [6, 7, 8]
    assert store.sequence(4).source["api_explanation"] == "says a thing"
    assert store.column("position").tolist() == list(range(50))
    export(store, "nla", tmp_path / "again.parquet")
    first, again = pq.read_table(source), pq.read_table(tmp_path / "again.parquet")
    assert again.equals(first.select(again.column_names))
    assert again.schema.field("activation_vector").type == pa.list_(pa.float32(), D)
    extraction = read_as_training_data(tmp_path / "again.parquet", 50)
    assert extraction["layer_index"] == 20 and extraction["base_model"] == "Qwen"
    assert extraction["corpus_slice"] == {"start": 0, "length": 17} and extraction["positions_per_doc"] == 3


#: What the reader of NLA training data takes: every key that it needs, and under `extraction` no other.
NEEDED = {
    "kind": str,
    "schema_version": int,
    "dataset_id": str,
    "stage": str,
    "row_count": int,
    "extraction": dict,
}
EXTRACTION = {
    "base_model": str,
    "d_model": int,
    "layer_index": int,
    "norm": str,
    "corpus": str,
    "corpus_slice": dict,
    "positions_per_doc": int,
}


def read_as_training_data(path: Path, rows: int) -> dict:
    """The checks of the reader's next step, which splits rows by document; returns `extraction`."""
    meta = yaml.safe_load(path.with_name(path.name + ".nla_meta.yaml").read_text(encoding="utf-8"))
    assert all(type(meta[name]) is kind for name, kind in NEEDED.items())
    extraction = meta["extraction"]
    assert {name: type(value) for name, value in extraction.items()} == EXTRACTION
    assert (meta["kind"], meta["schema_version"], meta["stage"]) == ("nla_dataset", 1, "base")
    assert set(extraction["corpus_slice"]) == {"start", "length"} and extraction["norm"] == "none"
    table = pq.ParquetFile(path)
    assert table.metadata.num_rows == meta["row_count"] == rows
    assert not {"n_raw_tokens", "activation_vector", "activation_layer", "doc_id"} - set(
        table.schema_arrow.names
    )
    documents = table.read(columns=["doc_id"])["doc_id"].to_pylist()
    assert len(sorted(set(documents))) <= extraction["corpus_slice"]["length"]
    assert max(documents.count(name) for name in documents) == extraction["positions_per_doc"]
    return extraction


def test_the_reader_of_training_data_takes_an_export(store: CaptureStore, tmp_path: Path) -> None:
    export(store, "nla", tmp_path / "all.parquet", layer=9)
    few = export(store, "nla", tmp_path / "few.parquet", layer=9, where="position in [2, 3]")
    assert read_as_training_data(tmp_path / "all.parquet", 138)["positions_per_doc"] == 100
    assert read_as_training_data(tmp_path / "few.parquet", few)["positions_per_doc"] == 2
    first, second = (
        yaml.safe_load((tmp_path / f"{name}.parquet.nla_meta.yaml").read_text()) for name in ("all", "few")
    )
    assert first["dataset_id"] != second["dataset_id"]


def test_a_document_or_text_that_is_null(tmp_path: Path) -> None:
    nulls = {"doc_id": pa.nulls(50, pa.string()), "detokenized_text_truncated": pa.nulls(50, pa.string())}
    source, _ = nla_file(tmp_path / "base.parquet", **nulls)
    import_rows(source, tmp_path / "in.zarr")
    export(CaptureStore.open(tmp_path / "in.zarr"), "nla", tmp_path / "again.parquet")
    read_as_training_data(tmp_path / "again.parquet", 50)
    table = pq.read_table(tmp_path / "again.parquet")
    assert table["doc_id"].to_pylist() == [str(i) for i in range(50)]
    assert table["detokenized_text_truncated"].null_count == 50


@pytest.mark.parametrize(("codec", "limit"), [("int8", 0.02), ("int4", 0.2)])
def test_other_codecs(tmp_path: Path, codec: str, limit: float) -> None:
    source, vectors = nla_file(tmp_path / "base.parquet")
    made = import_rows(source, tmp_path / "in.zarr", codec=codec)
    error = CaptureStore.open(tmp_path / "in.zarr").layer(20)[:] - vectors
    relative = np.linalg.norm(error, axis=1) / np.linalg.norm(vectors, axis=1)
    assert relative.max() < limit
    assert made.codec_error["rows"] == 32
    assert 0 < made.codec_error["mean"] <= made.codec_error["p99"] <= made.codec_error["worst"] < limit


def test_foreign_precisions_and_lists(tmp_path: Path) -> None:
    _, vectors = nla_file(tmp_path / "base.parquet")
    np.save(tmp_path / "half.npy", vectors.astype(np.float64))
    save_file({"activation": vectors.astype(np.float16), "id": np.arange(50)}, tmp_path / "half.safetensors")
    nla_file(tmp_path / "lists.parquet", activation_vector=pa.array(vectors.tolist(), pa.list_(pa.float64())))
    for name in ("half.npy", "half.safetensors", "lists.parquet"):
        import_rows(tmp_path / name, tmp_path / "in.zarr", layer=20, overwrite=True)
        want = vectors.astype(np.float16) if "safetensors" in name else vectors
        got = CaptureStore.open(tmp_path / "in.zarr").layer(20)[:]
        np.testing.assert_array_equal(got, bf16_values(bf16_bits(want.astype(np.float32))))
    import_rows(tmp_path / "half.safetensors", tmp_path / "in.zarr", layer=20, overwrite=True)
    assert CaptureStore.open(tmp_path / "in.zarr").where("record.id == 7").tolist() == [7]


def test_numbers_that_are_none_are_counted_and_those_without_a_float32_refused(tmp_path: Path) -> None:
    vectors = np.ones((5, 16))
    vectors[1, 3], vectors[2, 0], vectors[4, 4] = np.nan, np.inf, 3e38
    np.save(tmp_path / "x.npy", vectors)
    assert import_rows(tmp_path / "x.npy", tmp_path / "in.zarr", layer=1).nonfinite_rows == 2
    assert CaptureStore.open(tmp_path / "in.zarr").where("nonfinite").tolist() == [1, 2]
    vectors[4, 4] = -1e300
    np.save(tmp_path / "x.npy", vectors)
    save_file({"activation": vectors}, tmp_path / "x.safetensors")
    nla_file(tmp_path / "x.parquet", activation_vector=pa.array([[1e39] * D] * 50, pa.list_(pa.float64())))
    for name in ("x.npy", "x.safetensors", "x.parquet"):
        with pytest.raises(StoreError, match=f"{name}: holds a number beyond 3.39e[+]38"):
            import_rows(tmp_path / name, tmp_path / "other.zarr", layer=20)


def text(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


BAD = {
    "missing": (lambda t: t / "no.parquet", {}, "no such file or directory"),
    "other kind": (lambda t: text(t / "a.csv", ""), {}, "nothing else can be imported"),
    "no parquet": (lambda t: text(t / "a.parquet", "PAR1"), {}, "cannot be read as Parquet"),
    "no safetensors": (lambda t: text(t / "a.safetensors", "{}"), {}, "cannot be read as safetensors"),
    "no npy": (lambda t: text(t / "a.npy", "x"), {}, "cannot be read as npy"),
    "empty directory": (lambda t: t / "empty", {}, "neither index.json nor Parquet"),
    "no vectors": (lambda t: nla_file(t / "a.parquet", activation_vector=None)[0], {}, "no column"),
    "text for vectors": (
        lambda t: nla_file(t / "a.parquet", activation_vector=pa.array(["x"] * 50))[0],
        {},
        "is string, not a list of floating-point numbers",
    ),
    "ragged": (
        lambda t: nla_file(t / "a.parquet", activation_vector=pa.array([[1.0]] * 49 + [[1.0, 2.0]]))[0],
        {},
        "not of one length",
    ),
    "tokens": (
        lambda t: nla_file(t / "a.parquet", n_raw_tokens=pa.array([0] * 50))[0],
        {},
        "column 'n_raw_tokens' is 0 in row 0: it must be a whole number",
    ),
    "two layers": (
        lambda t: nla_file(t / "a.parquet", activation_layer=pa.array([20] * 49 + [21]))[0],
        {},
        "rows of layers 20 and 21",
    ),
    "another layer": (lambda t: nla_file(t / "a.parquet")[0], {"layer": 3}, "of layer 20, not 3"),
    "no layer": (
        lambda t: nla_file(t / "a.parquet", activation_layer=None)[0],
        {},
        "does not say which layer",
    ),
    "codec": (lambda t: nla_file(t / "a.parquet")[0], {"codec": "zip"}, "codec 'zip' is unknown"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_imported(tmp_path: Path, kind: str) -> None:
    make, options, message = BAD[kind]
    (tmp_path / "empty").mkdir()
    with pytest.raises((StoreError, RequestError), match=message):
        import_rows(make(tmp_path), tmp_path / "in.zarr", **options)


def test_an_index_names_files_beside_it_alone(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    index = {"shards": [{"file": "../../secret.npy"}]}
    text(tmp_path / "shards" / "index.json", json.dumps(index))
    with pytest.raises(StoreError, match="not a file beside it"):
        import_rows(tmp_path / "shards", tmp_path / "in.zarr", layer=1)
    text(tmp_path / "shards" / "index.json", "{}")
    with pytest.raises(StoreError, match="index.json: damaged"):
        import_rows(tmp_path / "shards", tmp_path / "in.zarr", layer=1)


def test_a_sidecar_that_does_not_belong(tmp_path: Path) -> None:
    source, _ = nla_file(tmp_path / "base.parquet")
    path = Path(f"{source}.nla_meta.yaml")
    for content, message in (
        (yaml.safe_dump({"extraction": {"d_model": 7}}), "d_model 7, its vectors have 24"),
        ("!!python/object/apply:os.system ['true']", "cannot be read as YAML"),
        ("- a list", "not a mapping"),
    ):
        path.write_text(content)
        with pytest.raises(StoreError, match=message):
            import_rows(source, tmp_path / "in.zarr")


def test_pickles_in_npy_files_are_not_opened(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(StoreError, match="cannot be read as npy"):
        import_rows(tmp_path / "a.npy", tmp_path / "in.zarr", layer=1)


def test_commands(tmp_path: Path) -> None:
    source, vectors = nla_file(tmp_path / "base.parquet")
    ran = call("import", source, "--out", tmp_path / "in.zarr", "--json")
    assert ran.code == 0, ran.err
    assert (ran.json["rows"], ran.json["layer"], ran.json["codec"]) == (50, 20, "bf16")
    out = tmp_path / "shards"
    ran = call(
        "export", tmp_path / "in.zarr", "--to", "safetensors", "--out", out, "--shard-rows", 20, "--json"
    )
    assert (ran.code, ran.json["rows"]) == (0, 50)
    names = [f"rows-0000{i}-of-00003.safetensors" for i in range(3)]
    assert sorted(path.name for path in out.iterdir()) == ["index.json", *names]
    assert call("import", out, "--out", tmp_path / "back.zarr").code == 0
    np.testing.assert_array_equal(CaptureStore.open(tmp_path / "back.zarr").layer(20)[:], vectors)
    check_refused(
        call("import", source, "--out", tmp_path / "in.zarr"), "exists: pass --overwrite to replace it", 2
    )
    check_refused(
        call("export", tmp_path / "in.zarr", "--to", "nla", "--out", tmp_path / "x", "--shard-rows", 5),
        "one file",
    )
