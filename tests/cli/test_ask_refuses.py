"""What ask refuses: one line, exit code 2, nothing written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import LAYER, Ran, call, check_refused, explain, flags, json_lines, score
from oracles import save_oracle
from store_samples import random_store
from tiny import D, save_model

ASKED = {"question": "Who?", "injection": "add@1", "norm_match": True}


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an oracle and its base, and a store of 9 rows in two sequences."""
    root = tmp_path_factory.mktemp("oracle")
    save_oracle(root)
    vectors = np.random.default_rng(0).standard_normal((9, D)).astype(np.float32)
    random_store(root / "run.zarr", vectors, LAYER, sizes=[5, 4])
    return root


def ask(root: Path, out: Path | str, **changes: Any) -> Ran:
    given = {"oracle": root / "oracle", "out": out, "device": "cpu", "max_new_tokens": 3, **ASKED, **changes}
    return call("ask", given.pop("store", root / "run.zarr"), *flags(given))


OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"question": None}, "no question: give --question, or --questions with a file"),
    ({"question": " \n"}, r"--question ' \\n' is empty: write a question"),
    ({"question": "of <INJECT>?"}, "holds <INJECT>, which has a meaning in prompts: leave it out"),
    ({"questions": "q.jsonl"}, "--question and --questions exclude each other"),
    (
        {"question": None, "questions": "q.jsonl", "where": "early", "limit": 2, "rows_per_prompt": 2},
        "--questions names its rows itself: leave --where and --limit and --rows-per-prompt out",
    ),
    (
        {"injection": None, "norm_match": None},
        "--injection is missing, .* give add@1 --norm-match for an activation oracle, replace@0 --injection-scale raw",
    ),
    ({"norm_match": None}, "--injection add@1 needs a norm .* --norm-match .* or --injection-scale"),
    ({"injection_scale": "raw"}, "--norm-match and --injection-scale exclude each other"),
    ({"injection": "add"}, "--injection is 'add': it must be replace, replace@L or add@L"),
    ({"injection_scale": "-3", "norm_match": None}, "--injection-scale is '-3': it must be a positive number"),
    ({"prompt": "<QUESTION>"}, "--prompt holds <INJECT> nowhere: put it in"),
    ({"prompt": "<INJECT>"}, "--prompt holds <QUESTION> nowhere"),
    ({"prompt": "<INJECT><QUESTION><QUESTION>"}, "--prompt holds <QUESTION> 2 times: put it in once"),
    ({"raw": True}, "--raw goes with --prompt"),
    ({"raw": True, "prompt": "<INJECT><QUESTION>", "system": "s"}, "--raw reads no chat template: leave --system"),
    ({"placeholder": "  "}, "--placeholder is ' +': it must be a text other than spaces"),
    ({"rows_per_prompt": 0}, "--rows-per-prompt is 0: it must be 1 or more"),
    ({"samples": 2}, "--samples above 1 would write one greedy text"),
    ({"precision": "fp8", "kernels": "reference"}, "fp8 has no reference kernels"),
    ({"resume": True, "overwrite": True}, "--resume and --overwrite exclude each other"),
]  # fmt: skip
MODELS: list[tuple[dict[str, Any], str]] = [
    ({"injection": "add@4"}, "--injection add@4: .* has blocks 0 to 3: name one of these"),
    ({"layer": 1}, "--layer 1: .*run.zarr holds layer 2"),
    ({"where": "position > 99"}, "no row for --where"),
    ({"placeholder": " !"}, "the placeholder ' !' is not one token of its own where vector 1 enters"),
    ({"placeholder": "né"}, "the placeholder 'né' is not one token"),
    (
        {"prompt": "<INJECT><INJECT><QUESTION>", "rows_per_prompt": 2},
        "the prompt holds 2 times <INJECT>, .* vectors: 1",
    ),
    ({"prompt": "a ?<INJECT> <QUESTION>", "placeholder": "?"}, None),
    ({"template_option": "enable_thinking=false"}, "enable_thinking, which the chat template does not read: leave"),
    ({"max_new_tokens": 500}, r"--max-new-tokens is 500: .* has room for \d+ after the longest prompt, which has"),
    ({"question": "x" * 600}, "has room for 0 after the longest prompt"),
    ({"oracle_base": "none/at all"}, "none/at all"),
    ({"device": "tpu"}, "tpu"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), OPTIONS, ids=lambda value: str(value)[:40])
def test_options(oracle: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    check_refused(ask(oracle, tmp_path / "x.parquet", **changes), message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("changes", "message"), MODELS, ids=lambda value: str(value)[:40])
def test_what_does_not_fit(
    oracle: Path, tmp_path: Path, changes: dict[str, Any], message: str | None
) -> None:
    ran = ask(oracle, tmp_path / "x.parquet", **changes)
    if message is None:
        assert ran.code == 0, ran.err
        return
    check_refused(ran, message)
    assert not list(tmp_path.iterdir())


RECORDS: list[tuple[Any, str]] = [
    ([{"question": "a", "row": 9}], r"line 1: row 9 is not in .*run.zarr, which has rows 0 to 8"),
    ([{"question": "a", "row": 0}, {"question": "a", "row": -1}], "line 2: row -1 is not in"),
    ([{"question": "a", "rows": [1, 2, 1]}], "line 1: row 1 stands twice in one prompt: leave one out"),
    (
        [{"question": "a", "rows": []}],
        r"line 1: rows is \[\]: it must be a list of row numbers, at least one",
    ),
    ([{"question": "a", "rows": 3}], "line 1: rows is 3: it must be a list"),
    ([{"question": "a", "row": 1, "rows": [2]}], "line 1: needs row or rows, one of the two"),
    ([{"question": "a"}], "line 1: needs row or rows, one of the two"),
    ([{"question": "a", "row": True}], "line 1: row True is not an integer"),
    ([{"question": "a", "rows": [1, "2"]}], "line 1: row '2' is not an integer"),
    ([{"row": 1}], "line 1: has no field question"),
    ([{"question": "", "row": 1}], "line 1: question is empty"),
    ([{"question": "<QUESTION>", "row": 1}], "line 1: question holds <QUESTION>"),
    ([{"question": "\ud800", "row": 1}], "line 1: question holds half of a surrogate pair"),
    ([{"question": 3, "row": 1}], "line 1: question is 3: it must be a string"),
    ([{"question": None, "row": 1}], "line 1: question is None: it must be a string"),
    (["a"], "line 1: is not an object"),
    ([], "holds no questions: there is nothing to ask"),
]


@pytest.mark.parametrize(("records", "message"), RECORDS, ids=lambda value: str(value)[:40])
def test_files_of_questions(oracle: Path, tmp_path: Path, records: Any, message: str) -> None:
    path = json_lines(tmp_path / "q.jsonl", records)
    ran = ask(oracle, tmp_path / "x.parquet", question=None, questions=path)
    check_refused(ran, message)
    assert [each.name for each in tmp_path.iterdir()] == ["q.jsonl"]


def test_other_files_of_questions(oracle: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"question": \n')
    (tmp_path / "bad.parquet").write_text("no")
    (tmp_path / "q.csv").write_text("question,row\na,1\n")
    (tmp_path / "d.jsonl").mkdir()
    pq.write_table(pa.table({"question": ["a"], "row": [1.0]}), tmp_path / "float.parquet")
    out = tmp_path / "x.parquet"
    for name, message in [
        ("bad.jsonl", "bad.jsonl, line 1: not JSON"),
        ("bad.parquet", "bad.parquet: cannot be read as Parquet"),
        ("q.csv", "questions are read from .jsonl and .parquet alone: convert it"),
        ("d.jsonl", "d.jsonl: is a directory: give a file of questions"),
        ("none.jsonl", "none.jsonl: no such file: give a file of questions"),
        ("float.parquet", "row 1: row 1.0 is not an integer"),
    ]:
        check_refused(ask(oracle, out, question=None, questions=tmp_path / name), message)
    assert not list(tmp_path.glob("x.parquet*"))


def test_models_and_stores(oracle: Path, tmp_path: Path, root: Path) -> None:
    out = tmp_path / "x.parquet"
    narrow = random_store(tmp_path / "n.zarr", np.ones((2, 32), np.float32), LAYER)
    check_refused(
        ask(oracle, out, store=narrow), "reads vectors of width 64, .*n.zarr holds 32: give an oracle of"
    )
    check_refused(
        ask(oracle, out, oracle=root / "av"), "has a nla_meta.yaml, so it is an AV or AR: use explain"
    )
    check_refused(ask(oracle, out, oracle_base=tmp_path / "nowhere"), "nowhere")
    check_refused(
        ask(oracle, out, oracle=oracle / "base", oracle_base=oracle / "base"),
        "is no adapter, it has weights of its own: leave --oracle-base out",
    )
    plain = shutil.copytree(oracle / "base", tmp_path / "plain")
    (plain / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((plain / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (plain / "tokenizer_config.json").write_text(json.dumps(config))
    check_refused(ask(oracle, out, oracle=plain), "has no chat template: give --raw, and a --prompt")
    assert ask(oracle, out, oracle=plain, raw=True, prompt="<INJECT> <QUESTION>").code == 0
    adapter = shutil.copytree(oracle / "oracle", tmp_path / "unnamed")
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    check_refused(
        ask(oracle, tmp_path / "y.parquet", oracle=adapter),
        "does not name the base of this adapter: pass --oracle-base",
    )
    wide = save_model(tmp_path / "other", layers=2)
    check_refused(
        ask(oracle, tmp_path / "y.parquet", oracle=oracle / "oracle", oracle_base=wide), "other|blocks|layers"
    )


def test_tables_of_others(oracle: Path, tmp_path: Path, root: Path) -> None:
    out = tmp_path / "a.parquet"
    assert ask(oracle, out).code == 0
    before = out.read_bytes()
    check_refused(ask(oracle, "s3://bucket/x.parquet"), "has to be on a local disk")
    check_refused(ask(oracle, out), "a.parquet: exists; pass --resume .*--overwrite")
    check_refused(
        ask(oracle, out, resume=True, question="What?"),
        "content of questions differs",
    )
    check_refused(
        call(*score(root, tmp_path / "s.parquet", out, store=oracle / "run.zarr")),
        "a.parquet: is the table of ask, whose answers to questions are no explanations",
    )
    explained = tmp_path / "e.parquet"
    assert call(*explain(root, explained, limit=2)).code == 0
    check_refused(
        ask(oracle, explained, resume=True, store=root / "run.zarr"),
        "made with other options .*oracle was not given",
    )
    check_refused(call(*explain(root, out), "--resume"), "made with other options")
    check_refused(
        call("report", root / "run.zarr", "--explained", out, "--out", tmp_path / "r.html"),
        "explains another store",
    )
    assert out.read_bytes() == before and {p.name for p in tmp_path.iterdir()} == {"a.parquet", "e.parquet"}
    assert ask(oracle, out, overwrite=True, question="What?").code == 0 and out.read_bytes() != before
