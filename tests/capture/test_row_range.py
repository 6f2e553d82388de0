"""The range of positions that have rows."""

from __future__ import annotations

from nla_engine.capture.row_range import RowRange


def test_row_range_is_one_run_for_every_union() -> None:
    for names in ("prompt,generated", "last,generated", "prompt,last", "all,last"):
        keep = RowRange.parse(names)
        kept = set(range(keep.first(5), keep.end(5, 9)))
        parts = [RowRange.parse(name) for name in names.split(",")]
        assert kept == set().union(*(range(part.first(5), part.end(5, 9)) for part in parts))
