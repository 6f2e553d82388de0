"""The page of the table of ask: questions beside answers, the rows of their prompts, and hostile text."""

from __future__ import annotations

import gzip
import json
import re
from base64 import b64decode
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from commands import LAYER, call, check_refused, json_lines
from oracles import save_oracle
from store_samples import random_store
from tiny import D

from nla_engine.report import write_report
from nla_engine.report.data import Explained
from nla_engine.report.facts import facts, figures, lead, warnings
from nla_engine.store import CaptureStore

if TYPE_CHECKING:
    from conftest import Open

HOSTILE = "</script><script>window.pwned=1</script><img src=x onerror='window.pwned=1'>"


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run.zarr of two sequences with a zero vector; run.parquet and file.parquet: a question per run, and per row."""
    directory = tmp_path_factory.mktemp("asked")
    save_oracle(directory)
    vectors = np.random.default_rng(5).standard_normal((9, D)).astype(np.float32)
    vectors[8] = 0.0
    random_store(directory / "run.zarr", vectors, LAYER, sizes=[5, 4])
    records = [{"question": "Who?", "rows": [7, 2]}, {"question": HOSTILE, "rows": [0, 2, 3]}]
    records += [{"question": "What?", "row": 0}]
    words = ["ask", directory / "run.zarr", "--oracle", directory / "oracle", "--injection", "add@1"]
    words += ["--norm-match", "--device", "cpu", "--max-new-tokens", 6, "--samples", 2, "--temperature", 1]
    whole = [*words, "--question", "A?", "--question", "B?", "--rows-per-prompt", 3, "--out"]
    assert call(*whole, directory / "run.parquet").code == 0
    of_rows = [*words, "--questions", json_lines(directory / "q.jsonl", records), "--out"]
    assert call(*of_rows, directory / "file.parquet").code == 0
    return directory


def data_of(page: Path) -> dict[str, Any]:
    found = re.search(r'id="data">([^<]*)</script>', page.read_text("utf-8"))
    assert found
    return dict(json.loads(gzip.decompress(b64decode(found[1]))))


def test_questions_and_answers(asked: Path, tmp_path: Path) -> None:
    store = CaptureStore.open(asked / "run.zarr")
    explained = Explained.read(store, asked / "run.parquet")
    assert explained.asked and not explained.scored and explained.noun == "answer"
    assert [figure.label for figure in figures(explained)] == ["finished", "length"]
    assert "of 16 answers were written to their end" in figures(explained)[0].says
    said = lead(store, explained)
    assert said.startswith("9 activations of layer 2 of sample, from 2 sequences. The oracle ")
    assert "answered 2 questions. Nothing was scored" in said and str(asked) not in said
    told = warnings(store, explained)
    assert told[0].startswith("Nothing was scored: no answer was checked.")
    assert any(text.startswith("Nothing to ask, 4 of 16 answers (25.0%)") for text in told)
    assert not any("AV" in text or "pairs" in text for text in told)
    words = dict(facts(store, explained)["Words"])
    assert words["placeholder"] == "' ?'" and words["injection"] == "add@1, norm: that of what is there"
    assert words["rows per prompt"] == "3, at most" and words["rows asked about"] == "9 of 9"
    assert facts(store, explained)["Scores"] == [("scores", "none: no answer was checked")]
    write_report(store, asked / "run.parquet", tmp_path / "r.html")
    data = data_of(tmp_path / "r.html")
    answers = data["explanations"]
    assert data["asked"] and data["samples"] == 2 and data["rows"]["row"] == [0, 3, 5, 8]
    assert data["rows"]["first"] == [0, 4, 8, 12, 16]
    assert answers["question"] == ["A?", "A?", "B?", "B?"] * 4 and answers["sample"] == [0, 1] * 8
    assert answers["about"][:8] == ["3 rows, positions 0 to 2"] * 4 + ["2 rows, positions 3 to 4"] * 4
    assert answers["about"][8:] == ["3 rows, positions 0 to 2"] * 4 + [""] * 4
    assert answers["status"][12:] == ["zero_vector"] * 4 and set(answers["cos"]) == {None}
    assert "<span>Search answers and questions</span>" in (tmp_path / "r.html").read_text()


def test_questions_of_a_file(asked: Path, tmp_path: Path) -> None:
    store = CaptureStore.open(asked / "run.zarr")
    write_report(store, asked / "file.parquet", tmp_path / "r.html")
    data = data_of(tmp_path / "r.html")
    assert data["explanations"]["question"] == [HOSTILE, HOSTILE, "What?", "What?", "Who?", "Who?"]
    assert data["explanations"]["about"] == ["3 rows, positions 0 to 3"] * 2 + [""] * 2 + ["rows 7, 2"] * 2
    page = (tmp_path / "r.html").read_text()
    assert len(re.findall("<script", page)) == 2 and "pwned" not in page
    words = dict(facts(store, Explained.read(store, asked / "file.parquet"))["Words"])
    assert words["selected by"].endswith("q.jsonl") and "rows per prompt" not in words
    assert words["rows asked about"] == "4 of 9"


def test_what_is_not_the_table_of_this_store(asked: Path, tmp_path: Path, root: Path) -> None:
    page = tmp_path / "r.html"
    ran = call("report", root / "run.zarr", "--explained", asked / "run.parquet", "--out", page)
    check_refused(ran, "run.parquet: explains another store")
    ran = call("report", asked / "run.zarr", "--explained", asked / "none.parquet", "--out", page)
    check_refused(ran, "give the table that roundtrip, explain, score or ask wrote")
    assert not list(tmp_path.iterdir())


def test_the_page_in_a_browser(asked: Path, tmp_path: Path, open_page: Open) -> None:
    write_report(CaptureStore.open(asked / "run.zarr"), asked / "file.parquet", tmp_path / "r.html")
    shown = open_page(tmp_path / "r.html", "#row=0")
    panel = shown.locator("#panel")
    assert panel.locator(".sample h3").all_inner_texts() == [HOSTILE, HOSTILE, "What?", "What?"]
    told = panel.inner_text()
    assert (
        "3 rows, positions 0 to 3 \u00b7 sample 1 of 2" in told
        and "oracle wrote" in told
        and "AV" not in told
    )
    assert shown.locator(".t").count() == 2 and shown.evaluate("window.pwned === undefined")
    shown.locator("[name=q]").fill("Who?")
    shown.locator("#found").filter(has_text="1 of").wait_for()
    words = shown.locator("main").inner_text()
    assert "first of a prompt" in shown.locator("#scale").inner_text()
    assert "FVE" not in words and "explan" not in words
