"""Dry runs of ask: they check what a run checks, say what it would do, and write nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from commands import Ran, call, check_refused, contents, flags
from oracles import save_oracle
from store_samples import random_store
from tiny import D

from nla_engine.config import AskOptions
from nla_engine.errors import RequestError
from nla_engine.roundtrip import ask_estimate
from nla_engine.roundtrip.ask import run_ask

QUESTIONS = ("What is it?", "Is it a number? Yes or no.")
SIZES = [20, 9, 1]
ROWS = sum(SIZES)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An oracle and its base, a store, and one in which no vector has a direction."""
    root = tmp_path_factory.mktemp("oracle")
    save_oracle(root)
    vectors = 3 * np.random.default_rng().standard_normal((ROWS, D)).astype(np.float32)
    vectors[:9] = 0
    random_store(root / "run.zarr", vectors, 2, sizes=SIZES)
    random_store(root / "nothing.zarr", np.zeros((4, D), np.float32), 2, sizes=[4])
    return root


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine is just now."""
    monkeypatch.setattr(ask_estimate._measure, "__defaults__", (math.inf,))


def dry(root: Path, out: Path, store: str = "run.zarr", **changes: object) -> Ran:
    """ask, as a dry run with its numbers unless told otherwise."""
    given: dict[str, object] = {
        "oracle": root / "oracle",
        "out": out,
        "injection": "add@1",
        "norm_match": True,
    }
    given |= {"max_new_tokens": 12, "device": "cpu", "dry_run": True, "json": True}
    given |= changes
    asked = [word for question in QUESTIONS for word in ("--question", question)]
    return call("ask", root / store, *asked, *flags({k: v for k, v in given.items() if v is not False}))


@pytest.mark.usefixtures("unhurried")
def test_it_says_what_the_run_would_do_and_writes_nothing(root: Path, tmp_path: Path) -> None:
    before = contents(root)
    ran = dry(root, tmp_path / "a.parquet")
    assert ran.code == 0, ran.err
    assert contents(root) == before and not list(tmp_path.iterdir())
    told = ran.json
    assert told["dry_run"] is True and told["layer"] == 2 and told["already_done"] == 0
    assert (told["rows"], told["questions"], told["prompts"]) == (ROWS, 2, 2 * ROWS)
    assert told["answers"] == 2 * ROWS and told["sample_answers"] == 32
    assert 0 < told["seconds_expected"] < 600 and told["answers_per_second"] > 0
    assert f"{2 * ROWS} prompts about {ROWS} rows of layer 2, an answer each" in ran.err
    assert "the first prompt of the oracle, " in ran.err
    assert "Layer: 2" in ran.err and QUESTIONS[0] in ran.err and QUESTIONS[1] not in ran.err
    assert dry(root, tmp_path / "a.parquet", dry_run=False).code == 0
    table = pq.read_table(tmp_path / "a.parquet")
    tokens = table["n_tokens"].to_numpy()
    assert told["tokens_per_answer"] == pytest.approx(tokens[tokens > 0].mean(), rel=0.35)
    assert 0.2 < told["bytes_expected"] / (tmp_path / "a.parquet").stat().st_size < 2


@pytest.mark.usefixtures("unhurried")
def test_what_is_measured_are_answers_of_the_run(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    real = ask_estimate._measure

    def seeing(*given: Any) -> Any:
        seen.append(real(*given))
        return seen[-1]

    monkeypatch.setattr(ask_estimate, "_measure", seeing)
    how = {"samples": 2, "temperature": 1.0, "seed": 3, "rows_per_prompt": 3, "batch_size": 5}
    told = dry(root, tmp_path / "a.parquet", **how).json
    assert (told["prompts"], told["answers"], told["rows"]) == (22, 44, ROWS)
    assert dry(root, tmp_path / "a.parquet", **how, dry_run=False).code == 0
    rows = pq.read_table(tmp_path / "a.parquet").to_pylist()
    (answers, _), *_ = seen
    assert len(answers) == told["sample_answers"] == 32
    for each in answers:
        row = rows[each.prompt * 2 + each.sample]
        assert (row["sample"], row["answer"], row["n_tokens"], row["status"]) == (
            each.sample,
            each.text,
            each.n_tokens,
            each.status,
        )
        assert each.n_tokens > 0, "of prompts that are asked"


def test_a_slow_oracle_ends_the_sample_in_time(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no time at all, one short answer still tells the size; and the time comes from the steps that were made."""
    monkeypatch.setattr(ask_estimate._measure, "__defaults__", (0.0,))
    told = dry(root, tmp_path / "a.parquet", max_new_tokens=64).json
    assert 1 <= told["sample_answers"] < 32 and told["bytes_expected"] > 0
    assert told["seconds_expected"] is None or told["seconds_expected"] > 0
    assert dry(root, tmp_path / "a.parquet", max_new_tokens=64, dry_run=False).code == 0
    assert 0.2 < told["bytes_expected"] / (tmp_path / "a.parquet").stat().st_size < 4


@pytest.mark.usefixtures("unhurried")
def test_vectors_without_a_direction_take_no_time(root: Path, tmp_path: Path) -> None:
    told = dry(root, tmp_path / "a.parquet", "nothing.zarr").json
    assert told["answers"] == told["sample_answers"] == 8 and told["bytes_expected"] > 0
    assert told["seconds_expected"] == told["tokens_per_answer"] == 0 and told["answers_per_second"] is None


@pytest.mark.usefixtures("unhurried")
def test_what_an_earlier_run_left(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.parquet"
    assert dry(root, out, dry_run=False, limit=3).code == 0
    told = dry(root, out, limit=3, resume=True).json
    assert told["already_done"] == told["answers"] == 6 and told["seconds_expected"] == 0
    assert told["sample_answers"] == 0 and told["tokens_per_answer"] is told["bytes_expected"] is None
    check_refused(dry(root, out, limit=3), "exists already|--resume")
    check_refused(dry(root, out, limit=3, resume=True, seed=1), "was made with other options .*seed was 0")
    assert dry(root, out, limit=3, overwrite=True).json["already_done"] == 0
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 99999}, "has room for"),
        ({"where": "position == 99999"}, "has no row for --where"),
        ({"layer": 7}, "--layer 7: .* holds layer 2"),
        ({"placeholder": "two tokens"}, "placeholder"),
    ],
    ids=["no room", "no rows", "no layer", "no placeholder"],
)
def test_it_refuses_what_the_run_refuses(
    root: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    check_refused(dry(root, tmp_path / "a.parquet", **changes), message)
    assert not list(tmp_path.iterdir())


def test_the_python_function_names_the_one_to_call(root: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"store": str(root / "run.zarr"), "oracle": str(root / "oracle")}
    given |= {"out": tmp_path / "a.parquet", "question": QUESTIONS, "injection": "add@1", "norm_match": True}
    with pytest.raises(RequestError, match="estimate_ask"):
        run_ask(AskOptions(**given, dry_run=True))
    assert not list(tmp_path.iterdir())
