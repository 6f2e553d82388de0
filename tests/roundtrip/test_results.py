"""Unfinished tables: one process at a time, and nothing of another run ever gets in."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nla_engine.errors import RequestError, StoreError, WriteError
from nla_engine.roundtrip.results import ResultTable, committed

SCHEMA = pa.schema([pa.field("row", pa.int64()), pa.field("mse_nrm", pa.float64())])


def open_table(out: Path, options: dict[str, Any] | None = None, **how: bool) -> ResultTable:
    given = {"resume": False, "overwrite": False, **how}
    return ResultTable.open(out, options=options or {"seed": 1}, schema=SCHEMA, **given)


def columns(*rows: int) -> dict[str, Any]:
    return {"row": list(rows), "mse_nrm": [0.5] * len(rows)}


def finish(table: ResultTable) -> None:
    table.finish({}, lambda mse: {})


def rows_of(out: Path) -> list[int]:
    return pq.read_table(out)["row"].to_pylist()


def test_a_second_run_on_one_table_is_refused(tmp_path: Path) -> None:
    """Two runs that resumed one table once wrote a part twice and joined to rows 0 1 2 3 4 5 5."""
    out = tmp_path / "x.parquet"
    with open_table(out) as table:
        assert committed(out) == 0
        table.append(columns(0, 1, 2))
    assert committed(out) == 3 and committed(tmp_path / "y.parquet") == 0
    with open_table(out, resume=True) as first:
        assert first.done == 3
        for how in ("resume", "overwrite"):
            with pytest.raises(StoreError, match=r"x\.parquet\.parts: another process is writing here"):
                open_table(out, **{how: True})
        first.append(columns(3, 4))
        finish(first)
    assert rows_of(out) == [0, 1, 2, 3, 4]
    with open_table(out, resume=True) as again:
        assert again.finished and again.done == 5
    assert os.listdir(tmp_path) == ["x.parquet"]


def test_a_run_whose_table_was_taken_writes_no_more(tmp_path: Path) -> None:
    out = tmp_path / "x.parquet"
    with open_table(out) as first:
        first.append(columns(0, 1))
        (tmp_path / "x.parquet.parts" / ".nla-writer").unlink()  # as a machine that thinks it dead would do
        with open_table(out, resume=True) as second:
            second.append(columns(2))
            with pytest.raises(WriteError, match="deleted or replaced while this process was writing"):
                first.append(columns(2))
            with pytest.raises(WriteError, match="deleted or replaced while this process was writing"):
                finish(first)
            second.append(columns(3))
            finish(second)
    assert rows_of(out) == [0, 1, 2, 3]


def test_a_part_that_this_run_did_not_write_is_not_joined(tmp_path: Path) -> None:
    out = tmp_path / "x.parquet"
    with open_table(out) as table:
        table.append(columns(0, 1))
        pq.write_table(pa.table(columns(1)), tmp_path / "x.parquet.parts" / "part-000001.parquet")
        with pytest.raises(WriteError, match="holds 3 rows, this run wrote 2"):
            finish(table)
    assert not out.exists()


def test_parts_behind_a_hole_are_never_joined(tmp_path: Path) -> None:
    """What a kill leaves while parts are being removed: later numbers, with or without a record."""
    out, parts = tmp_path / "x.parquet", tmp_path / "x.parquet.parts"
    with open_table(out) as table:
        for row in range(4):
            table.append(columns(row))
    (parts / "part-000001.parquet").unlink()
    (parts / ".part-000004.parquet.tmp").write_bytes(b"begun")
    with open_table(out, resume=True) as table:
        assert table.done == 1
        assert sorted(os.listdir(parts)) == [".nla-writer", "part-000000.parquet", "run.json"]
        table.append(columns(7))
        table.append(columns(8))
        finish(table)
    assert rows_of(out) == [0, 7, 8]


def test_overwriting_keeps_the_old_table_until_the_new_one_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "x.parquet"
    with open_table(out) as table:
        table.append(columns(0))
        finish(table)
    with open_table(out, {"seed": 2}, overwrite=True) as table:
        table.append(columns(5))
        assert rows_of(out) == [0]
    with pytest.raises(RequestError, match="seed was 2, is now 1"):
        open_table(out, resume=True)
    with open_table(out, {"seed": 2}, resume=True) as table:
        assert table.done == 1
        finish(table)
    assert rows_of(out) == [5]
    with pytest.raises(RequestError, match="seed was 2, is now 1"):
        open_table(out, resume=True)
    assert os.listdir(tmp_path) == ["x.parquet"]


_RUN = """
import sys; sys.path[:0] = sys.argv[2:]
from pathlib import Path
import test_results as here
out = Path(sys.argv[1])
try:
    with here.open_table(out, resume=True) as table:
        print("open", flush=True)
        for row in range(table.done, 40):
            table.append(here.columns(row))
        here.finish(table)
except here.StoreError:
    print("refused", flush=True)
"""


def test_many_at_once_and_killed(tmp_path: Path, rng: np.random.Generator) -> None:
    """Processes resume one table side by side; some are killed: every row comes once."""
    out = tmp_path / "x.parquet"
    words = [sys.executable, "-c", _RUN, str(out), *map(str, Path(__file__).parents[:2])]
    said = []
    for _ in range(2):
        processes = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        for process in processes:
            assert process.stdout is not None
            said.append(process.stdout.readline())
            if rng.random() < 0.5:
                process.send_signal(signal.SIGKILL)
        for process in processes:
            with process:
                assert process.wait() in (0, -signal.SIGKILL)
    with open_table(out, resume=True) as table:
        for row in range(table.done, 40):
            table.append(columns(row))
        finish(table)
    assert "open\n" in said
    assert rows_of(out) == list(range(40))
    assert json.loads(pq.read_schema(out).metadata[b"nla_engine"])["options"] == {"seed": 1}


def test_a_run_that_fails_before_its_first_part_leaves_nothing(tmp_path: Path) -> None:
    """So a run that is refused after the models were set up does not block the next try."""
    out = tmp_path / "x.parquet"
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), open_table(out):
            raise ZeroDivisionError
        assert os.listdir(tmp_path) == []
    with open_table(out) as table:
        table.append(columns(0, 1))
    with pytest.raises(ZeroDivisionError), open_table(out, resume=True):
        raise ZeroDivisionError
    with open_table(out, resume=True) as table:
        assert table.done == 2
        finish(table)
    with pytest.raises(ZeroDivisionError), open_table(out, overwrite=True):
        raise ZeroDivisionError
    assert rows_of(out) == [0, 1]
    with open_table(out, resume=True) as table:  # resumes the one that is to replace it
        assert not table.finished and table.done == 0
        table.append(columns(7))
        finish(table)
    assert os.listdir(tmp_path) == ["x.parquet"] and rows_of(out) == [7]
