"""Answers of oracles against plain transformers with hooks, from files in their families' layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import call, json_lines
from oracles import (
    LATENTQA,
    activation_oracle,
    answer,
    latentqa,
    oracle_tokenizer,
    save_decoder,
    save_oracle,
)
from store_samples import random_store
from tiny import D

import nla_engine
from nla_engine.config import AskOptions
from nla_engine.errors import RequestError
from nla_engine.roundtrip import ask
from nla_engine.roundtrip.results import ANSWERS, read_metadata
from nla_engine.store import CaptureStore

LAYER = 2
SIZES = [6, 1, 7]
QUESTIONS = ("What is it?", "Is it ? a number ?? Yes or no.")
TOKENIZER = oracle_tokenizer()
ADD = {"injection": "add@1", "norm_match": True}
WRITE = {
    "injection": "replace@0",
    "injection_scale": "raw",
    "raw": True,
    "prompt": LATENTQA,
    "placeholder": "? ",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    root = tmp_path_factory.mktemp("oracle")
    return root, save_oracle(root)


@pytest.fixture
def store(tmp_path: Path, rng: np.random.Generator) -> CaptureStore:
    vectors = 3 * rng.standard_normal((sum(SIZES), D)).astype(np.float32)
    return CaptureStore.open(random_store(tmp_path / "s.zarr", vectors, LAYER, sizes=SIZES))


def options(root: Path, store: CaptureStore, out: Path, **changes: Any) -> AskOptions:
    base = {
        "store": str(store.path),
        "oracle": str(root / "oracle"),
        "out": out,
        "device": "cpu",
        "dtype": "float32",
        "max_new_tokens": 12,
        "batch_size": 5,
    }
    if "questions" not in changes:
        base["question"] = QUESTIONS
    return AskOptions(**{**base, **(ADD if "injection" not in changes else {}), **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3_text"])
def test_a_question_per_run_to_an_activation_oracle(
    made: Any, store: CaptureStore, tmp_path: Path, architecture: str
) -> None:
    root, model = made
    if architecture != "qwen2":
        root = tmp_path
        model = save_oracle(root, architecture)
    out = tmp_path / "a.parquet"
    summary = nla_engine.run_ask(options(root, store, out, rows_per_prompt=3))
    groups = [[0, 1, 2], [3, 4, 5], [6], [7, 8, 9], [10, 11, 12], [13]]
    table = pq.read_table(out)
    assert table.schema.names == ANSWERS.names
    rows = table.to_pylist()
    assert [row["rows"] for row in rows] == [group for group in groups for _ in QUESTIONS]
    told = set()
    for row in rows:
        vectors = store.layer(LAYER)[np.array(row["rows"])]
        expected = answer(TOKENIZER, activation_oracle(model, TOKENIZER, LAYER, row["question"], vectors))
        assert (row["answer"], row["status"], row["n_tokens"]) == expected
        told.add(expected[0])
        first = row["rows"][0]
        assert (row["row"], row["sample"]) == (first, 0)
        assert row["sequence"] == store.column("sequence")[first]
        assert row["position"] == store.column("position")[first]
        assert row["norm"] == store.layer(LAYER).norm()[first]
    assert len(told) > len(QUESTIONS), "the vectors change nothing, so the test shows nothing"
    assert (summary.rows, summary.questions, summary.prompts, summary.answers) == (14, 2, 12, 12)
    assert sum(summary.status.values()) == 12
    metadata = read_metadata(out)
    assert metadata["oracle"] == str(root / "oracle") and metadata["oracle_base"] == str(root / "base")
    assert (metadata["injection"], metadata["norm_match"], metadata["injection_scale"]) == (
        "add@1",
        True,
        None,
    )
    assert metadata["message"] == "Layer: 2\n<INJECT> \n<QUESTION>" and metadata["placeholder"] == " ?"


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_question_per_row_or_rows(made: Any, store: CaptureStore, tmp_path: Path, kind: str) -> None:
    root, model = made
    asked = [("What now?", [5, 13, 2]), ("Why é?", [0]), ("What now?", [9]), ("Who?", [5])]
    records = [
        {"question": question, **({"row": rows[0]} if len(rows) == 1 else {"rows": rows})}
        for question, rows in asked
    ]
    path = tmp_path / f"q.{kind}"
    if kind == "jsonl":
        json_lines(path, records)
    else:
        pq.write_table(pa.Table.from_pylist(records, pa.schema(
            [("question", pa.string()), ("row", pa.int32()), ("rows", pa.list_(pa.int16()))]
        )), path)  # fmt: skip
    out = tmp_path / "a.parquet"
    nla_engine.run_ask(options(root, store, out, questions=path, kernels="fused"))
    table = pq.read_table(out).to_pylist()
    in_order = sorted(asked, key=lambda each: each[1][0])
    assert [(row["question"], row["rows"]) for row in table] == in_order
    for row in table:
        vectors = store.layer(LAYER)[np.array(row["rows"])]
        expected = answer(TOKENIZER, activation_oracle(model, TOKENIZER, LAYER, row["question"], vectors))
        assert (row["answer"], row["status"], row["n_tokens"]) == expected


def test_a_span_to_a_latentqa_decoder(made: Any, store: CaptureStore, tmp_path: Path) -> None:
    root, _ = made
    model = save_decoder(root)
    out = tmp_path / "a.parquet"
    how = {"rows_per_prompt": 100, "where": "position != 1", "question": QUESTIONS[:1]}
    nla_engine.run_ask(options(root, store, out, oracle=str(root / "decoder"), **WRITE, **how))
    table = pq.read_table(out).to_pylist()
    position = store.column("position")
    sequence = store.column("sequence")
    assert [row["rows"] for row in table] == [
        np.flatnonzero((position != 1) & (sequence == number)).tolist() for number in range(len(SIZES))
    ]
    for row in table:
        vectors = store.layer(LAYER)[np.array(row["rows"])]
        expected = answer(TOKENIZER, latentqa(model, TOKENIZER, QUESTIONS[0], vectors))
        assert (row["answer"], row["status"], row["n_tokens"]) == expected
    assert len({row["answer"] for row in table}) > 1


def test_vectors_without_a_direction_are_not_asked_about(
    made: Any, tmp_path: Path, rng: np.random.Generator
) -> None:
    root, model = made
    vectors = rng.standard_normal((8, D)).astype(np.float32)
    vectors[3], vectors[5, 1] = 0.0, np.inf
    store = CaptureStore.open(random_store(tmp_path / "s.zarr", vectors, LAYER, sizes=[8]))
    summary = nla_engine.run_ask(options(root, store, tmp_path / "a.parquet", rows_per_prompt=2))
    table = pq.read_table(tmp_path / "a.parquet").to_pylist()
    for row in table:
        bad = {2: "zero_vector", 4: "nonfinite_vector"}.get(row["row"])
        if bad:
            assert (row["answer"], row["status"], row["n_tokens"]) == ("", bad, 0)
        else:
            given = store.layer(LAYER)[np.array(row["rows"])]
            got = answer(TOKENIZER, activation_oracle(model, TOKENIZER, LAYER, row["question"], given))
            assert (row["answer"], row["status"], row["n_tokens"]) == got
    assert summary.status["zero_vector"] == summary.status["nonfinite_vector"] == len(QUESTIONS)
    nothing = CaptureStore.open(
        random_store(tmp_path / "n.zarr", np.zeros((2, D), np.float32), LAYER, sizes=[2])
    )
    assert nla_engine.run_ask(options(root, nothing, tmp_path / "n.parquet")).status == {"zero_vector": 4}


def test_prefill_system_message_and_a_prompt_of_ones_own(
    made: Any, store: CaptureStore, tmp_path: Path
) -> None:
    """Against the same prompt written out."""
    root, _ = made
    own = {"prompt": "A <INJECT>, B <INJECT>: <QUESTION>", "placeholder": "~", "rows_per_prompt": 2}
    own |= {"where": "sequence == 0", "prefill": " It is"}
    nla_engine.run_ask(options(root, store, tmp_path / "a.parquet", **own, system="Be short."))
    whole = (
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nA <INJECT>, B <INJECT>: <QUESTION><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    nla_engine.run_ask(options(root, store, tmp_path / "b.parquet", **{**own, "prompt": whole}, raw=True))
    first, second = (
        pq.read_table(tmp_path / name)["answer"].to_pylist() for name in ("a.parquet", "b.parquet")
    )
    assert first == second and all(text.startswith("It is") for text in first) and len(set(first)) > 1


SAMPLED = {"samples": 3, "max_new_tokens": 6, "temperature": 1.0, "seed": 4, "rows_per_prompt": 2}


@pytest.mark.parametrize("stop_after", [0, 2])
def test_interrupted_and_resumed_equals_uninterrupted(
    made: Any, store: CaptureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    root, _ = made
    monkeypatch.setattr(ask, "CHUNK", 7)  # two prompts
    monkeypatch.setattr(ask, "READ_AHEAD", 3)
    nla_engine.run_ask(options(root, store, tmp_path / "whole.parquet", **SAMPLED))
    real, calls = ask.AskRun.columns, []

    def fail_later(self: Any, chunk: Any) -> dict[str, object]:
        if len(calls) == stop_after:
            raise KeyboardInterrupt
        calls.append(1)
        return real(self, chunk)

    out = tmp_path / "x.parquet"
    with monkeypatch.context() as patch:
        patch.setattr(ask.AskRun, "columns", fail_later)
        with pytest.raises(KeyboardInterrupt):
            nla_engine.run_ask(options(root, store, out, **SAMPLED))
    assert not out.exists() and len(calls) == stop_after
    if stop_after:
        for change in ({"seed": 5}, {"rows_per_prompt": 3}, {"prefill": "No"}, {"question": QUESTIONS[:1]}):
            with pytest.raises(RequestError, match="made with other options"):
                nla_engine.run_ask(options(root, store, out, **{**SAMPLED, **change}, resume=True))
    said: list[str] = []
    nla_engine.run_ask(options(root, store, out, **SAMPLED, resume=True, batch_size=2), announce=said.append)
    assert ("(12 already there)" in said[-1]) == bool(stop_after)
    whole, mine = (pq.read_table(path) for path in (tmp_path / "whole.parquet", out))
    assert mine.replace_schema_metadata().equals(whole.replace_schema_metadata())
    assert not list(tmp_path.glob("*.parts")) and len(set(mine["answer"].to_pylist())) > 6


def test_limit_spreads_over_prompts_and_where_chooses_rows(
    made: Any, store: CaptureStore, tmp_path: Path
) -> None:
    root, _ = made
    few = {"max_new_tokens": 2, "rows_per_prompt": 2, "question": ("Who?",)}
    nla_engine.run_ask(options(root, store, tmp_path / "a.parquet", **few, limit=3))
    assert pq.read_table(tmp_path / "a.parquet")["rows"].to_pylist() == [[0, 1], [7, 8], [13]]
    nla_engine.run_ask(
        options(root, store, tmp_path / "b.parquet", **few, where="row >= 1 and row <= 5 or row > 8")
    )
    rows = pq.read_table(tmp_path / "b.parquet")["rows"].to_pylist()
    assert rows == [[1, 2], [3, 4], [5], [9, 10], [11, 12], [13]]


def test_the_command(made: Any, store: CaptureStore, tmp_path: Path) -> None:
    root, _ = made
    words = [
        "ask",
        store.path,
        "--oracle",
        root / "oracle",
        "--oracle-base",
        root / "base",
        "--device",
        "cpu",
    ]
    words += ["--injection", "add@1", "--norm-match", "--max-new-tokens", 4, "--json", "--out"]
    ran = call(*words, tmp_path / "a.parquet", "--question", QUESTIONS[0], "--question", QUESTIONS[1])
    assert ran.code == 0, ran.err
    assert ran.json["answers"] == 28 and ran.json["rows"] == 14 and "28 prompts about 14 rows" in ran.err
    table = pq.read_table(tmp_path / "a.parquet")
    assert table.num_rows == 28 and json.loads(table.schema.metadata[b"nla_engine"])["run"]["question"]
