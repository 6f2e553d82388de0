"""Dry runs of stage 2: they check what a run checks, say what it would do, and write nothing. On the bundled trio."""

from __future__ import annotations

import importlib.resources
import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from commands import Ran, call, check_refused, contents, flags, json_lines

from nla_engine.config import ExplainOptions, RoundtripOptions
from nla_engine.errors import RequestError
from nla_engine.roundtrip import estimate
from nla_engine.roundtrip.run import run_explain, run_roundtrip
from nla_engine.store import CaptureStore

TRIO = Path(str(importlib.resources.files("nla_engine"))) / "demo" / "trio"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the bundled base, its explanations by the commands, and these as a file of texts."""
    root = tmp_path_factory.mktemp("dry")
    prompts = [f"What is {a} * {a + 31}?" for a in (23, 47, 68)]
    (root / "p.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    given = {"prompts": root / "p.jsonl", "layer": 5, "out": root / "run.zarr", "device": "cpu"}
    assert call("capture", TRIO / "base", *flags(given)).code == 0
    assert dry(root, "roundtrip", root / "x.parquet", dry_run=False).code == 0
    rows = pq.read_table(root / "x.parquet", columns=["row", "explanation"]).to_pylist()
    json_lines(root / "t.jsonl", [{"row": row["row"], "text": row["explanation"]} for row in rows])
    return root


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole sample is taken, however slow the machine is just now."""
    monkeypatch.setattr(estimate._write, "__defaults__", (math.inf,))
    monkeypatch.setattr(estimate, "SCORE_SECONDS", math.inf)


def dry(root: Path, command: str, out: Path, **changes: object) -> Ran:
    """A command on the bundled trio, as a dry run with its numbers unless told otherwise."""
    options: dict[str, object] = {"out": out, "device": "cpu", "dry_run": True, "json": True}
    if command != "score":
        options |= {"av": TRIO / "av", "max_new_tokens": 64}
    if command != "explain":
        options["ar"] = TRIO / "ar"
    if command == "score":
        options["texts"] = root / "x.parquet"
    options |= changes
    return call(command, root / "run.zarr", *flags({k: v for k, v in options.items() if v is not False}))


@pytest.mark.parametrize("command", ["roundtrip", "explain", "score"])
def test_it_says_what_the_run_would_do_and_writes_nothing(store: Path, tmp_path: Path, command: str) -> None:
    before = contents(store)
    ran = dry(store, command, tmp_path / "y.parquet")
    assert ran.code == 0, ran.err
    assert contents(store) == before and not list(tmp_path.iterdir())
    rows = CaptureStore.open(store / "run.zarr").rows
    told = ran.json
    assert told["dry_run"] is True and told["layer"] == 5 and told["already_done"] == 0
    assert told["rows"] == told["texts"] == rows
    assert 0 < told["seconds_expected"] < 600 and told["rows_per_second"] > 0
    assert 0 < told["sample_texts"] <= min(rows, 32)
    assert f"{rows:,} rows of layer 5" in ran.err and "the first prompt of the A" in ran.err
    if command == "score":
        first = pq.read_table(store / "x.parquet")["explanation"][0].as_py()
        assert first[:20] in ran.err
        assert told["tokens_per_text"] is None
    else:
        assert "This vector is one thought" in ran.err
        real = np.mean(pq.read_table(store / "x.parquet")["n_tokens"].to_numpy())
        assert told["tokens_per_text"] == pytest.approx(real, rel=0.35)
        assert dry(store, command, tmp_path / "y.parquet", dry_run=False).code == 0
        size = (tmp_path / "y.parquet").stat().st_size
        assert 0.2 * size < told["bytes_expected"] < 2 * size


def test_samples_and_a_selection(store: Path, tmp_path: Path) -> None:
    told = dry(store, "roundtrip", tmp_path / "y.parquet", samples=3, temperature=1.0, limit=4).json
    assert (told["rows"], told["texts"], told["sample_texts"]) == (4, 12, 12)


def test_a_slow_model_ends_the_sample_in_time(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no time at all, one short text still tells the size; and the time comes from the steps that were made."""
    monkeypatch.setattr(estimate._write, "__defaults__", (0.0,))
    told = dry(store, "roundtrip", tmp_path / "y.parquet").json
    assert told["sample_texts"] == 1 and told["tokens_per_text"] == 64
    assert told["bytes_expected"] > 0 and told["seconds_expected"] > 0


def test_what_an_earlier_run_left(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.parquet"
    out.write_bytes((store / "x.parquet").read_bytes())
    told = dry(store, "roundtrip", out, resume=True).json
    assert told["already_done"] == told["texts"] and told["seconds_expected"] == 0
    check_refused(dry(store, "roundtrip", out), "exists already|--resume")
    check_refused(
        dry(store, "roundtrip", out, resume=True, seed=1),
        "was made with other options .*seed was 0, is now 1",
    )
    assert dry(store, "roundtrip", out, overwrite=True).json["already_done"] == 0
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("command", "changes", "message"),
    [
        ("roundtrip", {"ar": TRIO / "av"}, "swap --av and --ar"),
        ("explain", {"max_new_tokens": 99999}, "has room for"),
        ("explain", {"where": "position == 99999"}, "has no row for --where"),
        ("explain", {"follow": True}, "--dry-run .*--follow|--follow .*--dry-run"),
        ("score", {"texts": "none.parquet"}, "no such file"),
        ("score", {"layer": 3}, "are about layer 5: leave --layer out"),
    ],
    ids=["an AV as AR", "no room", "no rows", "a store that grows", "no texts", "another layer"],
)
def test_it_refuses_what_the_run_refuses(
    store: Path, tmp_path: Path, command: str, changes: dict[str, object], message: str
) -> None:
    check_refused(dry(store, command, tmp_path / "y.parquet", **changes), message)
    assert not list(tmp_path.iterdir())


def test_the_python_functions_name_the_one_to_call(store: Path, tmp_path: Path) -> None:
    given = {
        "store": str(store / "run.zarr"),
        "av": str(TRIO / "av"),
        "out": tmp_path / "y.parquet",
        "dry_run": True,
    }
    with pytest.raises(RequestError, match="estimate_stage_two"):
        run_explain(ExplainOptions(**given))  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="estimate_stage_two"):
        run_roundtrip(RoundtripOptions(**given, ar=str(TRIO / "ar")))  # type: ignore[arg-type]
