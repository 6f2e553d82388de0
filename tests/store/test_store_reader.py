"""Reading: every way to pick rows gives the same rows; damage is an error that names the file, never a number."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from store_samples import VOCABULARY, create_store, fill_store, sample_sequences

from nla_engine.codec.rows import Codec
from nla_engine.errors import StoreError
from nla_engine.store import CaptureStore, Finish, StoreWriter
from nla_engine.store.care.verify import verify
from nla_engine.store.manifest import attributes_checksum

CODEC = Codec.named("int8", 48)
SIZES = [5, 0, 300, 20, 33]


@pytest.fixture(autouse=True)
def without_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    fill_store(tmp_path / "run.zarr", CODEC, SIZES, shard_rows=256)
    return tmp_path / "run.zarr"


@pytest.mark.parametrize("name", ["int8", "int4", "bf16"])
@pytest.mark.parametrize("shard_rows", [256, 16])  # one narrow shard, two
def test_every_way_to_pick_rows(tmp_path: Path, name: str, shard_rows: int, rng: np.random.Generator) -> None:
    fill_store(tmp_path / "run.zarr", Codec.named(name, 48), SIZES, shard_rows=shard_rows)
    layer = CaptureStore.open(tmp_path / "run.zarr").layer(3)
    everything = layer[:]
    n = sum(SIZES)
    assert everything.shape == layer.shape == (n, 48)
    assert everything.dtype == np.float32
    same = np.testing.assert_array_equal  # NaN equals NaN here
    for start, stop in ((0, n), (127, 129), (250, 260), (7, 7), (300, 10), (-5, 10_000)):
        same(layer[start:stop], everything[start:stop])
    same(layer[5:300:7], everything[5:300:7])
    same(layer[::-3], everything[::-3])
    picked = rng.integers(-n, n, 100)
    for rows in (picked, picked.tolist(), picked.astype(np.int16), np.sort(picked), [], [3, 3]):
        same(layer[rows], everything[np.asarray(rows, np.int64)])
    mask = rng.random(n) < 0.3
    same(layer[mask], everything[mask])
    for row in (0, n - 1, -1, np.int64(128)):
        same(layer[row], everything[row])
    same(layer.norm(), layer.encoded().norm)
    same(layer.norm(100, 300), layer.encoded_at(np.arange(100, 300)).norm)
    same(layer.encoded(100, 300).decode(layer.codec), everything[100:300])
    for rows in (n, -n - 1, [0, n], np.array([0.5]), mask[:-1]):
        with pytest.raises(IndexError):
            layer[rows]


def test_sink_and_nonfinite_rows_are_exact(tmp_path: Path) -> None:
    vectors = fill_store(tmp_path / "run.zarr", CODEC, SIZES)[3]
    layer = CaptureStore.open(tmp_path / "run.zarr").layer(3)
    assert len(layer.exact_row) > 10
    exact = torch.from_numpy(vectors[layer.exact_row]).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(layer[layer.exact_row], exact)
    assert np.isnan(exact).any()
    assert (exact == np.inf).any()


def test_torch(path: Path) -> None:
    layer = CaptureStore.open(path).layer(3)
    tensor = layer.torch([4, 2], dtype=torch.bfloat16)
    assert torch.equal(tensor, torch.from_numpy(layer[[4, 2]]).to(torch.bfloat16))


def test_columns_and_sequences(path: Path) -> None:
    sequences, _ = sample_sequences(0, CODEC, (3,), SIZES)
    store = CaptureStore.open(path)
    assert (store.rows, store.sequences, store.layers, store.d_model) == (sum(SIZES), 5, (3,), 48)
    assert store.provenance == {"model": "sample"}
    assert store.options == {"seed": 1, "capture": {"layer": 3}}
    for stored, given in zip(store.iter_sequences(), sequences, strict=True):
        assert (
            store.sequence(stored.number).tokens.tolist() == stored.tokens.tolist() == given.tokens.tolist()
        )
        assert (stored.prompt_size, stored.finish) == (given.prompt_size, Finish(given.finish))
        assert stored.source == json.loads(given.source)
        assert store.column("position")[stored.rows].tolist() == given.position.tolist()
        text = b"".join(VOCABULARY[token] for token in given.tokens)
        assert stored.text() == text.decode(errors="replace")
        prompt = b"".join(VOCABULARY[token] for token in given.tokens[: given.prompt_size])
        assert stored.prompt_text() == prompt.decode(errors="replace")
        assert stored.prompt_text() + stored.generated_text() == stored.text() or "\ufffd" in stored.text()
    assert [s.number for s in store.iter_sequences(2, 99)] == [2, 3, 4]
    assert store.column("position") is store.column("position")
    with pytest.raises(ValueError, match="read-only"):
        store.column("position")[0] = 1
    with pytest.raises(IndexError):
        store.sequence(5)
    with pytest.raises(StoreError, match="there is no field 'colour': choose one of token, "):
        store.column("colour")
    with pytest.raises(StoreError, match=r"layer 4 is not in .*: it has 3"):
        store.layer(4)


def test_token_text(path: Path) -> None:
    store = CaptureStore.open(path)
    assert store.token_text([1, 10, 12, 13, 14, -1, 99]) == ["1", " times", "é", "\ufffd", "", "", ""]


def test_a_growing_store_can_be_followed(tmp_path: Path) -> None:
    sequences, vectors = sample_sequences(0, CODEC, (3,), SIZES)
    with create_store(tmp_path / "run.zarr", CODEC, shard_rows=16) as writer:
        store = CaptureStore.open(tmp_path / "run.zarr")
        assert not store.refresh()
        for number, sequence in enumerate(sequences):
            old = store.layer(3)
            writer.append(sequence)
            assert not store.refresh()
            writer.commit()
            assert store.refresh()
            assert (store.sequences, store.rows) == (number + 1, sum(SIZES[: number + 1]))
            assert len(store.column("token_id")) == len(store.layer(3)) == store.rows
            np.testing.assert_array_equal(old[:], store.layer(3)[: len(old)])
            assert store.sequence(number).tokens.tolist() == sequence.tokens.tolist()
        assert not store.complete
    assert store.refresh()
    assert store.complete
    assert len(vectors[3]) == store.rows


def edit(change):
    def apply(path: Path) -> None:
        document = json.loads((path / "zarr.json").read_text())
        about = document["attributes"]["nla_engine"]
        change(about)
        about["checksum"] = attributes_checksum(about)  # a writer of another version, not damage
        (path / "zarr.json").write_text(json.dumps(document))

    return apply


def remove(path: Path) -> None:
    path.rename(path.with_name("gone"))


def replace_by_foreign_zarr(path: Path) -> None:
    remove(path)
    zarr.create_group(path)


def replace_by_zarr_2(path: Path) -> None:
    remove(path)
    zarr.create_group(path, zarr_format=2)


def replace_by_directory(path: Path) -> None:
    remove(path)
    path.mkdir()


def replace_by_file(path: Path) -> None:
    remove(path)
    path.write_text("")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove, "there is no such store"),
        (replace_by_foreign_zarr, "without 'nla_engine' attributes"),
        (replace_by_zarr_2, "a Zarr v2 store"),
        (replace_by_directory, "not a Zarr store"),
        (replace_by_file, "a file, not a store"),
        (lambda path: (path / "zarr.json").write_text('{"a":'), "damaged: broken JSON"),
        (lambda path: (path / "zarr.json").write_bytes(b"\xff"), "damaged: broken JSON"),
        (lambda path: (path / "zarr.json").write_text("[]"), "without 'nla_engine' attributes"),
        (edit(lambda about: about.update(format_version=3)), "format version 3, .* upgrade"),
        (edit(lambda about: about.update(format_version=0)), "damaged: format_version is 0"),
        (edit(lambda about: about.update(format_version="new")), "damaged: format_version"),
        (edit(lambda about: about.pop("commit")), "damaged: 'commit' is missing"),
        (edit(lambda about: about["commit"].update(rows=-1)), "damaged: a count is negative"),
        (edit(lambda about: about["commit"].update(rows="many")), "damaged: invalid literal"),
        (edit(lambda about: about["commit"].update(exact={})), "damaged: "),
        (edit(lambda about: about.update(layers=None)), "damaged: "),
        (edit(lambda about: about.update(narrow_shard_rows=8)), "damaged: narrow_shard_rows 8 is less than"),
        (edit(lambda about: about.update(narrow_shard_rows=800)), "narrow_shard_rows 800 is not a power of"),
        (edit(lambda about: about["codec"].update(name="zip")), "damaged: codec 'zip' is unknown"),
    ],
)
def test_what_is_no_store_is_refused(path: Path, spoil, message: str) -> None:
    spoil(path)
    for use in (CaptureStore.open, verify, lambda path: StoreWriter.resume(path, options={})):
        with pytest.raises(StoreError, match=message):
            use(path)


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 4
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


DAMAGE = {
    "flipped value": (lambda file: flip(file, 200), "inner chunk 0 fails its checksum"),
    "flipped checksum": (lambda file: flip(file, 128 * 48 + 1), "inner chunk 0 fails its checksum"),
    "flipped index": (lambda file: flip(file, -20), "index fails its checksum"),
    "cut short": (cut, "cut short"),
    "emptied": (lambda file: file.write_bytes(b""), "cut short"),
    "missing": (lambda file: file.unlink(), "a shard with committed rows is missing"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_by_reading_and_by_verify(path: Path, kind: str) -> None:
    damage, message = DAMAGE[kind]
    file = path / "layer_3/codes/c/0/0"
    damage(file)
    store = CaptureStore.open(path)
    for read in (lambda: store.layer(3)[:10], lambda: store.layer(3)[[5]], lambda: store.layer(3)[:]):
        with pytest.raises(StoreError, match=f"{file}: .*{message}"):
            read()
    assert store.layer(3).norm(0, 10).shape == (10,)  # other arrays can still be read
    assert store.layer(3)[256:].shape == (sum(SIZES) - 256, 48)  # and so can the next shard
    checks = {check.name: check for check in verify(path)}
    failed = [check for check in checks.values() if not check.ok]
    assert [check.name for check in failed] == ["layer_3/codes data", "damaged sequences"]
    assert str(file) in failed[0].detail
    assert failed[1].detail == "2 sequences: 0, 2"


def test_only_the_damaged_chunk_is_lost(path: Path) -> None:
    flip(path / "layer_3/codes/c/0/0", 128 * 48 + 4 + 10)
    store = CaptureStore.open(path)
    assert store.layer(3)[:128].shape == (128, 48)
    with pytest.raises(StoreError, match="inner chunk 1 fails its checksum"):
        store.layer(3)[:129]
    assert {check.name: check.detail for check in verify(path)}["damaged sequences"] == "1 sequences: 2"


@pytest.mark.parametrize(
    "name", ["rows/token_id", "sequences/source", "sequences/row_start", "vocabulary/text"]
)
def test_damage_anywhere_is_found(path: Path, name: str) -> None:
    flip(path / name / "c" / "0", 3)
    failed = [check.name for check in verify(path) if not check.ok]
    assert failed == [f"{name} data", "damaged sequences"]


def test_resume_refuses_a_damaged_tail(path: Path) -> None:
    flip(path / "rows/token_id/c/0", 256 * 4 + 4 + 3)
    with pytest.raises(StoreError, match="rows/token_id/c/0: damaged: inner chunk 1"):
        StoreWriter.resume(path, options={"seed": 1, "capture": {"layer": 3}})


def rewrite(path: Path, name: str, change) -> None:
    """Change values as someone with zarr would: checksums fit, the meaning does not."""
    array = zarr.open_array(path / name, mode="r+")
    values = array[:]
    change(values)
    array[:] = values


@pytest.mark.parametrize(
    ("name", "row", "value", "failed"),
    [
        ("rows/token_id", 7, 14, "token_id is the token at the position"),
        ("rows/next_token_id", 7, -5, "next_token_id is the token after it"),
        ("rows/position", 7, 10_000, "positions ascend within their sequence"),
        ("rows/sequence", 7, 0, "rows carry the number of their sequence"),
        ("rows/flags", 7, 7, "flags fit the positions"),
        ("sequences/row_start", 3, 1, "rows of sequences lie end to end"),
        ("sequences/row_size", 4, 1, "rows of sequences add up"),
        ("sequences/token_start", 3, 1, "tokens of sequences lie end to end"),
        ("sequences/source_size", 4, 1, "sources of sequences add up"),
        ("sequences/finish", 0, 9, "finish is a known code"),
        ("layer_3/exact_row", 0, 10_000, "layer_3/exact_row ascends within the rows"),
        ("layer_3/norm", 0, np.nan, "layer 3 keeps exactly what its codec cannot hold"),
    ],
)
def test_verify_sees_arrays_that_disagree(path: Path, name: str, row: int, value: float, failed: str) -> None:
    rewrite(path, name, lambda values: values.__setitem__(row, value))
    assert failed in [check.name for check in verify(path) if not check.ok]


def test_verify_sees_foreign_names_and_changed_metadata(path: Path) -> None:
    (path / "notes.txt").write_text("")
    metadata = path / "rows/flags/zarr.json"
    metadata.write_text(metadata.read_text().replace('"fill_value": 0', '"fill_value": 1'))
    (path / "rows/position/zarr.json").unlink()
    document = json.loads((path / "zarr.json").read_text())
    document["consolidated_metadata"]["metadata"]["rows/flags"]["shape"] = [1]
    (path / "zarr.json").write_text(json.dumps(document))
    failed = {check.name: check.detail for check in verify(path) if not check.ok}
    assert set(failed) == {"consolidated metadata", "names", "rows/position metadata", "rows/flags metadata"}
    assert "notes.txt" in failed["names"]
    assert "fill_value" in failed["rows/flags metadata"]


def test_verify_reports_progress(path: Path) -> None:
    seen: list[tuple[int, int]] = []
    assert all(check.ok for check in verify(path, lambda done, total: seen.append((done, total))))
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert {total for _, total in seen} == {len(seen)}


def test_reading_a_store_does_not_load_torch(path: Path) -> None:
    """Which takes most of a second."""
    code = "import sys; from nla_engine import CaptureStore; CaptureStore.open(sys.argv[1]).layer(3)[:2]\n"
    code += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
