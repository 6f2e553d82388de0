"""Blocks of whole sequences in one call: the same bytes as one by one, and refused for the same faults."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from store_samples import create_store, sample_sequences

from nla_engine.codec.rows import Codec
from nla_engine.errors import DamageError, StoreError
from nla_engine.store import CaptureStore, LayerRows, SequenceRows, StoreWriter
from nla_engine.store.exchange.importing import import_rows
from nla_engine.store.exchange.merge import merge

CODEC, LAYERS = Codec.named("int8", 32), (3, 9)
Block = tuple[dict[str, np.ndarray], dict[int, LayerRows]]


@pytest.fixture(autouse=True)
def without_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Sequences of each block that a writer was given."""
    sizes: list[int] = []
    real = StoreWriter.append_block

    def append_block(self: StoreWriter, columns: dict, rows: dict) -> None:
        sizes.append(len(columns["finish"]))
        real(self, columns, rows)

    monkeypatch.setattr(StoreWriter, "append_block", append_block)
    return sizes


def block(sequences: list[SequenceRows]) -> Block:
    """The same sequences end to end."""

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(sequence, name) for sequence in sequences])

    columns = {name: joined(name) for name in ("token_id", "next_token_id", "position", "flags", "tokens")}
    columns["source"] = np.frombuffer(b"".join(s.source for s in sequences), np.uint8)
    for name, part in (("row", "position"), ("token", "tokens"), ("source", "source")):
        columns[f"{name}_size"] = np.array([len(getattr(s, part)) for s in sequences], np.int64)
    columns["prompt_size"] = np.array([s.prompt_size for s in sequences], np.int32)
    columns["finish"] = np.array([s.finish for s in sequences], np.uint8)
    start = np.cumsum(columns["row_size"]) - columns["row_size"]
    rows = {}
    for layer in LAYERS:
        held = [s.layers[layer] for s in sequences]
        parts = {
            k: np.concatenate([getattr(h, k) for h in held]) for k in ("codes", "scales", "norm", "exact")
        }
        index = np.concatenate([h.exact_index + at for h, at in zip(held, start, strict=True)])
        rows[layer] = LayerRows(exact_index=index, **parts)
    return columns, rows


@pytest.fixture
def sequences() -> list[SequenceRows]:
    return sample_sequences(0, CODEC, LAYERS, [5, 0, 100, 33, 1, 0, 260])[0]


def test_a_block_is_its_sequences_one_by_one(tmp_path: Path, sequences: list[SequenceRows]) -> None:
    with create_store(tmp_path / "one.zarr", CODEC, LAYERS, shard_rows=16) as writer:
        for sequence in sequences:
            writer.append(sequence)
    with create_store(tmp_path / "block.zarr", CODEC, LAYERS, shard_rows=16) as writer:
        for start, stop in ((0, 2), (2, 3), (3, 7)):
            writer.append_block(*block(sequences[start:stop]))
    files = {f.relative_to(tmp_path / "one.zarr") for f in (tmp_path / "one.zarr").rglob("*") if f.is_file()}
    assert len(files) > 60
    for file in files - {Path("zarr.json")}:  # which names the store
        assert (tmp_path / "one.zarr" / file).read_bytes() == (tmp_path / "block.zarr" / file).read_bytes()
    assert CaptureStore.open(tmp_path / "block.zarr").sequences == 7


FAULTS = {
    "token_id": (lambda c: c["token_id"].__setitem__(7, 99), "sequence 2: token_id does not hold"),
    "next_token_id": (
        lambda c: c["next_token_id"].__setitem__(104, 99),
        "sequence 2: next_token_id does not",
    ),
    "position": (lambda c: c["position"].__setitem__(6, 0), "sequence 2: position is not ascending"),
    "prompt_size": (
        lambda c: c["prompt_size"].__setitem__(3, 500),
        "sequence 3: prompt_size 500 does not fit",
    ),
    "finish": (lambda c: c["finish"].__setitem__(4, 9), "sequence 4: finish 9 is not known"),
    "row_size": (lambda c: c["row_size"].__setitem__(0, 6), r"token_id is int32 \[399\]"),
    "negative": (lambda c: c["token_size"].__setitem__(0, -1), "token_size is negative"),
    "source": (lambda c: c["source"].__setitem__(0, ord("x")), "sequence 0: source is not UTF-8 JSON"),
    "encoding": (lambda c: c["source"].__setitem__(1, 0xFF), "sequence 0: source is not UTF-8 JSON"),
    "width": (lambda c: c.update(flags=c["flags"].astype(np.int64)), "flags is int64"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_block_that_does_not_fit_is_refused_whole(
    tmp_path: Path, sequences: list[SequenceRows], kind: str
) -> None:
    columns, rows = block(sequences)
    columns = {name: values.copy() for name, values in columns.items()}
    spoil, message = FAULTS[kind]
    spoil(columns)
    with create_store(tmp_path / "run.zarr", CODEC, LAYERS) as writer:
        with pytest.raises(StoreError, match=message):
            writer.append_block(columns, rows)
        assert writer._appended == 0
        writer.append_block(*block(sequences))
    assert CaptureStore.open(tmp_path / "run.zarr").sequences == 7


def test_rows_of_a_block_that_do_not_fit_are_refused(tmp_path: Path, sequences: list[SequenceRows]) -> None:
    columns, rows = block(sequences)
    index = rows[3].exact_index
    for wrong, message in (
        (index[::-1].copy(), "exact_index is not ascending"),
        (index + 399, "exact_index is not ascending within its rows"),
        (np.arange(len(index)), "has a norm that needs an exact copy"),
    ):
        with create_store(tmp_path / "run.zarr", CODEC, LAYERS, overwrite=True) as writer:
            with pytest.raises(StoreError, match=message):
                writer.append_block(columns, {**rows, 3: replace(rows[3], exact_index=wrong)})
            with pytest.raises(StoreError, match=r"layers \[3\] were given"):
                writer.append_block(columns, {3: rows[3]})


def test_rows_are_imported_a_block_at_a_time(tmp_path: Path, blocks: list[int]) -> None:
    vectors = np.random.default_rng(0).standard_normal((3000, 32), np.float32)
    np.save(tmp_path / "rows.npy", vectors)
    import_rows(tmp_path / "rows.npy", tmp_path / "in.zarr", layer=1, codec="bf16")
    assert blocks == [1024, 1024, 952]
    store = CaptureStore.open(tmp_path / "in.zarr")
    assert (store.sequences, store.column("sequence").tolist()) == (3000, list(range(3000)))
    np.testing.assert_allclose(store.layer(1)[:], vectors, rtol=2**-8)


def test_short_sequences_are_merged_a_block_at_a_time(tmp_path: Path, blocks: list[int]) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        short, _ = sample_sequences(seed, CODEC, LAYERS, [1] * 5000)
        with create_store(tmp_path / f"{name}.zarr", CODEC, LAYERS) as writer:
            writer.append_many(short)
    assert merge([tmp_path / "a.zarr", tmp_path / "b.zarr"], tmp_path / "out.zarr").sequences == 10_000
    assert blocks == [4096, 904, 4096, 904]


def test_a_record_that_is_no_json_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        sequences, _ = sample_sequences(seed, CODEC, LAYERS, [4, 5])
        with create_store(tmp_path / f"{name}.zarr", CODEC, LAYERS) as writer, monkeypatch.context() as patch:
            if name == "b":
                patch.setattr("nla_engine.store.records.json.loads", lambda text: None)
                sequences[1] = replace(sequences[1], source=b"{")
            writer.append_many(sequences)
    with pytest.raises(
        DamageError, match=r"b.zarr: damaged .* sequence 3: source is not .*nla-engine verify"
    ):
        merge([tmp_path / "a.zarr", tmp_path / "b.zarr"], tmp_path / "out.zarr")
