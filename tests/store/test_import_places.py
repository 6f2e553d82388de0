"""Imported rows keep the sequences, positions and tokens that their file tells, by the names of --where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import call, capture, check_refused, json_lines

from nla_engine.store import CaptureStore
from nla_engine.store.care.verify import verify

D = 16


def table(path: Path, rng: np.random.Generator, n: int, **columns: Any) -> tuple[Path, np.ndarray]:
    vectors = rng.integers(-8, 8, (n, D)).astype(np.float32)  # exact in bfloat16
    made = {
        "activation_vector": pa.array(vectors.tolist(), pa.list_(pa.float32())),
        "activation_layer": [3] * n,
    }
    pq.write_table(pa.table(made | columns), path)
    return path, vectors


@pytest.mark.parametrize("batch", [1, 2, 3, 1024])
def test_rows_of_a_sequence_are_one_sequence(batch: int, tmp_path: Path, rng, monkeypatch) -> None:
    """Of that number, whatever the batches of the reader; numbers without rows are sequences without rows."""
    monkeypatch.setattr("nla_engine.store.exchange.vectors.BATCH_ROWS", batch)
    source, vectors = table(
        tmp_path / "v.parquet",
        rng,
        6,
        sequence=[1, 1, 1, 4, 4, 5],
        position=[0, 1, 4, 2, 3, 0],
        token_id=[7, 8, 9, 5, 6, 7],
        next_token_id=[8, 2, -1, 6, 1, 4],
        token=["a", "b", "c", "d", "e", "a"],
        next_token=["b", "x", "", "e", "y", "z"],
        generated=[False, False, True, False, True, False],
        topic=["t", "t", "t", "u", "u", None],
    )
    ran = call("import", source, "--out", tmp_path / "in.zarr")
    assert ran.code == 0, ran.err
    store = CaptureStore.open(tmp_path / "in.zarr")
    np.testing.assert_array_equal(store.layer(3)[:], vectors)
    assert all(check.ok for check in verify(tmp_path / "in.zarr"))
    assert store.numbers.tolist() == [1, 4, 5] and store.row_sizes().tolist() == [3, 2, 1]
    expected = {
        "sequence == 4": [3, 4],
        "position >= 3": [2, 4],
        "token_id == 7": [0, 5],
        "token == 'a'": [0, 5],
        "next_token == 'x'": [1],
        "next_token_id == -1": [2],
        "generated": [2, 4],
        "sequence_end": [2],
        "record.topic == 'u'": [3, 4],
    }
    assert {name: store.where(name).tolist() for name in expected} == expected
    assert store.sequence(1).tokens.tolist() == [7, 8, 2, -1, 9]
    assert store.sequence(4).tokens.tolist() == [-1, -1, 5, 6, 1]
    assert store.sequence(4).text() == "dey" and store.sequence(4).prompt_text() == "d"
    assert store.sequence(5).source == {"activation_layer": 3, "topic": None}


def test_without_numbers_each_row_is_a_sequence(tmp_path: Path, rng) -> None:
    """Columns that differ from row to row stay in the records."""
    source, _ = table(
        tmp_path / "v.parquet", rng, 3, position=[4, 4, 0], token_id=[5, 6, 5], score=[1.5, 2, 3]
    )
    assert call("import", source, "--out", tmp_path / "in.zarr").code == 0
    store = CaptureStore.open(tmp_path / "in.zarr")
    assert store.where("token_id == 5").tolist() == [0, 2] and store.where("position == 4").tolist() == [0, 1]
    assert store.where("record.score > 1.7").tolist() == [1, 2] and store.sequences == 3
    assert store.sequence(0).tokens.tolist() == [-1] * 4 + [5]


PLACES: dict[str, list[Any]] = {"sequence": [0, 0, 1], "position": [0, 1, 0]}
FAULTS: dict[str, tuple[dict[str, list[Any]], str]] = {
    "interleaved": (PLACES | {"sequence": [0, 1, 0]}, "'sequence' is 0 again in row 2: sort the file"),
    "positions that fall": (
        PLACES | {"position": [1, 0, 0]},
        "'position' does not ascend in sequence 0: sort",
    ),
    "no positions": ({"sequence": [0, 0, 1]}, "'position' does not ascend in sequence 0"),
    "a number for a text": (
        PLACES | {"sequence": ["ACGT", "A", "C"]},
        "'sequence' is 'ACGT' in row 0: it must be",
    ),
    "no token": (PLACES | {"token_id": [1, -1, 2]}, "'token_id' is -1 in row 1"),
    "two tokens": (
        PLACES | {"token_id": [1, 2, 3], "next_token_id": [9, 4, 5]},
        "contradict each other at position 1 of sequence 0",
    ),
    "two texts": (
        PLACES | {"token_id": [1, 2, 1], "token": ["a", "b", "c"]},
        "column 'token' has 'a' and 'c' for the id 1: mend it",
    ),
    "a value of a row": (
        PLACES | {"score": [1.0, 2.0, 2.0]},
        "'score' differs between rows of sequence 0, .*rename 'sequence' to make",
    ),
    "two places": (
        {"n_raw_tokens": [3, 2, 1], "position": [2, 1, 4]},
        "n_raw_tokens 1 and position 4 contradict",
    ),
    "inside another": (
        PLACES | {"topic": ["a"] * 3, "record.topic.a": [1] * 3},
        "'record.topic.a' is inside another",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_contradicts_itself_is_refused(fault: str, tmp_path: Path, rng) -> None:
    columns, message = FAULTS[fault]
    source, _ = table(tmp_path / "v.parquet", rng, 3, **columns)
    check_refused(call("import", source, "--out", tmp_path / "in.zarr"), f"v.parquet: .*{message}")
    assert not (tmp_path / "in.zarr").exists()


def test_files_that_differ_are_refused(tmp_path: Path, rng) -> None:
    (tmp_path / "d").mkdir()
    table(tmp_path / "d" / "a.parquet", rng, 3, **PLACES)
    table(tmp_path / "d" / "b.parquet", rng, 3)
    check_refused(
        call("import", tmp_path / "d", "--out", tmp_path / "in.zarr"),
        "some of its files have a column 'sequence'",
    )


def test_a_capture_goes_out_and_comes_back(root: Path, tmp_path: Path) -> None:
    """Every column of the rows, every token that was told, and the records with their types."""
    records = [
        {
            "prompt": "one",
            "n": 3,
            "from": {"page": 7},
            "tags": ["a"],
            "big": 1 << 70,
            "right": True,
            "x": 0.5,
        },
        {"prompt": "two", "n": 1 << 60, "tags": [1], "mixed": "1", "right": False, "x": 2.0},
        {"prompt": "three", "n": 0, "mixed": 1, "tags": [], "right": True, "x": -1.0},
    ]
    prompts = json_lines(tmp_path / "p.jsonl", records)
    assert call(*capture(root, tmp_path / "a.zarr", prompts=prompts, positions="all", codec="bf16")).code == 0
    assert call("export", tmp_path / "a.zarr", "--to", "parquet", "--out", tmp_path / "a.parquet").code == 0
    assert call("import", tmp_path / "a.parquet", "--out", tmp_path / "b.zarr").code == 0
    a, b = CaptureStore.open(tmp_path / "a.zarr"), CaptureStore.open(tmp_path / "b.zarr")
    for name in ("token_id", "next_token_id", "position", "sequence", "flags"):
        assert a.column(name).tolist() == b.column(name).tolist(), name
    np.testing.assert_array_equal(a.layer(2)[:], b.layer(2)[:])
    for first, second, record in zip(a.iter_sequences(), b.iter_sequences(), records, strict=True):
        assert second.source == {**record, "activation_layer": 2}
        assert first.tokens.tolist() == second.tokens.tolist() and first.prompt_size == second.prompt_size
