"""Matryoshka pairs: texts without tags that the length limit ends, and FVE after each sentence of a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import LAYER, call, check_refused, contents, explain, json_lines, score
from plain_pair import plain_state, plain_text
from safetensors.torch import load_file

from nla_engine.report.data import Explained
from nla_engine.roundtrip.prefixes import fve_by_sentences, prefixes_of
from nla_engine.store import CaptureStore

#: How often a text of the test is a list instead of sentences.
LISTS = 3


@pytest.mark.parametrize(
    ("text", "prefixes"),
    [
        ("One. Two! Three?", ["One.", "One. Two!", "One. Two! Three?"]),
        ("Pi is 3.14. It ends", ["Pi is 3.14.", "Pi is 3.14. It ends"]),
        ("- a\n- b\n\n- c", ["- a", "- a\n- b", "- a\n- b\n\n- c"]),
        ('He said "no." Then (yes.) it ended.', ['He said "no."', 'He said "no." Then (yes.)', ...]),
        ("二。三。", ["二。", "二。三。"]),
        ("no stop", ["no stop"]),
        ("One. \n", ["One. \n"]),
        ("", [""]),
    ],
)
def test_where_sentences_end(text: str, prefixes: list[Any]) -> None:
    assert prefixes_of(text) == [text if part is ... else part for part in prefixes]


def written(root: Path, directory: Path) -> list[dict[str, Any]]:
    """Texts in the form of such a pair's, made of what a tiny AV writes: no tags, one to four sentences or points."""
    assert call(*explain(root, directory / "e.parquet", max_new_tokens=9)).code == 0
    table, rng = pq.read_table(directory / "e.parquet").to_pylist(), np.random.default_rng(3)
    assert {line["status"] for line in table} == {"untagged"} and {line["n_tokens"] for line in table} == {9}
    vectors = CaptureStore.open(root / "run.zarr").layer(LAYER)
    assert table[0]["explanation"] == plain_text(root / "av", vectors[table[0]["row"]], new_tokens=9)
    records = []
    for place, line in enumerate(table):
        said = [line["explanation"].replace(".", ""), *(f"word {rng.integers(99)}" for _ in range(place % 4))]
        joined = (
            "\n".join(f"- {part}" for part in said) if place % LISTS == 0 else " ".join(f"{p}." for p in said)
        )
        records.append({"row": line["row"], "text": joined})
    return records


def test_fve_after_each_sentence(root: Path, tmp_path: Path) -> None:
    records = written(root, tmp_path)
    texts, out = json_lines(tmp_path / "t.jsonl", records), tmp_path / "curve.parquet"
    ran = call(*score(root, out, texts, prefixes=True), "--json")
    assert ran.code == 0, ran.err
    assert call(*score(root, tmp_path / "whole.parquet", texts)).code == 0
    whole, table = pq.read_table(tmp_path / "whole.parquet").to_pylist(), pq.read_table(out).to_pylist()
    expected = [(record["row"], part) for record in records for part in prefixes_of(record["text"])]
    assert [(line["row"], line["explanation"]) for line in table] == expected
    assert len(expected) > len(records) * 2
    own = [line for line in table if line["whole"]]
    for line, other in zip(own, whole, strict=True):
        assert line["explanation"] == other["explanation"] and line["cos"] == pytest.approx(
            other["cos"], abs=1e-5
        )
    head = load_file(root / "ar" / "value_head.safetensors")["weight"].double().numpy()
    vectors = CaptureStore.open(root / "run.zarr").layer(LAYER)[:].astype(np.float64)
    for line in table[::7]:
        prompt = f"Summary of <text>{line['explanation']}</text> <summary>"
        v, r = vectors[line["row"]], head @ plain_state(root / "ar", prompt, LAYER)
        assert line["cos"] == pytest.approx(v @ r / np.linalg.norm(v) / np.linalg.norm(r), abs=2e-5)
    for row in {line["row"] for line in table}:
        lines = [line for line in table if line["row"] == row]
        assert [line["sample"] for line in lines] == list(range(len(lines)))
        assert [line["sentences"] for line in lines] == list(range(1, len(lines) + 1))
        assert [line["whole"] for line in lines] == [False] * (len(lines) - 1) + [True]
    curve = {}
    for count in range(1, max(line["sentences"] for line in table) + 1):
        upto = [line for line in table if line["sentences"] <= count]
        after = list({line["row"]: line for line in upto}.values())  # the last one of each row
        curve[str(count)] = np.mean([line["fve_nrm"] for line in after])
    assert ran.json["fve_by_sentences"] == pytest.approx(curve, abs=1e-5)
    variance, beside = ran.json["variance"], ran.json["fve_by_sentences_shuffled"]
    last = np.mean([1 - 2 * (1 - line["cos_shuffled"]) / variance for line in own])
    assert list(beside) == list(curve) and beside[max(beside)] == pytest.approx(last, abs=1e-4)
    assert ran.json["explanations"] == len(records)
    assert ran.json["cos"] == pytest.approx(np.mean([line["cos"] for line in own]), abs=1e-5)
    assert ran.json["fve_nrm"] == pytest.approx(curve[max(curve)], abs=1e-5), (
        "the curve ends at the whole texts"
    )
    check_refused(call(*score(root, out, texts), "--resume"), "prefixes was true, is now not given")
    with pytest.raises(Exception, match="beginnings of texts"):
        Explained.read(CaptureStore.open(root / "run.zarr"), out)


def test_several_texts_of_a_row_keep_their_numbers(root: Path, tmp_path: Path) -> None:
    records = [{"row": 2, "text": "A. B."}, {"row": 0, "text": "C."}, {"row": 2, "text": "D. E. F"}]
    texts = json_lines(tmp_path / "t.jsonl", records)
    assert call(*score(root, tmp_path / "x.parquet", texts, prefixes=True)).code == 0
    table = pq.read_table(tmp_path / "x.parquet").to_pylist()
    told = [(line["row"], line["of_text"], line["sentences"], line["sample"]) for line in table]
    assert told == [(0, 0, 1, 0), (2, 0, 1, 0), (2, 0, 2, 1), (2, 1, 1, 2), (2, 1, 2, 3), (2, 1, 3, 4)]


def test_texts_that_are_not_scored_are_not_in_the_curve() -> None:
    nan = float("nan")
    columns = {
        "row": np.array([0, 0, 1, 1, 2]), "of_text": np.zeros(5, int), "sentences": np.array([1, 2, 1, 2, 1]),
        "whole": np.array([False, True, False, True, True]), "cos": np.array([0.5, 0.75, nan, nan, 1.0]),
    }  # fmt: skip
    assert fve_by_sentences(columns, 0.5) == {"1": 0.0, "2": 0.5}
    assert fve_by_sentences({name: column[2:4] for name, column in columns.items()}, 0.5) == {}


def test_a_field_of_the_same_name_is_refused(root: Path, tmp_path: Path) -> None:
    table = pa.table({"row": [0], "text": ["a"], "sentences": [3]})
    pq.write_table(table, tmp_path / "t.parquet")
    before = contents(tmp_path)
    ran = call(*score(root, tmp_path / "x.parquet", tmp_path / "t.parquet", prefixes=True))
    check_refused(ran, "has a field sentences of its own")
    assert contents(tmp_path) == before
