"""An AR alone, on texts from anywhere: against numpy in float64 and plain transformers; what is refused."""

from __future__ import annotations

import datetime
import json
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from commands import LAYER, call, explain, json_lines, roundtrip, score, written
from safetensors.torch import load_file
from store_samples import random_store
from tiny import D, byte_tokenizer

import nla_engine
from nla_engine.config import ExplainOptions, RoundtripOptions, ScoreOptions
from nla_engine.errors import RequestError
from nla_engine.roundtrip import job, pipeline
from nla_engine.roundtrip.results import SCHEMA, read_metadata
from nla_engine.store import CaptureStore

SAMPLED = {"samples": 3, "temperature": 1.0, "seed": 4}


@pytest.fixture
def vectors(rng: np.random.Generator) -> np.ndarray:
    """Random rows around a common direction, one of them zero and one not finite; representable in bfloat16."""
    x = rng.standard_normal((14, D)) + rng.standard_normal(D)
    x[3], x[8, 1] = 0.0, np.inf
    return torch.from_numpy(x).bfloat16().float().numpy()


@pytest.fixture
def store(tmp_path: Path, vectors: np.ndarray) -> Path:
    return random_store(tmp_path / "random.zarr", vectors, LAYER, sizes=[6, 3, 5])


def options(root: Path, store: Path, texts: Path, out: Path, **changes: object) -> ScoreOptions:
    base = {"store": str(store), "ar": str(root / "ar"), "texts": texts, "out": out, "device": "cpu"}
    return ScoreOptions(**{**base, **changes})  # type: ignore[arg-type]


def explained(root: Path, store: Path, out: Path, **changes: object) -> Path:
    given = {"store": str(store), "av": str(root / "av"), "out": out, "device": "cpu", "max_new_tokens": 10}
    nla_engine.run_explain(ExplainOptions(**{**given, **changes}))  # type: ignore[arg-type]
    return out


@pytest.mark.parametrize("how", [{}, SAMPLED, {"where": "position > 0", "limit": 5}])
def test_explain_then_score_is_a_round_trip(
    root: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: dict[str, object]
) -> None:
    monkeypatch.setattr(pipeline, "CHUNK", 8)
    monkeypatch.setattr(job, "CONTROL_ROWS", 4)
    texts = explained(root, store, tmp_path / "e.parquet", **how)
    seed = how.get("seed", 0)
    mine = nla_engine.run_score(options(root, store, texts, tmp_path / "s.parquet", seed=seed))
    given = {"store": str(store), "av": str(root / "av"), "ar": str(root / "ar"), "max_new_tokens": 10}
    theirs = nla_engine.run_roundtrip(
        RoundtripOptions(**{**given, "out": tmp_path / "r.parquet", "device": "cpu", **how})  # type: ignore[arg-type]
    )
    tables = [pq.read_table(tmp_path / f"{name}.parquet") for name in "sr"]
    assert tables[0].replace_schema_metadata().equals(tables[1].replace_schema_metadata())
    apart = {"out": "", "seconds": 0, "seconds_by_phase": {}, "rows_per_second": 0}
    assert mine.to_dict() | apart == theirs.to_dict() | apart
    made, whole = (read_metadata(tmp_path / f"{name}.parquet") for name in "sr")
    for name in set(whole) - {"run", "options", "started", "command", "speed"}:
        assert made[name] == whole[name], name
    again = nla_engine.run_score(
        options(root, store, tmp_path / "s.parquet", tmp_path / "again.parquet", seed=seed)
    )
    assert again.to_dict() | apart == mine.to_dict() | apart, "a table with scores is scored anew"
    assert read_metadata(tmp_path / "again.parquet")["explained"] == made["explained"]


def plain_reading(ar: Path, text: str) -> np.ndarray:
    """transformers alone, one text: the AR's vector, float64 [d]."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(ar, dtype=torch.float32)
    last: list[torch.Tensor] = []
    model.layers[LAYER].register_forward_hook(
        lambda _m, _i, output: last.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        model(torch.tensor([byte_tokenizer().encode(f"Summary of <text>{text}</text> <summary>")]))
    head = load_file(ar / "value_head.safetensors")["weight"]
    return (last[0][0, -1].double() @ head.double().T).numpy()


def test_any_texts_against_numpy_and_plain_transformers(
    root: Path, store: Path, vectors: np.ndarray, tmp_path: Path, rng: np.random.Generator
) -> None:
    letters = list("abc {}é㈎\n<> ")
    records = [
        {"row": int(row), "text": "".join(rng.choice(letters, int(rng.integers(0, 30)))), "n": n}
        for n, row in enumerate(rng.integers(0, len(vectors), 20))
    ]
    records += [{"row": 3, "text": "of a zero vector", "n": 20}, {"row": 8, "text": "of Inf", "n": 21}]
    summary = nla_engine.run_score(
        options(root, store, json_lines(tmp_path / "t.jsonl", records), tmp_path / "s.parquet")
    )
    table = pq.read_table(tmp_path / "s.parquet").to_pylist()
    expected = sorted(records, key=lambda record: record["row"])  # stable: samples in the order of the file
    assert [(row["row"], row["explanation"], row["n"]) for row in table] == [
        (record["row"], record["text"], record["n"]) for record in expected
    ]
    with np.errstate(invalid="ignore", divide="ignore"):
        unit = vectors.astype(np.float64)
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    sound = [row for row in range(len(vectors)) if row not in (3, 8)]
    variance = float(((unit[sound] - unit[sound].mean(0)) ** 2).sum(1).mean())
    baseline = float(
        ((unit[sound] - unit[sound].mean(0) / np.linalg.norm(unit[sound].mean(0))) ** 2).sum(1).mean()
    )
    among = sorted({row["row"] for row in table} & set(sound))
    sequence = CaptureStore.open(store).column("sequence")[:]
    for row in table:
        if row["row"] in (3, 8):
            assert row["status"] == {3: "zero_vector", 8: "nonfinite_vector"}[row["row"]]
            assert all(row[name] is None for name in ("cos", "mse_nrm", "fve_nrm", "retrieval_rank"))
            continue
        r = plain_reading(root / "ar", row["explanation"])
        r /= np.linalg.norm(r)
        cos = float(unit[row["row"]] @ r)
        mse = float(((unit[row["row"]] - r) ** 2).sum())
        assert row["status"] == "given" and row["n_tokens"] is None
        assert row["cos"] == pytest.approx(cos, abs=1e-5)
        assert row["mse_nrm"] == pytest.approx(mse, abs=2e-5)
        assert row["fve_nrm"] == pytest.approx(1 - mse / variance, abs=1e-4)
        assert row["fve_meannorm"] == pytest.approx(1 - mse / baseline, abs=1e-4)
        others = np.array([unit[other] @ r for other in among if other != row["row"]])
        if abs(others - cos).min() > 1e-5:
            assert row["retrieval_rank"] == 1 + (others > cos).sum()
        elsewhere = [unit[other] @ r for other in among if sequence[other] != sequence[row["row"]]]
        assert not elsewhere or abs(np.array(elsewhere) - row["cos_shuffled"]).min() < 1e-5
    for row in {row["row"] for row in table}:
        group = [each for each in table if each["row"] == row]
        assert [each["sample"] for each in group] == list(range(len(group)))
        highest = max(each["cos"] if each["cos"] is not None else -2 for each in group)
        best = [each for each in group if each["best"]]
        assert len(best) == 1 and best[0]["cos"] in (highest, None)
    assert (summary.explanations, summary.rows) == (22, len({record["row"] for record in records}))
    assert summary.status_ok is None and summary.n_tokens is None and summary.status["given"] > 0
    assert summary.variance == pytest.approx(variance, abs=1e-5) and summary.variance_rows == len(sound)
    scored = [row["cos"] for row in table if row["cos"] is not None]
    assert summary.cos == pytest.approx(np.mean(scored), abs=1e-6)


def test_other_columns_are_kept_with_their_types(root: Path, store: Path, tmp_path: Path) -> None:
    day = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
    further = {
        "float16": pa.array([1.5, None, 2.5], pa.float16()),
        "uint8": pa.array([1, 2, None], pa.uint8()),
        "when": pa.array([day, None, day], pa.timestamp("us", "Europe/Berlin")),
        "author": pa.array(["me", "you", "me"]).dictionary_encode(),
        "tags": pa.array([["a"], [], None], pa.list_(pa.large_string())),
        "nested": pa.array([{"a": 1, "b": "x"}, None, {"a": None, "b": "y"}]),
        "price": pa.array([Decimal("1.10"), None, Decimal("2.20")], pa.decimal128(8, 2)),
        "raw": pa.array([b"\x00", b"", None]),
        "nothing": pa.nulls(3),
        "text2": pa.array(["</script>", "㈎", ""], pa.large_string()),
    }
    table = pa.table(
        {
            "text": pa.array(["c", "a", "b"]).dictionary_encode(),
            "row": pa.array([9, 2, 9], pa.uint16()),
            **further,
        }
    )
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=2)
    nla_engine.run_score(options(root, store, tmp_path / "t.parquet", tmp_path / "s.parquet"))
    made = pq.read_table(tmp_path / "s.parquet")
    assert made.column_names == [*SCHEMA.names, *further]
    assert made["explanation"].to_pylist() == ["a", "c", "b"] and made["sample"].to_pylist() == [0, 0, 1]
    for name in further:
        assert made[name].type == table[name].type, name
        assert made[name].to_pylist() == [table[name].to_pylist()[i] for i in (1, 0, 2)], name


def test_json_fields_are_kept_with_their_types(root: Path, store: Path, tmp_path: Path) -> None:
    records = [
        {
            "text": "a",
            "row": 5,
            "when": "2026-01-02T03:04:05",
            "n": 1,
            "x": 1,
            "ok": True,
            "deep": {"a": [1, 2]},
        },
        {"row": 1, "text": "b", "n": 1 << 60, "x": 0.5, "ok": None, "deep": {"a": []}},
    ]
    lines = json.dumps(records[0]) + "\n\n" + json.dumps(records[1])
    texts = written(tmp_path / "t.jsonl", "\ufeff" + lines)
    nla_engine.run_score(options(root, store, texts, tmp_path / "s.parquet"))
    made = pq.read_table(tmp_path / "s.parquet").select(["when", "n", "x", "ok", "deep"])
    assert made.to_pylist() == [
        {"when": None, "n": 1 << 60, "x": 0.5, "ok": None, "deep": {"a": []}},
        {"when": "2026-01-02T03:04:05", "n": 1, "x": 1.0, "ok": True, "deep": {"a": [1, 2]}},
    ]
    types = {field.name: str(field.type) for field in made.schema}
    assert types["when"] == "string" and types["n"] == "int64" and types["ok"] == "bool"


@pytest.mark.parametrize("stop_after", [0, 2])
def test_interrupted_and_resumed_equals_uninterrupted(
    root: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    monkeypatch.setattr(pipeline, "CHUNK", 4)
    records = [{"row": i * 5 % 13, "text": f"text {i}", "n": i} for i in range(18)]
    texts = json_lines(tmp_path / "t.jsonl", records)
    nla_engine.run_score(options(root, store, texts, tmp_path / "whole.parquet"))
    real, calls = pipeline.Pipeline._score, []

    def fail_later(self: pipeline.Pipeline, chunk: pipeline.Explained) -> dict[str, object]:
        if len(calls) == stop_after:
            raise KeyboardInterrupt
        calls.append(len(chunk.rows))
        return real(self, chunk)

    out = tmp_path / "x.parquet"
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.Pipeline, "_score", fail_later)
        with pytest.raises(KeyboardInterrupt):
            nla_engine.run_score(options(root, store, texts, out))
    if stop_after:
        with pytest.raises(RequestError, match="--resume"):
            nla_engine.run_score(options(root, store, texts, out))
        json_lines(tmp_path / "u.jsonl", [*records[:-1], {"row": 0, "text": "another"}])
        with pytest.raises(RequestError, match="was made with other options .*the content of texts differs"):
            nla_engine.run_score(options(root, store, tmp_path / "u.jsonl", out, resume=True))
    said: list[str] = []
    nla_engine.run_score(options(root, store, texts, out, resume=True), announce=said.append)
    assert not stop_after or f"13 rows of layer 2, 18 texts ({sum(calls)} already there)" in said
    whole, mine = (
        pq.read_table(path).replace_schema_metadata() for path in (tmp_path / "whole.parquet", out)
    )
    assert mine.equals(whole) and not list(tmp_path.glob("*.parts"))


def test_a_text_longer_than_the_ar_reads(root: Path, store: Path, tmp_path: Path) -> None:
    around = len(byte_tokenizer().encode("Summary of <text></text> <summary>"))
    fits = json_lines(tmp_path / "fits.jsonl", [{"row": 1, "text": "x" * (512 - around)}])
    nla_engine.run_score(options(root, store, fits, tmp_path / "s.parquet"))
    long = json_lines(tmp_path / "long.jsonl", [{"row": 1, "text": "x" * (513 - around)}])
    with pytest.raises(
        RequestError, match="long.jsonl: row 1: text and prompt are 513 tokens, .*at most 512"
    ):
        nla_engine.run_score(options(root, store, long, tmp_path / "l.parquet"))
    assert not list(tmp_path.glob("l.parquet*"))


def test_the_commands(root: Path, tmp_path: Path) -> None:
    """explain and score, and a round trip: the same lines."""
    assert call(*explain(root, tmp_path / "e.parquet")).code == 0
    ran = call(*score(root, tmp_path / "s.parquet", tmp_path / "e.parquet", json=True))
    whole = call(*roundtrip(root, tmp_path / "r.parquet", json=True))
    assert ran.code == whole.code == 0 and "20 rows of layer 2, 20 texts" in ran.err
    apart = {"out": "", "seconds": 0, "seconds_by_phase": {}, "rows_per_second": 0}
    assert ran.json | apart == whole.json | apart
    again = call(*score(root, tmp_path / "s.parquet", tmp_path / "e.parquet", resume=True, json=True))
    assert again.json | apart == whole.json | apart, "a finished result is told again"
