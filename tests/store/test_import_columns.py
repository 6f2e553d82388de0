"""Columns beside imported vectors that hold what a place in a text cannot be, or what Python has no type for."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from commands import call, check_refused
from safetensors.torch import save_file

from nla_engine.store import CaptureStore


def parquet(path: Path, **columns: Any) -> Path:
    vectors = pa.array(list(np.eye(3, 16, dtype=np.float32)), pa.list_(pa.float32()))
    pq.write_table(pa.table({"activation_vector": vectors, "activation_layer": [5] * 3} | columns), path)
    return path


BAD = {
    "null position": ({"position": pa.array([0, None, 2], pa.int32())}, "'position' is null in row 1"),
    "null n_raw_tokens": (
        {"n_raw_tokens": pa.array([1, 2, None]), "position": [0, 1, 2]},
        "'n_raw_tokens' is null in row 2",
    ),
    "null layer": ({"activation_layer": pa.array([5, None, 5])}, "'activation_layer' is null in row 1"),
    "NaN position": ({"position": [0.0, float("nan"), 2.0]}, "'position' is 0.0 in row 0"),
    "negative position": ({"position": [0, 1, -1]}, "'position' is -1 in row 2"),
    "no tokens": ({"n_raw_tokens": [0, 1, 1]}, "'n_raw_tokens' is 0 in row 0"),
    "text": ({"position": ["0", "1", "2"]}, "'position' is '0' in row 0"),
    "bytes that are no text": (
        {
            "doc": pa.Array.from_buffers(
                pa.string(), 3, pa.array([b"a", b"\xff", b"b"], pa.binary()).buffers()
            )
        },
        "'doc' cannot be read .UnicodeDecodeError",
    ),
    "a year beyond calendars": (
        {"day": pa.array([1 << 30] * 3, pa.date32())},
        "'day' cannot be read .OverflowError",
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_column_is_named_by_file_and_row(fault: str, tmp_path: Path) -> None:
    columns, message = BAD[fault]
    source = parquet(tmp_path / "v.parquet", **columns)
    check_refused(call("import", source, "--out", tmp_path / "in.zarr"), f"v.parquet: column {message}")
    assert not (tmp_path / "in.zarr").exists()


def test_a_row_far_into_a_file(tmp_path: Path) -> None:
    values = pa.array([*range(2000), None, 7], pa.int32())
    vectors = pa.array(list(np.ones((2002, 4), np.float32)), pa.list_(pa.float32()))
    pq.write_table(pa.table({"activation_vector": vectors, "position": values}), tmp_path / "v.parquet")
    ran = call("import", tmp_path / "v.parquet", "--layer", 1, "--out", tmp_path / "in.zarr")
    check_refused(ran, r"'position' is null in row 2000")


def test_a_vector_column_that_stands_twice(tmp_path: Path) -> None:
    column = pa.array([[1.0, 2.0]], pa.list_(pa.float32()))
    pq.write_table(pa.table([column, column], names=["activation_vector"] * 2), tmp_path / "v.parquet")
    check_refused(
        call("import", tmp_path / "v.parquet", "--layer", 1, "--out", tmp_path / "in.zarr"),
        "has several columns 'activation_vector'",
    )


def test_safetensors_columns_are_looked_at_too(tmp_path: Path) -> None:
    rows = {"activation": torch.eye(3, 16), "position": torch.tensor([0.0, 1.0, torch.nan])}
    save_file(rows, tmp_path / "v.safetensors")
    ran = call("import", tmp_path / "v.safetensors", "--layer", 1, "--out", tmp_path / "in.zarr")
    check_refused(ran, r"v.safetensors: column 'position' is 0.0 in row 0: it must be a whole number")


def test_other_columns_may_hold_nulls_and_what_is_no_number(tmp_path: Path) -> None:
    columns = {
        "note": [None, "a", "b"],
        "score": [float("nan"), 1.5, float("inf")],
        "raw": [b"a", b"b", b"c"],
    }
    source = parquet(tmp_path / "v.parquet", **columns)
    assert call("import", source, "--out", tmp_path / "in.zarr").code == 0
    records = [s.source for s in CaptureStore.open(tmp_path / "in.zarr").iter_sequences()]
    assert [(r["note"], r["score"]) for r in records] == [(None, None), ("a", 1.5), ("b", None)]
    assert not any("raw" in record for record in records)


@pytest.mark.parametrize(("number", "code"), [(errno.EIO, 1), (errno.ESTALE, 1), (errno.EACCES, 2)])
def test_a_disk_that_fails_is_not_the_request_s_fault(
    number: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    source = parquet(tmp_path / "v.parquet")
    np.save(tmp_path / "v.npy", np.eye(3, dtype=np.float32))
    monkeypatch.setattr(pq, "ParquetFile", failing)
    monkeypatch.setattr(np, "load", failing)
    for file in (source, tmp_path / "v.npy"):
        ran = call("import", file, "--layer", 5, "--out", tmp_path / "in.zarr")
        check_refused(ran, f"{file.name}: cannot be read as .*{os.strerror(number)}", code)
