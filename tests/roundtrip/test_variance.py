"""Var of a Parquet file of vectors, against numpy in float64."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import call, check_refused, written


def write(
    path: Path, rows: list[object], kind: pa.DataType, name: str = "activation_vector", **how: object
) -> Path:
    pq.write_table(pa.table({name: pa.array(rows, kind), "id": list(range(len(rows)))}), path, **how)
    return path


def truth(rows: np.ndarray) -> float:
    """1 - ||mean of the unit rows||^2."""
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return float(((unit - unit.mean(0)) ** 2).sum(1).mean())


KINDS = {
    "float16": (pa.list_(pa.float16()), 5e-13),
    "float32": (pa.list_(pa.float32(), 24), 5e-13),
    "float64": (pa.large_list(pa.float64()), 5e-13),
}


@pytest.mark.parametrize("dtype", KINDS)
def test_it_is_the_variance_of_the_directions(dtype: str, tmp_path: Path, rng: np.random.Generator) -> None:
    """Over several batches and row groups, with rows that have no direction."""
    kind, limit = KINDS[dtype]
    rows = (rng.standard_normal((2600, 24)) + 2 * rng.standard_normal(24)).astype(dtype)
    held = rows.copy()
    held[[3, 1500]] = 0
    held[7, 2], held[2599, 0], held[8] = np.nan, np.inf, -np.inf
    path = write(tmp_path / "v.parquet", list(held), kind, row_group_size=700)
    ran = call("variance", path, "--json")
    assert ran.code == 0, ran.err
    sound = np.delete(rows, [3, 1500, 7, 2599, 8], 0).astype(np.float64)
    assert abs(ran.json["variance"] - truth(sound)) < limit
    assert {key: value for key, value in ran.json.items() if key != "variance"} == {
        "file": str(path),
        "column": "activation_vector",
        "d_model": 24,
        "variance_rows": 2595,
        "rows": 2600,
        "zero_rows": 2,
        "nonfinite_rows": 3,
    }


def test_lengths_do_not_matter_and_a_column_is_named(tmp_path: Path, rng: np.random.Generator) -> None:
    rows = rng.standard_normal((50, 4))
    scaled = rows * 10.0 ** rng.uniform(-305, 305, (50, 1))
    path = write(tmp_path / "v.parquet", list(scaled), pa.list_(pa.float64()), "x")
    ran = call("variance", path, "--column", "x")
    assert ran.code == 0 and "variance_rows" in ran.out
    assert (
        abs(json.loads(call("variance", path, "--column", "x", "--json").out)["variance"] - truth(rows))
        < 1e-12
    )


def test_memory_is_that_of_a_batch(tmp_path: Path) -> None:
    import tracemalloc

    wide = [np.ones(256, np.float32)] * 20_000
    path = write(tmp_path / "v.parquet", wide, pa.list_(pa.float32(), 256), row_group_size=2000)
    call("variance", path)
    tracemalloc.start()
    try:
        assert call("variance", path).code == 0
        assert tracemalloc.get_traced_memory()[1] < 15e6  # of 41 MB in float64
    finally:
        tracemalloc.stop()


def test_what_holds_no_vectors_is_refused(tmp_path: Path) -> None:
    lists = pa.list_(pa.float32())
    good = write(tmp_path / "good.parquet", [[1.0, 2.0]], lists)
    check_refused(call("variance", tmp_path / "no.parquet"), "no.parquet: no such file")
    check_refused(call("variance", tmp_path), "is a directory")
    check_refused(
        call("variance", written(tmp_path / "x.parquet", "x")), "x.parquet: cannot be read as Parquet"
    )
    check_refused(
        call("variance", good, "--column", "v"),
        r"has no column 'v': its columns are activation_vector, id",
    )
    check_refused(call("variance", good, "--column", "id"), "'id' is int64, not a list of floating-point")
    for rows in ([[1.0, 2.0], [1.0]], [[1.0], None], [[1.0, None]], [[]], [[1.0]] * 1024 + [[1.0, 2.0]]):
        check_refused(call("variance", write(tmp_path / "y.parquet", rows, lists)), "not of one length")
    none = write(tmp_path / "z.parquet", [[0.0, 0.0], [np.nan, 1.0]], lists)
    check_refused(call("variance", none), "holds no row with a direction: 1 are zero, 1 not finite")
    check_refused(call("variance", write(tmp_path / "e.parquet", [], lists)), "no row with a direction")
