"""A report of a store whose sequences ended in another order than that of their prompts."""

from __future__ import annotations

from pathlib import Path

from report_samples import Said, Text, make_run
from test_report import texts

from nla_engine.report.data import Explained, page_data
from nla_engine.report.page import write_report


def test_texts_come_in_the_order_of_the_prompts(tmp_path: Path) -> None:
    """Whatever ended first. Rows keep the numbers that they have in the store, and their texts."""
    sequences = [
        Text(["d", "e"], {0: [Said("of d", 0.1)], 1: [Said("of e", 0.2), Said("or f", 0.3)]}, number=7),
        Text(["a"], {0: [Said("of a", 0.4)]}, number=0),
        Text(["b", "c"], {1: [Said("of c", 0.5)]}, number=3),
    ]
    store, table = make_run(tmp_path, sequences)
    explained = Explained.read(store, table)
    data = page_data(store, explained)
    assert data["sequences"]["number"] == [0, 3, 7] and texts(data) == ["a", "bc", "de"]
    assert [data["rows"]["row"], data["rows"]["first"]] == [[2, 3, 0, 1], [0, 1, 2, 3, 5]]
    assert data["explanations"]["text"] == ["of a", "of c", "of d", "of e", "or f"]
    assert data["explanations"]["cos"] == [0.4, 0.5, 0.1, 0.2, 0.3]
    assert data["explanations"]["best"] == [0, 1, 2, 4]
    write_report(store, table, tmp_path / "x.html")
