"""The store as other software sees it: bare zarr, xarray, and the reader printed in docs/store_format.md."""

from __future__ import annotations

import json
import os
import re
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import xarray
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from store_samples import VOCABULARY, create_store, fill_old_store, fill_store, sample_sequences

from nla_engine.codec.rows import Codec, decode_reference
from nla_engine.store import CaptureStore, RowFlag, StoreWriter, row_flags, shards
from nla_engine.store.care.repair import repair
from nla_engine.store.care.verify import verify
from nla_engine.store.format import (
    ArraySpec,
    array_specs,
    default_narrow_shard_rows,
    default_shard_rows,
    flagged,
)

DOCUMENT = Path(__file__).parents[2] / "docs" / "store_format.md"


@pytest.fixture(autouse=True)
def without_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def documented_reader():
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), flags=re.S)
    names: dict = {}
    exec(compile(code, str(DOCUMENT), "exec"), names)
    return names["read_layer"]


read_layer = documented_reader()


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    name=st.sampled_from(["int8", "int4", "bf16"]),
    width=st.sampled_from([16, 96, 256, 6]),
    layers=st.sampled_from([(3,), (0, 20)]),
    sizes=st.lists(st.integers(0, 40), max_size=8),
    shard_rows=st.sampled_from([2, 8, 32, 256, None]),
    commit_every=st.integers(1, 12),
)
def test_what_went_in_is_what_bare_zarr_reads(
    seed, name, width, layers, sizes, shard_rows, commit_every
) -> None:
    codec = Codec.named(name, width)
    sequences, vectors = sample_sequences(seed, codec, layers, sizes)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.zarr"
        with create_store(path, codec, layers, shard_rows=shard_rows) as writer:
            for start in range(0, len(sequences), commit_every):
                writer.append_many(sequences[start : start + commit_every])
                writer.commit()
        root = zarr.open_group(path, mode="r")
        assert sorted(root.group_keys()) == sorted(
            ["rows", "sequences", "vocabulary", *(f"layer_{k}" for k in layers)]
        )
        total = sum(sizes)
        for column in ("token_id", "next_token_id", "position", "flags"):
            expected = [value for sequence in sequences for value in getattr(sequence, column).tolist()]
            assert root[f"rows/{column}"][:].tolist() == expected
        assert root["rows/sequence"][:].tolist() == np.repeat(np.arange(len(sizes)), sizes).tolist()
        starts = np.cumsum([0, *sizes])
        assert root["sequences/row_start"][:].tolist() == starts[:-1].tolist()
        assert root["sequences/row_size"][:].tolist() == sizes
        assert root["sequences/prompt_size"][:].tolist() == [s.prompt_size for s in sequences]
        assert root["sequences/finish"][:].tolist() == [s.finish for s in sequences]
        for column, parts in (
            ("tokens", [s.tokens for s in sequences]),
            ("source", [s.source for s in sequences]),
        ):
            flat = root[f"sequences/{column}"][:]
            prefix = {"tokens": "token", "source": "source"}[column]
            ranges = zip(
                root[f"sequences/{prefix}_start"][:], root[f"sequences/{prefix}_size"][:], strict=True
            )
            assert [flat[a : a + n].tolist() for a, n in ranges] == [list(part) for part in parts]
        text, start = root["vocabulary/text"][:].tobytes(), root["vocabulary/start"][:]
        assert [text[a:b] for a, b in pairwise(start)] == VOCABULARY

        store = CaptureStore.open(path)
        for layer in layers:
            for column in ("codes", "scales", "norm"):
                if column == "scales" and name == "bf16":
                    assert "scales" not in root[f"layer_{layer}"]
                    continue
                expected = [getattr(s.layers[layer], column) for s in sequences]
                stored = root[f"layer_{layer}/{column}"][:]
                assert len(stored) == total
                for part, first in zip(expected, starts, strict=False):
                    assert stored[first : first + len(part)].tobytes() == part.tobytes()
            bare, ours = read_layer(path, layer), store.layer(layer)[:]
            finite = np.isfinite(vectors[layer]).all(axis=1)
            np.testing.assert_array_equal(np.isnan(bare), np.isnan(vectors[layer]))
            np.testing.assert_array_equal(np.isinf(bare), np.isinf(vectors[layer]))
            np.testing.assert_allclose(bare[finite], ours[finite], rtol=1e-5, atol=1e-5)
            limit = {"int8": 0.02, "int4": 0.2, "bf16": 0.005}[name]
            error = np.linalg.norm(ours[finite] - vectors[layer][finite], axis=1)
            assert (error <= limit * np.linalg.norm(vectors[layer][finite], axis=1)).all()
            exact = root[f"layer_{layer}/exact_row"][:]
            plain = np.setdiff1d(np.arange(total), exact)
            if total:
                reference = decode_reference(codec, store.layer(layer).encoded().encoded)
                np.testing.assert_allclose(bare[plain], reference[plain], rtol=1e-4, atol=1e-4)
        assert all(check.ok for check in verify(path)), [check for check in verify(path) if not check.ok]


@pytest.mark.parametrize("name", ["int8", "int4", "bf16"])
@pytest.mark.parametrize("sizes", [[], [3, 0, 30]])
def test_xarray_opens_every_group(tmp_path: Path, name: str, sizes: list[int]) -> None:
    codec = Codec.named(name, 64)
    fill_store(tmp_path / "run.zarr", codec, sizes, shard_rows=16)
    total = sum(sizes)
    for group, size in {"rows": total, "layer_3": total, "sequences": len(sizes), "vocabulary": 16}.items():
        dimension = {"sequences": "sequence", "vocabulary": "boundary"}.get(group, "row")
        for options in ({}, {"consolidated": False}):
            with xarray.open_zarr(tmp_path / "run.zarr", group=group, **options) as data:
                assert data.sizes[dimension] == size
                data.load()
    with xarray.open_zarr(tmp_path / "run.zarr", group="layer_3") as data:
        assert data["exact"].dims == ("exact", "channel")
        assert data["codes"].dims == ("row", "channel_pair" if name == "int4" else "channel")


def test_each_array_opens_alone_and_nothing_foreign_is_in_the_store(tmp_path: Path) -> None:
    codec = Codec.named("int8", 32)
    path = tmp_path / "run.zarr"
    fill_store(path, codec, [40, 7], shard_rows=16)
    specs = array_specs((3,), codec, 16, 256)
    for name, spec in specs.items():
        array = zarr.open_array(path / name, mode="r")
        assert (array.dtype, array.metadata.dimension_names) == (spec.dtype, spec.dimensions)
        assert (array.shards[0], array.chunks[0]) == (spec.shard_rows, spec.chunk_rows)
    members = dict(zarr.open_group(path, mode="r", use_consolidated=False).members(max_depth=None))
    assert {name for name, node in members.items() if isinstance(node, zarr.Array)} == set(specs)
    allowed = re.compile(r"(\w+/){0,2}zarr\.json|\w+/\w+/c/\d+(/0)?")
    for file in path.rglob("*"):
        assert file.is_dir() or allowed.fullmatch(str(file.relative_to(path))), file


def test_zarr_writes_the_same_shard_bytes(tmp_path: Path) -> None:
    """zarr's own sharding codec is the truth for `ShardImage`, padding and absent chunks included."""
    values = np.arange(1, 20 * 3 + 1, dtype="<i4").reshape(20, 3)
    array = zarr.create_array(
        tmp_path / "a.zarr",
        shape=(20, 3),
        chunks=(8, 3),
        shards=(64, 3),
        dtype="i4",
        compressors=zarr.codecs.Crc32cCodec(),
    )
    array[:] = values
    ours = np.empty((3, 8, 3), "<i4")
    shards.read_chunks(tmp_path / "a.zarr" / "c" / "0" / "0", range(3), 8, ours)
    assert np.array_equal(ours.reshape(24, 3)[:20], values)
    written = (tmp_path / "a.zarr" / "c" / "0" / "0").read_bytes()
    spec = ArraySpec("a", np.dtype("<i4"), ("row", "channel"), "rows", 8, 64, (3,))
    image = shards.ShardImage(spec)
    image.put([(0, values)])
    built = image.seal(20).tobytes()
    assert len(built) == len(written)
    stride = 8 * 3 * 4 + 4
    chunks = {written[i * stride : (i + 1) * stride] for i in range(3)}
    assert chunks == {built[i * stride : (i + 1) * stride] for i in range(3)}


def test_attributes_say_what_the_numbers_mean(tmp_path: Path) -> None:
    codec = Codec.named("int4", 96)
    path = tmp_path / "run.zarr"
    with create_store(path, codec, (2, 5), sink_norm={2: 7.5, 5: float("inf")}) as writer:
        writer.record_codec_error(5, {"mean": 0.01, "worst": 0.1})
    text = (path / "zarr.json").read_text()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    about = json.loads(text, parse_constant=refuse)["attributes"]["nla_engine"]
    assert about["format_version"] == 2
    assert (about["d_model"], about["layers"]) == (96, [2, 5])
    assert (about["shard_rows"], about["narrow_shard_rows"]) == (4096, 65536)
    assert about["sink_norm"] == {"2": 7.5, "5": None}
    assert about["codec_error"] == {"2": None, "5": {"mean": 0.01, "worst": 0.1}}
    assert "hidden_states[K+1]" in about["layer_convention"]
    assert {name: value["bit"] for name, value in about["row_flags"].items()} == {
        f.name: f.value for f in RowFlag
    }
    assert about["commit"] | {"time": ""} == {
        "rows": 0,
        "sequences": 0,
        "tokens": 0,
        "source_bytes": 0,
        "exact": {"2": 0, "5": 0},
        "epoch": 1,
        "complete": True,
        "time": "",
    }
    store = CaptureStore.open(path)
    assert store.sink_norm == {2: 7.5, 5: float("inf")}
    assert (store.attributes, store.codec) == (about, codec)


def test_row_flags() -> None:
    flags = row_flags(np.array([2, 3, 60, 61]), 4, 62, sink=np.array([0, 0, 1, 0], bool))
    early, generated = RowFlag.EARLY, RowFlag.GENERATED
    expected = [early, early | RowFlag.PROMPT_END, generated | RowFlag.SINK, generated | RowFlag.SEQUENCE_END]
    assert flags.tolist() == [int(flag) for flag in expected]


@pytest.mark.parametrize("flag", list(RowFlag), ids=lambda flag: flag.name)
def test_which_rows_have_a_flag(flag: RowFlag) -> None:
    marked = flagged(np.arange(256, dtype=np.uint8), flag)
    assert marked.dtype == bool
    assert marked.tolist() == [flag in RowFlag(bits & 63) for bits in range(256)]


@pytest.mark.parametrize(
    ("name", "width", "rows", "narrow"),
    [
        ("int8", 3584, 4096, 65536),
        ("int8", 65536, 256, 4096),
        ("int4", 3584, 4096, 16384),
        ("int4", 16384, 2048, 4096),
        ("bf16", 3584, 2048, 32768),
        ("bf16", 65536, 128, 2048),
    ],
)
def test_shards_stay_small(name: str, width: int, rows: int, narrow: int) -> None:
    codec = Codec.named(name, width)
    assert default_shard_rows(codec) == rows
    assert default_narrow_shard_rows(codec, rows) == narrow
    for path, spec in array_specs((3,), codec, rows, narrow).items():
        if spec.unit == "rows":
            assert spec.shard_rows == (rows if path.endswith("/codes") else narrow)
            size = spec.shard_rows * np.prod(spec.trailing, dtype=int) * spec.dtype.itemsize
            assert size <= (16 << 20 if path.endswith("/codes") else 4 << 20), path


@pytest.mark.parametrize("name", ["int8", "int4", "bf16"])
def test_a_store_without_narrow_shards_keeps_its_layout(tmp_path: Path, name: str) -> None:
    codec, path, sizes = Codec.named(name, 32), tmp_path / "run.zarr", [5, 0, 40, 30]
    fill_old_store(path, codec, sizes[:3], shard_rows=16)
    sequences, vectors = sample_sequences(0, codec, (3,), sizes)
    kept = np.isfinite(vectors[3][:45]).all(axis=1)
    np.testing.assert_allclose(
        CaptureStore.open(path).layer(3)[:][kept], read_layer(path, 3)[kept], rtol=1e-5
    )
    assert all(check.ok for check in verify(path))
    with StoreWriter.resume(path, options={"seed": 1, "capture": {"layer": 3}}) as writer:
        writer.append(sequences[3])
    assert all(check.ok for check in verify(path))
    (path / "layer_3/codes/c/0/0").unlink()
    assert list(repair(path)[1].dropped) == [0, 2]
    assert all(check.ok for check in verify(path))
    assert CaptureStore.open(path).attributes["narrow_shard_rows"] == 16
    root = zarr.open_group(path, mode="r")
    assert root["rows/position"][:].tolist() == sequences[3].position.tolist()
    assert root["layer_3/norm"][:].tobytes() == sequences[3].layers[3].norm.tobytes()
    assert sorted(file.name for file in (path / "rows/position/c").iterdir()) == ["0", "1"]
