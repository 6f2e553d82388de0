"""show: the page of a round trip, from vectors whose rows are found by value; in a notebook, one escaped frame."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from commands import LAYER
from store_samples import random_store
from tiny import D

import nla_engine
from nla_engine.errors import RequestError
from nla_engine.interactive.explanations import Explanations
from nla_engine.report.data import Explained, page_data
from nla_engine.report.page import packed
from nla_engine.roundtrip.reconstruct import Reconstructor
from nla_engine.roundtrip.verbalize import Verbalizer
from nla_engine.store import CaptureStore

if TYPE_CHECKING:
    from playwright.sync_api import Browser

HOW = {"max_new_tokens": 8, "quiet": True}


@pytest.fixture(scope="module")
def pair(root: Path) -> tuple[Verbalizer, Reconstructor]:
    return nla_engine.load_av(root / "av", device="cpu"), nla_engine.load_ar(root / "ar", device="cpu")


@pytest.fixture(scope="module")
def run(root: Path) -> CaptureStore:
    return CaptureStore.open(root / "run.zarr")


@pytest.fixture(scope="module")
def explained(run: CaptureStore, pair: tuple[Verbalizer, Reconstructor]) -> Explanations:
    """Every row."""
    return nla_engine.explain(run.layer(LAYER), *pair, **HOW)


class Frame(HTMLParser):
    """The attributes of the only tag."""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag == "iframe" and not hasattr(self, "found")
        self.found = dict(attrs)


def rows_of(html: str) -> str:
    """What a page holds in its data, packed."""
    found = re.search(r'<script[^>]*id="data"[^>]*>([^<]*)<', html)
    assert found
    return found[1].strip()


def test_the_page_is_that_of_the_round_trip(root: Path, run: CaptureStore, explained: Explanations) -> None:
    table = root / "explained.parquet"
    expected = packed(page_data(run, Explained.read(run, table)))
    shown = nla_engine.show(run, explained)
    assert rows_of(shown.html) == expected
    for again in (nla_engine.show(str(root / "run.zarr"), str(table)), nla_engine.show(run, table)):
        assert rows_of(again.html) == expected
    words = re.sub(r"\s+", " ", shown.html)
    assert "given in Python" in words and "measured on" in words


def test_some_rows_in_any_order(
    run: CaptureStore, pair: tuple[Verbalizer, Reconstructor], tmp_path: Path, rng: np.random.Generator
) -> None:
    rows = rng.permutation(run.where("generated"))[:6]
    layer = run.layer(LAYER)
    mine = nla_engine.explain(layer[rows], *pair, samples=2, temperature=1.0, variance=0.5, **HOW)
    for given in (None, rows):
        page = nla_engine.show(run, mine, rows=given, title="<i>mine")
        assert "<title>&lt;i&gt;mine" in page.html and "0.5000, given" in page.html
        assert "Var was given" in page.html
    for measured in (layer, layer[:]):
        held = nla_engine.explain(layer[rows], *pair, variance=measured, **HOW)
        page = nla_engine.show(run, held)
        assert f"measured on {len(layer):,} given vectors" in page.html and "Var was given" not in page.html
    from nla_engine.interactive.show import _table

    table = _table(run, layer, mine, None)
    assert table.rows.tolist() == sorted(rows.tolist()) and np.diff(table.start).tolist() == [2] * 6
    for place, row in enumerate(rows):
        at = table.columns["row"] == row
        wanted = mine.vector == place
        assert table.columns["explanation"][at].tolist() == np.array(mine.texts, object)[wanted].tolist()
        np.testing.assert_array_equal(table.columns["cos"][at], mine.cos[wanted])
        assert table.columns["best"][at].sum() == 1
    words = nla_engine.explain(layer[rows[:2]], pair[0], **HOW)
    assert "no AR has read the words" in nla_engine.show(run, words).html


def test_vectors_whose_rows_are_not_known(
    pair: tuple[Verbalizer, Reconstructor], tmp_path: Path, rng: np.random.Generator
) -> None:
    vectors = rng.standard_normal((6, D)).astype(np.float32)
    vectors[4] = vectors[1]
    store = CaptureStore.open(random_store(tmp_path / "r.zarr", vectors, LAYER))
    layer = store.layer(LAYER)

    def explain(array: np.ndarray) -> Explanations:
        return nla_engine.explain(array, pair[0], **HOW)

    with pytest.raises(
        RequestError, match=r"vector 1 is no row of layer 2 of .*r\.zarr: the page shows stored rows"
    ):
        nla_engine.show(store, explain(np.stack([layer[0], layer[0] - layer[2]])))
    both = explain(layer[[4, 1, 5]])
    assert nla_engine.show(store, both).html  # both equal rows are there: each has its own
    one = explain(layer[[4, 5]])
    with pytest.raises(
        RequestError, match="vector 0 stands in 2 rows of layer 2 .* explained 1 times: .*rows="
    ):
        nla_engine.show(store, one)
    assert nla_engine.show(store, one, rows=[4, 5]).html
    rounded = explain(layer.torch([0, 2]).bfloat16())  # type: ignore[arg-type]
    rough = explain(layer[[0, 2]] * np.float32(1.002))
    for near in (rounded, rough):
        assert nla_engine.show(store, near, rows=np.isin(np.arange(6), [0, 2])).html
    with pytest.raises(RequestError, match="vector 1 is not that of row 3 of layer 2"):
        nla_engine.show(store, one, rows=[4, 3])
    with pytest.raises(RequestError, match="rows names 1 rows, 2 vectors were explained"):
        nla_engine.show(store, one, rows=[4])
    with pytest.raises(IndexError):
        nla_engine.show(store, one, rows=[4, 6])


def test_what_does_not_belong_together(
    root: Path, run: CaptureStore, explained: Explanations, tmp_path: Path, rng: np.random.Generator
) -> None:
    other = CaptureStore.open(random_store(tmp_path / "r.zarr", np.ones((1, D + 2), np.float32), LAYER))
    with pytest.raises(RequestError, match=f"have width {D}, .* holds {D + 2}"):
        nla_engine.show(other, explained)
    with pytest.raises(RequestError, match="explains another store"):
        nla_engine.show(other, root / "explained.parquet")
    with pytest.raises(RequestError, match="a table names its rows and its layer itself"):
        nla_engine.show(run, root / "explained.parquet", rows=[1])
    with pytest.raises(RequestError, match="no such file"):
        nla_engine.show(run, "gone.parquet")
    told = nla_engine.write_report(
        str(run.path), str(root / "explained.parquet"), str(tmp_path / "whole.html")
    )
    assert told.rows == len(run) and (tmp_path / "whole.html").exists()
    page = nla_engine.show(run, explained)
    assert page.save(tmp_path / "page.html").read_text() == page.html
    with pytest.raises(RequestError, match="exists: choose another name"):
        page.save(tmp_path / "page.html")
    page.save(str(tmp_path / "page.html"), overwrite=True)
    with pytest.raises(RequestError):
        page.save(root / "run.zarr" / "page.html")


def test_the_frame_holds_the_whole_page_and_nothing_else(run: CaptureStore, explained: Explanations) -> None:
    page = nla_engine.show(run, explained, title='a "quoted" </iframe><script>x</script>', height=500)
    frame = Frame()
    frame.feed(page._repr_html_())
    frame.close()
    assert frame.found["srcdoc"] == page.html
    assert (frame.found["sandbox"], frame.found["height"]) == ("allow-scripts", "500")
    assert (
        repr(page) == f"<report page of {run.path}: the value of a notebook's cell, or .save('report.html')>"
    )


def test_it_works_inside_a_notebook(
    browser: Browser, run: CaptureStore, explained: Explanations, tmp_path: Path
) -> None:
    """In a frame without an address: rows can be chosen, filtered and linked to, and nothing complains."""
    outer = tmp_path / "notebook.html"
    outer.write_text(f"<!doctype html><p>a cell</p>{nla_engine.show(run, explained)._repr_html_()}")
    view = browser.new_page()
    complaints: list[str] = []
    view.on("console", lambda message: complaints.append(message.text))
    view.on("pageerror", lambda error: complaints.append(str(error)))
    view.goto(outer.as_uri())
    frame = view.frame_locator("iframe")
    frame.locator("[aria-selected=true]").wait_for()
    frame.locator("#sequences .t").first.click()
    link = frame.get_by_title("Link to this row").first
    link.click()
    frame.get_by_role("tab").nth(1).click()
    frame.get_by_role("tab").nth(0).click()
    assert link.is_visible()
    assert (view.url, complaints) == (outer.as_uri(), [])
    view.close()
