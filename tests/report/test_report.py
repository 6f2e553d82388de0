"""The report page as a file: its data, its words, what it refuses. In a browser: test_report_browser.py."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from commands import call, check_refused, contents, written
from report_samples import VARIANCE, Said, Text, cos_of, make_run

import nla_engine
from nla_engine.config import RoundtripOptions
from nla_engine.errors import RequestError
from nla_engine.models.sidecar import read_sidecar
from nla_engine.report import ReportSummary, Section, write_report
from nla_engine.report.data import Explained, page_data, token_class, token_pieces
from nla_engine.report.facts import facts, figures, lead, short_name, warnings
from nla_engine.roundtrip.results import METADATA_KEY, read_metadata
from nla_engine.roundtrip.summary import summarise
from nla_engine.store import CaptureStore, Finish

TRIO = Path(nla_engine.__file__).parent / "demo" / "trio"
HOSTILE = (
    "</script><script>window.pwned=1</script><!--<img src=x onerror='window.pwned=1'>\u2028{{script}}&amp;"
)
PLAIN = [Text(["a", " b", "c"], {1: [Said("of b")], 2: [Said("of c")]}, prompt=1)]


def data_of(page: Path) -> dict[str, Any]:
    """What the page holds for its script."""
    found = re.search(r'id="data">([^<]*)</script>', page.read_text("utf-8"))
    assert found
    return json.loads(gzip.decompress(base64.b64decode(found[1], validate=True)))


def texts(data: dict[str, Any]) -> list[str]:
    """Every sequence, put together again from explained tokens and the gaps between them."""
    out, sequences, rows = [], data["sequences"], data["rows"]
    for s, gaps in enumerate(sequences["gaps"]):
        first, stop = sequences["first"][s : s + 2]
        parts: list[str] = []
        row = first
        for before, text, _, _ in [*gaps, [stop - first, "", 0, 0]]:
            parts += [data["texts"][rows["token"][i]] for i in range(row, first + before)]
            row = first + before
            parts.append(text)
        out.append("".join(parts))
    return out


def test_the_data_are_those_of_the_store_and_the_table(tmp_path: Path) -> None:
    sequences = [
        Text(
            ["<|im_start|>", "hi", "\n", " 4", "2"],
            {3: [Said("four", 0.5)], 4: [Said("two", 0.75)]},
            3,
            {"a": 4, "deep": {"x": "y"}},
        ),
        Text(["never"], {}),
        Text(
            ["a", "b", "c", "d"],
            {1: [Said("of b")]},
            2,
            {"a": None, "ok": True, "prompt": "a", "list": [1]},
            Finish.LENGTH,
        ),
    ]
    store, table = make_run(tmp_path, sequences)
    data = page_data(store, Explained.read(store, table))
    assert data["sequences"]["number"] == [0, 2] and data["sequences"]["finish"] == [0, 1]
    assert texts(data) == [store.sequence(0).text(), store.sequence(2).text()]
    assert data["sequences"]["gaps"] == [[[0, "<|im_start|>hi\n", 3, 0]], [[0, "a", 1, 0], [1, "cd", 2, 1]]]
    assert data["sequences"]["fields"] == {"a": [4, None], "deep.x": ["y", None], "ok": [None, True]}
    rows = data["rows"]
    assert [rows["row"], rows["position"], rows["first"]] == [[0, 1, 2], [3, 4, 1], [0, 1, 2, 3]]
    assert [data["texts"][i] for i in rows["token"]] == [" 4", "2", "b"]
    assert [None if i is None else data["texts"][i] for i in rows["next"]] == ["2", None, "c"]
    assert [data["classes"][i] for i in rows["class"]] == ["digits", "digits", "part of a word"]
    assert rows["flags"] == store.column("flags").tolist() and rows["norm"] == [100, 100, 100]
    assert data["explanations"]["text"] == ["four", "two", "of b"] and data["explanations"]["best"] == [
        0,
        1,
        2,
    ]
    assert data["explanations"]["cos"] == [0.5, 0.75, 0.9] and data["variance"] == VARIANCE


def test_the_page_keeps_every_digit_of_a_number(tmp_path: Path) -> None:
    """A browser's numbers are float64: whole numbers that it would round are written as text."""
    numbers = [2**53 - 1, 2**53, -(2**53) - 1, 10**400, 0.1, 1]
    record = {f"n{i}": number for i, number in enumerate(numbers)}
    store, table = make_run(tmp_path, [Text(["a"], {0: [Said("x")]}, 1, record)])
    fields = page_data(store, Explained.read(store, table))["sequences"]["fields"]
    shown = [fields[f"n{i}"][0] for i in range(len(numbers))]
    assert shown == [2**53 - 1, str(2**53), str(-(2**53) - 1), str(10**400), 0.1, 1]
    write_report(store, table, tmp_path / "x.html")


def test_a_character_of_several_tokens_stands_with_the_last(tmp_path: Path) -> None:
    euro = "€".encode()
    tokens = ["a", euro[:1], euro[1:], euro[:2], "b", euro[:1]]
    store, _ = make_run(tmp_path, [Text(tokens, {0: [Said("x")]})])
    sequence = store.sequence(0)
    assert token_pieces(sequence) == ["a", "", "€", "", "\ufffdb", "\ufffd"]
    assert "".join(token_pieces(sequence)) == sequence.text()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("7", "digits"), (" 42", "digits"), (" the", "word"), ("The", "word"), ("ing", "part of a word"),
        ("'s", "part of a word"), ("don't", "part of a word"), (".", "punctuation"), (" =", "punctuation"),
        (" ", "space"), ("\t", "space"), (" \n", "line break"), ("<|im_end|>", "special"), ("</s>", "special"),
        ("", "other"), ("[INST]", "special"),
        ("a1", "other"), ("\ufffd", "other"), (" é", "word"), ("--", "punctuation"),
    ],
)  # fmt: skip
def test_token_classes(text: str, expected: str) -> None:
    assert token_class(text) == expected


def test_without_a_direction_there_is_no_score(tmp_path: Path) -> None:
    nothing = Said("", None, "nonfinite_vector", None, None)
    store, table = make_run(
        tmp_path, [Text(["a", "b"], {0: [nothing], 1: [Said("b")]}, norms={0: float("nan")})]
    )
    explained = Explained.read(store, table)
    data = page_data(store, explained)
    assert data["rows"]["norm"] == [None, 100] and data["explanations"]["rank"] == [None, 1]
    assert data["explanations"]["cos"] == [None, 0.9] and np.isnan(explained.fve[0])
    said = " ".join(warnings(store, explained))
    assert "NaN or Inf, 1 of 2 rows (50.0%)" in said and "Nothing to explain, 1 of 2 explanations" in said
    write_report(store, table, tmp_path / "x.html")


def test_a_run_of_nothing_but_zero_vectors(tmp_path: Path) -> None:
    nothing = {0: [Said("", None, "zero_vector", None, None)]}
    store, table = make_run(
        tmp_path, [Text(["a"], nothing, norms={0: 0.0})], variance=float("nan"), variance_rows=0
    )
    write_report(store, table, tmp_path / "x.html")
    explained = Explained.read(store, table)
    assert data_of(tmp_path / "x.html")["variance"] is None
    assert [figure.value for figure in figures(explained)] == ["-", "-", "-", "0%"]
    assert [text.split(",")[0] for text in warnings(store, explained)] == [
        "Few cases",
        "Early positions",
        "Nothing to explain",
    ]


def test_figures_are_those_of_the_round_trip(root: Path, tmp_path: Path) -> None:
    store, table = CaptureStore.open(root / "run.zarr"), root / "explained.parquet"
    explained = Explained.read(store, table)
    run = summarise(RoundtripOptions(store=store.path, av="av", ar="ar", out=table))
    shown = {figure.label: figure for figure in figures(explained)}
    assert shown["FVE"].value == f"{run.fve_nrm:.2f}".replace("-", "\u2212")
    assert shown["cos"].value == f"{run.cos:.3f}".replace("-", "\u2212")
    assert shown["cos"].control.startswith(f"{run.cos_shuffled:.3f} ".replace("-", "\u2212"))
    assert shown["retrieval"].value == f"{100 * run.retrieval_top1:.1f}%"
    assert shown["finished"].value == f"{100 * run.status_ok:.0f}%"
    assert f"{run.rows} activations of layer 2" in lead(store, explained)
    told = {name: value for pairs in facts(store, explained).values() for name, value in pairs}
    assert told["rows explained"] == f"{run.rows} of {store.rows}" and told["positions"] == "generated"
    assert told["Var"] == f"{run.variance:.4f}, measured on {run.variance_rows} rows of the store"


def test_warnings_in_plain_words(tmp_path: Path) -> None:
    tokens = ["t"] * 60
    rows = {place: [Said("x", cos_of(0.9))] for place in range(45, 60)}
    rows[50] = [Said("x", cos_of(-0.5))]
    rows[51] = [Said("x", cos_of(0.9), "unclosed")]
    rows[52] = [Said("x", cos_of(0.9), "untagged")]
    store, table = make_run(
        tmp_path, [Text(tokens, rows, norms={53: 900.0})], complete=False, run={"variance": 0.8}
    )
    said = warnings(store, Explained.read(store, table))
    assert [text.split(":")[0] for text in said] == [
        "Unfinished capture",
        "FVE below 0, 1 of 15 explanations (6.7%)",
        "Early positions, 5 of 15 rows (33.3%)",
        "Attention sinks, 1 of 15 rows (6.7%)",
        "Cut off, 1 of 15 explanations (6.7%)",
        "No opening tag, 1 of 15 explanations (6.7%)",
        "Var was given",
    ]
    assert (
        "before position 50. Whether this pair was trained on such rows is not known" in said[2]
        and "above 400 in layer 3" in said[3]
        and "64 tokens" in said[4]
        and "0.8" in said[6]
    )


def test_the_warning_of_early_positions_is_about_this_pair(tmp_path: Path) -> None:
    """Rows 3 to 7 are before position 8, rows 3 to 49 before 50."""
    text = Text(["t"] * 60, {place: [Said("x")] for place in range(3, 60)})

    def said(**metadata: Any) -> list[str]:
        store, table = make_run(tmp_path / str(len(list(tmp_path.iterdir()))), [text], **metadata)
        explained = Explained.read(store, table)
        assert page_data(store, explained)["early"]["known"] == (explained.trained_from is not None)
        return [each for each in warnings(store, explained) if each.startswith("Early positions")]

    assert said(av_min_position=0, ar_min_position=0) == []
    (warning,) = said(av_min_position=0, ar_min_position=8)
    assert "5 of 57 rows" in warning and "this pair was not trained on positions before 8" in warning
    (warning,) = said(av="kitft/nla-qwen2.5-7b-L20-av", ar="kitft/nla-qwen2.5-7b-L20-ar")
    assert "47 of 57 rows" in warning and "this pair was not trained on positions before 50" in warning
    for unknown in ({}, {"av_min_position": 0}, {"av": "kitft/nla-qwen2.5-7b-L20-av"}):
        (warning,) = said(**unknown)
        assert "47 of 57 rows" in warning and "is not known" in warning
    assert said(av=None, ar_min_position=0) == [], "the texts come from elsewhere"


def test_the_bundled_pair_is_not_warned_of_what_it_was_trained_on(tmp_path: Path) -> None:
    for role in ("av", "ar"):
        assert read_sidecar(TRIO / role, role).min_position == 0


def test_an_fve_below_zero_is_told_in_plain_words(tmp_path: Path) -> None:
    store, table = make_run(tmp_path, [Text(["t"] * 12, {i: [Said("x", cos_of(-0.01))] for i in range(12)})])
    explained = Explained.read(store, table)
    (fve,) = [figure for figure in figures(explained) if figure.label == "FVE"]
    assert fve.value == "\u22120.01" and "came back" not in fve.says
    assert fve.says == "below 0: the vectors rebuilt from the words are further off than their mean would be"
    write_report(store, table, tmp_path / "x.html")
    page = (tmp_path / "x.html").read_text()
    assert "<dt>closed</dt>" not in page and "of 12 explanations were written to their end" in page


def test_a_control_that_comes_close_is_said_first_and_a_clean_run_warns_of_nothing(tmp_path: Path) -> None:
    tokens, places = ["t"] * 60, range(50, 60)
    near = [Said("x", cos_of(0.5), cos_shuffled=cos_of(0.4))]
    store, table = make_run(tmp_path / "close", [Text(tokens, dict.fromkeys(places, near))])
    assert warnings(store, Explained.read(store, table))[0].startswith(
        "Close to the control: mean FVE is 0.50, and 0.40"
    )
    store, table = make_run(tmp_path, [Text(tokens, {place: [Said("x")] for place in places})])
    assert warnings(store, Explained.read(store, table)) == []
    write_report(store, table, tmp_path / "x.html")
    assert "Read with care" not in (tmp_path / "x.html").read_text()


def test_names_of_local_models_do_not_show_where_they_lie() -> None:
    assert short_name("/home/someone/secret/models/qwen") == "models/qwen"
    assert short_name("Qwen/Qwen2.5-7B-Instruct") == "Qwen/Qwen2.5-7B-Instruct"


def test_untrusted_text_never_becomes_markup(tmp_path: Path) -> None:
    text = Text(
        [HOSTILE, "b"],
        {0: [Said(HOSTILE, 0.9, "ok")], 1: [Said("b")]},
        record={HOSTILE: HOSTILE, "half": "\ud83d"},
    )
    store, table = make_run(tmp_path, [text], av=HOSTILE, ar=HOSTILE)
    out = tmp_path / "x.html"
    write_report(store, table, out, title=HOSTILE)
    page = out.read_text("utf-8")
    assert len(re.findall("<script", page)) == len(re.findall("</script", page)) == 2
    assert "<img" not in page and "pwned=1</script>" not in page and page.count("<!--") == 0
    data = data_of(out)
    assert data["explanations"]["text"][0] == HOSTILE and data["texts"][0] == HOSTILE
    assert data["sequences"]["fields"] == {HOSTILE: [HOSTILE], "half": ["\ud83d"]}
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//|@import|url\(""", page), (
        "the page needs a network"
    )


def test_sections_stand_as_they_are(tmp_path: Path) -> None:
    store, table = make_run(tmp_path, PLAIN)
    made = write_report(
        store,
        table,
        tmp_path / "x.html",
        sections=[Section("study", "A & B", "<table><td>{{title}}</td></table>")],
    )
    page = (tmp_path / "x.html").read_text()
    assert (
        'aria-controls="area-study">A &amp; B</button>' in page
        and "<table><td>{{title}}</td></table>" in page
    )
    assert made.sections == ("study",) and made.bytes == len((tmp_path / "x.html").read_bytes())
    for name in ("Study", "text", "run", "a b", "", '"'):
        with pytest.raises(RequestError, match="section id .* is taken or unfit"):
            write_report(store, table, tmp_path / "y.html", sections=[Section(name, "t", "")])
    assert not (tmp_path / "y.html").exists()


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    store, table = make_run(tmp_path, PLAIN)
    pages = [tmp_path / "a.html", tmp_path / "b.html"]
    for page in pages:
        write_report(store, table, page)
    assert pages[0].read_bytes() == pages[1].read_bytes()


def test_the_command(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    arguments = ["report", root / "run.zarr", "--explained", root / "explained.parquet", "--out", out]
    ran = call(*arguments, "--title", "Digits", "--json")
    assert ran.code == 0 and set(ran.json) == {field.name for field in dataclasses.fields(ReportSummary)}
    assert (
        ran.json["out"] == str(out) and ran.json["bytes"] == out.stat().st_size and ran.json["sequences"] == 5
    )
    assert "<title>Digits</title>" in out.read_text() and "Early positions" in ran.err
    before = contents(out)
    check_refused(call(*arguments), "report.html: exists: pass --overwrite")
    assert contents(out) == before
    ran = call(*arguments, "--overwrite")
    assert ran.code == 0 and "explanations  20" in ran.out and contents(out) != before
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def other_table(root: Path, directory: Path) -> Path:
    return make_run(directory, PLAIN)[1]


def cut_table(root: Path, directory: Path) -> Path:
    whole = (root / "explained.parquet").read_bytes()
    return written(directory / "cut.parquet", whole[: len(whole) // 2])


def half_done(directory: Path) -> Path:
    (directory / "half.parquet.parts").mkdir()
    return directory / "half.parquet"


FAULTS: dict[str, tuple[Callable[[Path, Path], dict[str, object]], str]] = {
    "no such table": (lambda r, t: {"explained": t / "none.parquet"}, "none.parquet: no such file"),
    "a table that is not finished": (
        lambda r, t: {"explained": half_done(t)},
        "half.parquet: no such file: its command with --resume finishes it",
    ),
    "no Parquet": (
        lambda r, t: {"explained": r / "prompts.jsonl"},
        "prompts.jsonl: cannot be read as Parquet",
    ),
    "half a table": (lambda r, t: {"explained": cut_table(r, t)}, "cut.parquet: cannot be read as Parquet"),
    "table of another store": (
        lambda r, t: {"explained": other_table(r, t)},
        "explained.parquet: explains another store than .*run.zarr",
    ),
    "no such store": (lambda r, t: {"store": t / "none.zarr"}, "none.zarr"),
    "a directory in the way": (lambda r, t: {"out": r, "overwrite": True}, "is a directory"),
    "onto its table": (
        lambda r, t: {"out": r / "explained.parquet", "overwrite": True},
        "is the table that the page is made of",
    ),
    "into the store": (lambda r, t: {"out": r / "run.zarr" / "x.html"}, "lies inside the store"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_command_refuses(fault: str, root: Path, tmp_path: Path) -> None:
    changes, message = FAULTS[fault]
    given = {"store": root / "run.zarr", "explained": root / "explained.parquet", "out": tmp_path / "x.html"}
    given |= changes(root, tmp_path)
    before = contents(root)
    command = ["report", given["store"], "--explained", given["explained"], "--out", given["out"]]
    check_refused(call(*command, *(["--overwrite"] if given.get("overwrite") else [])), message)
    assert contents(root) == before and not (tmp_path / "x.html").exists()


def test_a_table_that_names_rows_which_the_store_lacks(tmp_path: Path) -> None:
    small, _ = make_run(tmp_path / "small", [Text(["a", "b"], {1: [Said("b")]})])
    _, table = make_run(tmp_path, PLAIN)
    metadata = read_metadata(table) | {"options": {"store": small.attributes["store_id"]}}
    rows = pq.read_table(table)
    pq.write_table(rows.replace_schema_metadata({METADATA_KEY: json.dumps(metadata).encode()}), table)
    with pytest.raises(RequestError, match="its rows are not those of"):
        write_report(small, table, tmp_path / "x.html")


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    store, table = make_run(tmp_path, PLAIN)
    with pytest.raises(RequestError, match="file is no directory"):
        write_report(store, table, written(tmp_path / "file", "") / "x.html")
