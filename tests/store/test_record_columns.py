"""Exports and tables carry the fields of the prompt records, typed, by the names of --where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import call, capture, explain, json_lines, roundtrip, score
from safetensors.numpy import load_file

from nla_engine.store import CaptureStore
from nla_engine.store.exchange.record_columns import RecordColumns

RECORDS = [
    {"prompt": "one", "topic": "tides", "n": 3, "share": 1, "right": True, "from": {"page": 7}, "mixed": 1}
    | {"big": 1 << 70},
    {"prompt": "two", "topic": "moon", "n": 1 << 60, "share": 0.5, "right": False, "from": {"page": None}}
    | {"tags": ["a"]},
    {"prompt": "three", "topic": None, "n": -5, "share": None, "right": True, "mixed": "x", "some": 4},
]
#: Column -> its type, and its value for each record.
EXPECTED: dict[str, tuple[pa.DataType, list[Any]]] = {
    "record.prompt": (pa.string(), ["one", "two", "three"]),
    "record.topic": (pa.string(), ["tides", "moon", None]),
    "record.n": (pa.int64(), [3, 1 << 60, -5]),
    "record.share": (pa.float64(), [1.0, 0.5, None]),
    "record.right": (pa.bool_(), [True, False, True]),
    "record.from.page": (pa.int64(), [7, None, None]),
    "record.mixed": (pa.string(), ["1", None, '"x"']),
    "record.big": (pa.string(), [str(1 << 70), None, None]),
    "record.tags": (pa.string(), [None, '["a"]', None]),
    "record.some": (pa.int64(), [None, None, 4]),
}


@pytest.fixture(scope="module")
def store(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("records")
    prompts = json_lines(here / "p.jsonl", RECORDS)
    assert call(*capture(root, here / "run.zarr", prompts=prompts)).code == 0
    return here / "run.zarr"


def check(table: pa.Table) -> None:
    """Every row has the values of its own record."""
    owner = table["sequence"].to_pylist()
    for name, (kind, values) in EXPECTED.items():
        field = table.schema.field(name)
        assert field.type == kind, name
        assert table[name].to_pylist() == [values[number] for number in owner], name
        assert (field.metadata or {}).get(b"nla_engine") == (
            b"json" if name in ("record.mixed", "record.big", "record.tags") else None
        )


def test_parquet(store: Path, tmp_path: Path) -> None:
    assert call("export", store, "--to", "parquet", "--out", tmp_path / "x.parquet").code == 0
    table = pq.read_table(tmp_path / "x.parquet")
    check(table)
    opened = CaptureStore.open(store)
    for expression in ("record.topic == 'tides'", "record.n < 0", "record.right", "record.from.page == 7"):
        name, _, test = expression.partition(" ")
        values = table[name].to_pylist()
        held = [v is not None and eval(f"v {test}" if test else "v") for v in values]
        assert np.flatnonzero(held).tolist() == opened.where(expression).tolist() != []


def test_values_for_rows_in_any_order(store: Path, rng: np.random.Generator) -> None:
    """Rows of a sequence that follow each other, or come again later."""
    runs = np.concatenate([rng.permutation(3), rng.integers(0, 3, 30)])
    asked = np.repeat(runs, rng.integers(1, 5, len(runs)))
    columns = RecordColumns(CaptureStore.open(store), asked)
    made = dict(zip([field.name for field in columns.fields], columns.arrays(asked), strict=True))
    assert list(made) == list(EXPECTED)
    for name, (_, values) in EXPECTED.items():
        assert made[name].to_pylist() == [values[number] for number in asked], name
    assert [len(array) for array in columns.arrays(asked[:0])] == [0] * len(made)


def test_some_rows_and_shards(store: Path, tmp_path: Path) -> None:
    """A column is of one type in every shard, and columns that no chosen record has are left out."""
    some = ("--where", "sequence != 2", "--shard-rows", 3)
    assert call("export", store, "--to", "datasets", "--out", tmp_path / "d", *some).code == 0
    shards = [pq.read_table(path) for path in sorted((tmp_path / "d" / "data").iterdir())]
    assert len(shards) > 1 and all(shard.schema == shards[0].schema for shard in shards)
    whole = pa.concat_tables(shards)
    assert "record.some" not in whole.column_names
    assert whole["record.topic"].to_pylist() == [
        RECORDS[number]["topic"] for number in whole["sequence"].to_pylist()
    ]


def test_safetensors_holds_the_numbers_and_names_the_rest(store: Path, tmp_path: Path) -> None:
    ran = call("export", store, "--to", "safetensors", "--out", tmp_path / "x.safetensors")
    assert ran.code == 0
    tensors = load_file(tmp_path / "x.safetensors")
    owner = tensors["sequence"]
    assert tensors["record.n"].dtype == np.int64 and tensors["record.right"].dtype == bool
    assert tensors["record.n"].tolist() == [RECORDS[i]["n"] for i in owner]
    assert tensors["record.right"].tolist() == [RECORDS[i]["right"] for i in owner]
    assert np.array_equal(tensors["record.share"], np.array([1, 0.5, np.nan])[owner], equal_nan=True)
    line = next(line for line in ran.err.splitlines() if line.startswith("left out"))
    assert line.split(": ")[1].split(", ") == [
        name for name in EXPECTED if name not in ("record.n", "record.share", "record.right")
    ]


def test_the_tables_of_stage_two(store: Path, root: Path, tmp_path: Path) -> None:
    """Of roundtrip, of explain, and of score on the texts of explain."""
    assert call(*roundtrip(root, tmp_path / "r.parquet", store)).code == 0
    check(pq.read_table(tmp_path / "r.parquet"))
    command = explain(root, tmp_path / "e.parquet", limit=7)
    command[1] = store
    assert call(*command).code == 0
    check_some = pq.read_table(tmp_path / "e.parquet")
    assert check_some["record.topic"].to_pylist() == [
        RECORDS[number]["topic"] for number in check_some["sequence"].to_pylist()
    ]
    ran = call(*score(root, tmp_path / "s.parquet", tmp_path / "e.parquet", store))
    assert ran.code == 0, ran.err
    scored = pq.read_table(tmp_path / "s.parquet")
    assert scored["record.topic"].to_pylist() == check_some["record.topic"].to_pylist()
    assert len(set(scored.column_names)) == len(scored.column_names)


def test_records_without_fields(tmp_path: Path) -> None:
    """An imported npy has a number per row, and nothing else."""
    np.save(tmp_path / "v.npy", np.random.default_rng().normal(size=(5, 64)).astype(np.float32))
    assert call("import", tmp_path / "v.npy", "--layer", 1, "--out", tmp_path / "v.zarr").code == 0
    assert call("export", tmp_path / "v.zarr", "--to", "parquet", "--out", tmp_path / "v.parquet").code == 0
    assert json.loads(str(pq.read_table(tmp_path / "v.parquet")["record.row"].to_pylist())) == [0, 1, 2, 3, 4]
