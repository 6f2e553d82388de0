"""The page of a half of a round trip: without scores, and with texts that no AV of a run wrote."""

from __future__ import annotations

import gzip
import json
import re
from base64 import b64decode
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from commands import call, explain, json_lines, score

from nla_engine.report import write_report
from nla_engine.report.data import Explained
from nla_engine.report.facts import facts, figures, lead, warnings
from nla_engine.store import CaptureStore

if TYPE_CHECKING:
    from conftest import Open

HOSTILE = "</script><script>window.pwned=1</script><img src=x onerror='window.pwned=1'>"


@pytest.fixture(scope="module")
def unscored(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unscored") / "e.parquet"
    assert call(*explain(root, out, samples=2, temperature=0.9, top_p=0.95, top_k=50, limit=12)).code == 0
    return out


@pytest.fixture(scope="module")
def given(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("given")
    records = [{"row": row, "text": f"My own words of row {row}."} for row in range(8)]
    texts = json_lines(directory / "mine.jsonl", [*records, {"row": 3, "text": HOSTILE, "by": "me"}])
    assert call(*score(root, directory / "s.parquet", texts)).code == 0
    return directory / "s.parquet"


def page(root: Path, table: Path) -> tuple[CaptureStore, Explained, Path]:
    store, out = CaptureStore.open(root / "run.zarr"), table.with_suffix(".html")
    write_report(store, table, out, overwrite=True)
    return store, Explained.read(store, table), out


def data_of(page: Path) -> dict[str, Any]:
    found = re.search(r'id="data">([^<]*)</script>', page.read_text("utf-8"))
    assert found
    return dict(json.loads(gzip.decompress(b64decode(found[1]))))


def test_without_scores_the_page_says_so_and_has_no_number_of_them(root: Path, unscored: Path) -> None:
    store, explained, out = page(root, unscored)
    assert not explained.scored
    assert [figure.label for figure in figures(explained)] == ["finished", "length"]
    said = lead(store, explained)
    assert "12 activations of layer 2" in said and "2 times each" in said
    assert said.endswith("Nothing was scored: no AR has read the words.")
    assert warnings(store, explained)[0].startswith("Nothing was scored: ")
    told = facts(store, explained)
    assert told["Scores"] == [("scores", "none: no AR has read the words")]
    words = dict(told["Words"])
    assert words["sampling"] == "temperature 0.9, top-k 50, top-p 0.95, seed 0" and not any(
        name.startswith("AR") for name in words
    )
    data = data_of(out)
    assert data["scored"] is False and data["variance"] is None and data["control_vectors"] == 0
    assert data["explanations"]["best"] == [] and set(data["explanations"]["cos"]) == {None}
    assert any(
        text.endswith("were not, and their texts say less there.") for text in warnings(store, explained)
    )
    assert not re.search(r"<dt>(FVE|cos|retrieval)</dt>", out.read_text())


def test_texts_from_elsewhere(root: Path, given: Path) -> None:
    store, explained, out = page(root, given)
    assert explained.scored and [figure.label for figure in figures(explained)] == ["FVE", "cos", "retrieval"]
    said = lead(store, explained)
    assert "8 activations" in said and "mine.jsonl; the AR " in said and str(given.parent) not in said
    told = dict(facts(store, explained)["Words"])
    assert told["texts"] == "9" and told["rows with a text"] == f"8 of {store.rows}"
    assert told["texts from"].endswith("mine.jsonl") and not any(name.startswith("AV") for name in told)
    again = given.with_name("again.parquet")
    assert call(*score(root, again, given)).code == 0
    store, explained, _ = page(root, again)
    assert "s.parquet; the AR " in lead(store, explained), "whoever wrote the texts is still not known"
    data = data_of(out)
    assert set(data["explanations"]["tokens"]) == {None} and set(data["explanations"]["status"]) == {"given"}
    assert len(re.findall("<script", out.read_text())) == 2


def test_scored_after_it_was_explained(root: Path, unscored: Path, tmp_path: Path) -> None:
    assert call(*score(root, tmp_path / "s.parquet", unscored)).code == 0
    store, explained, _ = page(root, tmp_path / "s.parquet")
    assert [figure.label for figure in figures(explained)] == ["FVE", "cos", "retrieval", "finished"]
    told = dict(facts(store, explained)["Words"])
    assert (
        told["sampling"] == "temperature 0.9, top-k 50, top-p 0.95, seed 0"
        and told["explanations per row"] == "2"
    )
    assert told["texts from"].endswith("e.parquet") and told["AV (vector to words)"].endswith("av")
    assert "2 times each; the AR " in lead(store, explained)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_without_scores_in_a_browser(root: Path, unscored: Path, open_page: Open, scheme: str) -> None:
    shown = open_page(page(root, unscored)[2], "#tab=distributions&lo=", scheme=scheme)
    assert shown.get_by_role("tab").all_inner_texts() == ["Text", "The run"]
    assert shown.locator("#area-text").is_visible() and "Not scored" in shown.locator("#scale").inner_text()
    assert shown.locator(".t").count() == shown.locator(".t.told").count() == 12
    assert not shown.locator(".s0, .s1, .s2, .s3, .s4, .s5, .s6, .unscored").count()
    assert not shown.get_by_label("FVE from").is_visible() and not shown.locator("[name=order]").is_visible()
    shown.locator("#sequences .t").first.click()
    panel = shown.locator("#panel")
    assert panel.locator(".explanation").count() == 2 and not panel.locator(".scores").count()
    assert "FVE" not in panel.inner_text() and "tokens" in panel.inner_text()
    shown.locator("#sequences .t").nth(1).hover()
    assert shown.locator("#hover").is_visible() and "FVE" not in shown.locator("#hover").inner_text()
    assert "FVE" not in shown.locator("main").inner_text()
    shown.locator("#filter [name=status]").select_option(index=1)
    shown.locator("#hits .entry").first.click()
    assert not shown.locator("#hits .end b").count() and panel.locator(".explanation").count() == 2


def test_a_page_of_given_texts_in_a_browser(root: Path, given: Path, open_page: Open) -> None:
    shown = open_page(page(root, given)[2], "#row=3")
    panel = shown.locator("#panel")
    assert [text.inner_text() for text in panel.locator(".explanation").all()] == [
        "My own words of row 3.",
        HOSTILE,
    ]
    assert panel.locator(".scores").count() == 2 and not panel.locator(".status").count()
    assert "AV wrote" not in panel.inner_text() and shown.evaluate("window.pwned === undefined")
