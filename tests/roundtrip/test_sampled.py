"""What a few texts say of all: the bytes of a table, which of many rows are taken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nla_engine.roundtrip.sample import evenly, table_bytes

LINES = 600


@pytest.mark.parametrize("few", [1, 2, 3, 7, 8, 32, LINES])
def test_the_size_of_a_table(few: int, tmp_path: Path, rng: np.random.Generator) -> None:
    """Numbers that cannot be compressed, a column that can, texts in between."""
    words = ["the ", "vector ", "is ", "one ", "thought ", "of ", "rain "]
    table = pa.table(
        {
            "row": np.arange(LINES),
            "cos": rng.standard_normal(LINES),
            "status": ["ok"] * LINES,
            "text": ["".join(rng.choice(words, 30)) for _ in range(LINES)],
        }
    )
    pq.write_table(table, tmp_path / "x.parquet")
    found = table_bytes(table.slice(100, few) if few < LINES else table, LINES)
    assert 0.7 < found / (tmp_path / "x.parquet").stat().st_size < 4


@pytest.mark.parametrize(
    ("rows", "count", "together"), [(5, 8, 2), (5, 3, 8), (100, 12, 4), (1000, 7, 16), (1, 1, 1)]
)
def test_rows_are_spread_in_blocks(rows: int, count: int, together: int) -> None:
    found = evenly(rows, count, together)
    assert (np.diff(found) > 0).all() and found[0] == 0 and found[-1] < rows and 0 < len(found) <= count
    if rows > max(count, together) and count > together:
        assert found[-1] == rows - 1
        assert (np.diff(found.reshape(-1, together)) == 1).all()
