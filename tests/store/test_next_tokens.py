"""Next tokens in a store: what a writer refuses; export, import, merge and repair keep them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file
from store_samples import VOCABULARY, create_store, sample_sequences

from nla_engine.codec.rows import Codec
from nla_engine.engine.request import NextTokens
from nla_engine.errors import StoreError
from nla_engine.store import CaptureStore, SequenceRows
from nla_engine.store.care.repair import repair
from nla_engine.store.care.verify import verify
from nla_engine.store.exchange.export import export
from nla_engine.store.exchange.importing import import_rows
from nla_engine.store.exchange.merge import merge

CODEC = Codec.named("bf16", 64)
NAMES = ("next_logprob", "top_id", "top_logprob")
SIZES = [5, 0, 130, 3, 150]


def told(sequence: SequenceRows, top: int, rng: np.random.Generator) -> SequenceRows:
    n = len(sequence.position)
    logprob = -rng.random(n).astype(np.float32)
    logprob[sequence.next_token_id < 0] = np.nan
    top_id = rng.integers(0, len(VOCABULARY), (n, top)).astype(np.int32)
    values = -np.sort(rng.random((n, top)).astype(np.float32), 1)
    return dataclasses.replace(sequence, next_tokens=NextTokens(logprob, top_id, values))


def made(path: Path, rng: np.random.Generator, top: int = 2, seed: int = 0) -> CaptureStore:
    sequences, _ = sample_sequences(seed, CODEC, (3,), SIZES)
    with create_store(path, CODEC, next_token=top, shard_rows=128) as writer:
        writer.append_many([told(sequence, top, rng) for sequence in sequences])
    return CaptureStore.open(path)


def columns(store: CaptureStore, names: tuple[str, ...] = NAMES) -> dict[str, np.ndarray]:
    return {name: store.column(name) for name in names}


def check_equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray], rows: Any = slice(None)) -> None:
    assert one.keys() == other.keys()
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name][rows])


@pytest.mark.parametrize("top", [0, 2, 1024])
def test_they_come_back_and_verify(tmp_path: Path, rng: np.random.Generator, top: int) -> None:
    sequences, _ = sample_sequences(0, CODEC, (3,), SIZES)
    given = [told(sequence, top, rng) for sequence in sequences]
    with create_store(tmp_path / "s.zarr", CODEC, next_token=top) as writer:
        for sequence in given:
            writer.append(sequence)
    store = CaptureStore.open(tmp_path / "s.zarr")
    assert store.next_token == top and all(check.ok for check in verify(tmp_path / "s.zarr"))
    for name in NAMES[: 3 if top else 1]:
        expected = np.concatenate([getattr(sequence.next_tokens, name) for sequence in given])
        np.testing.assert_array_equal(store.column(name), expected)


def test_a_writer_refuses_what_does_not_fit(tmp_path: Path, rng: np.random.Generator) -> None:
    (sequence,), _ = sample_sequences(1, CODEC, (3,), [6])
    sequence = told(sequence, 2, rng)
    next_tokens = sequence.next_tokens
    assert next_tokens is not None
    above, wide = next_tokens.next_logprob.copy(), next_tokens.top_id.astype(np.int64)
    above[0] = 0.5
    ends = next_tokens.next_logprob.copy()
    ends[sequence.next_token_id < 0] = -1.0
    wrong = [
        (None, "the store keeps next tokens, and none were given"),
        ({"next_logprob": above}, "next_logprob is no log-probability"),
        ({"next_logprob": next_tokens.next_logprob[:-1]}, "next_logprob is float32"),
        ({"top_id": wide}, "top_id is int64"),
        ({"top_id": next_tokens.top_id[:, :1]}, r"top_id is int32 \[6, 1\], it must be int32 \[6, 2\]"),
    ]
    if (sequence.next_token_id < 0).any():
        wrong.append(({"next_logprob": ends}, "or is one where no token follows"))
    with create_store(tmp_path / "s.zarr", CODEC, next_token=2) as writer:
        for change, message in wrong:
            given = None if change is None else dataclasses.replace(next_tokens, **change)
            with pytest.raises(StoreError, match=message):
                writer.append(dataclasses.replace(sequence, next_tokens=given))
        writer.append(sequence)
    with (
        create_store(tmp_path / "plain.zarr", CODEC) as writer,
        pytest.raises(StoreError, match="keeps none"),
    ):
        writer.append(sequence)
    with pytest.raises(StoreError, match="next_token -1: give 0 or more"):
        create_store(tmp_path / "no.zarr", CODEC, next_token=-1)


def test_merge_keeps_them_and_refuses_other_ones(tmp_path: Path, rng: np.random.Generator) -> None:
    one, two = made(tmp_path / "1.zarr", rng), made(tmp_path / "2.zarr", rng, seed=1)
    both = merge([one.path, two.path], tmp_path / "both.zarr")
    assert all(check.ok for check in verify(tmp_path / "both.zarr"))
    expected = {name: np.concatenate([one.column(name), two.column(name)]) for name in NAMES}
    check_equal(columns(both), expected)
    other = made(tmp_path / "3.zarr", rng, top=0, seed=2)
    with pytest.raises(StoreError, match="next_token was 2, is now 0"):
        merge([one.path, other.path], tmp_path / "no.zarr")


@pytest.mark.parametrize("name", NAMES)
def test_repair_drops_only_what_is_lost(tmp_path: Path, rng: np.random.Generator, name: str) -> None:
    before = columns(made(tmp_path / "s.zarr", rng))
    kept = CaptureStore.open(tmp_path / "s.zarr").row_sizes()
    shard = next(
        path for path in sorted((tmp_path / "s.zarr" / "rows" / name / "c").rglob("*")) if path.is_file()
    )
    data = bytearray(shard.read_bytes())
    data[3] ^= 1  # in the first chunk, of 128 rows: sequences 0 and 2
    shard.write_bytes(bytes(data))
    assert next(check.name for check in verify(tmp_path / "s.zarr") if not check.ok) == f"rows/{name} data"
    _, repaired = repair(tmp_path / "s.zarr")
    assert repaired is not None and list(repaired.dropped) == [0, 2]
    owner = np.repeat(np.arange(len(kept)), kept)
    after = CaptureStore.open(tmp_path / "s.zarr")
    check_equal(columns(after), before, ~np.isin(owner, [0, 2]))
    assert all(check.ok for check in verify(tmp_path / "s.zarr"))


@pytest.mark.parametrize("top", [0, 2])
def test_export_and_import_keep_them(tmp_path: Path, rng: np.random.Generator, top: int) -> None:
    store = made(tmp_path / "s.zarr", rng, top)
    rows = store.where("position > 1 and next_logprob < -0.1")
    names = NAMES[: 3 if top else 1]
    export(store, "parquet", tmp_path / "r.parquet", where="position > 1 and next_logprob < -0.1")
    table = pq.read_table(tmp_path / "r.parquet")
    held = table.to_pylist()
    assert ("top_token" in held[0]) == bool(top)
    for line, row in zip(held, rows.tolist(), strict=True):
        assert line["next_logprob"] == store.column("next_logprob")[row]
        if top:
            ids = store.column("top_id")[row]
            assert line["top_id"] == ids.tolist() and line["top_token"] == store.token_text(ids)
            assert line["top_logprob"] == store.column("top_logprob")[row].tolist()
    import_rows(tmp_path / "r.parquet", tmp_path / "again.zarr")
    again = CaptureStore.open(tmp_path / "again.zarr")
    assert again.next_token == top and all(check.ok for check in verify(tmp_path / "again.zarr"))
    check_equal(columns(again, names), {name: store.column(name)[rows] for name in names})
    assert not {"next_logprob", "top_id"} & set(again.sequence(0).source)
    export(store, "safetensors", tmp_path / "r.safetensors")
    tensors = load_file(tmp_path / "r.safetensors")
    check_equal({name: tensors[name] for name in names}, columns(store, names))
    export(store, "parquet", tmp_path / "all.parquet")
    last = store.column("next_token_id") < 0
    assert [
        line is None for line in pq.read_table(tmp_path / "all.parquet")["next_logprob"].to_pylist()
    ] == last.tolist()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "next_logprob",
            2.0,
            "'next_logprob' is 2.0 in row 1: it must be a logarithm of a probability, or null",
        ),
        ("top_id", [1], r"'top_id' is \[1\] in row 1: it must be a list of 2 ids of tokens"),
        ("top_id", [1, -1], "a list of 2 ids of tokens"),
        ("top_logprob", [-1.0, 3.0], "a list of 2 logarithms of probabilities"),
        ("top_logprob", None, "'top_logprob' is None in row 1"),
    ],
)
def test_import_refuses_what_they_cannot_be(
    tmp_path: Path, rng: np.random.Generator, name: str, value: Any, message: str
) -> None:
    store = made(tmp_path / "s.zarr", rng)
    export(store, "parquet", tmp_path / "r.parquet", where="sequence == 0")
    table = pq.read_table(tmp_path / "r.parquet")
    values = table[name].to_pylist()
    values[1] = value
    field = table.schema.field(name)
    wrong = table.set_column(table.schema.get_field_index(name), field, pa.array(values, field.type))
    pq.write_table(wrong, tmp_path / "wrong.parquet")
    with pytest.raises(StoreError, match=message):
        import_rows(tmp_path / "wrong.parquet", tmp_path / "no.zarr")
    assert not (tmp_path / "no.zarr").exists()
