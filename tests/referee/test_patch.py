"""The table of patch against plain transformers and numpy in float64; resuming; planted texts on the bundled models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from commands import LAYER, call, json_lines, patch
from plain_pair import plain_state
from safetensors.torch import load_file
from store_samples import VOCABULARY, random_store
from tiny import D
from transformers import AutoModelForCausalLM

import nla_engine
from nla_engine.config import PatchOptions
from nla_engine.demo.problems import held_out_problems, prompt_record
from nla_engine.demo.run import demo_models
from nla_engine.models.load import load_model
from nla_engine.referee import run
from nla_engine.roundtrip.results import ResultTable, read_metadata
from nla_engine.store import CaptureStore

SIZES = [9, 4, 7]
#: Rows without a direction.
ZERO_ROW, INF_ROW = 3, 15


class Plain:
    """The captured model by transformers alone."""

    def __init__(self, directory: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)

    def read(self, ids: np.ndarray, position: int = 0, vector: np.ndarray | None = None) -> tuple:
        """Log-probabilities float64 [T, V] of the next tokens, and block outputs [T, d]; one of them may be patched."""
        held = []

        def hook(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            if vector is not None:
                hidden[0, position] = torch.from_numpy(vector).float()
            held.append(hidden[0].clone())
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handle = self.model.model.layers[LAYER].register_forward_hook(hook)
        with torch.no_grad():
            logits = self.model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0].double()
        handle.remove()
        return logits.log_softmax(-1).numpy(), held[0].numpy()


@pytest.fixture(scope="module")
def plain(root: Path) -> Plain:
    return Plain(root / "base")


@pytest.fixture(scope="module")
def store(root: Path, plain: Plain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of three sequences as transformers computes them, two of them spoilt."""
    rows = [plain.read(np.arange(size) % len(VOCABULARY))[1] for size in SIZES]
    vectors = torch.from_numpy(np.concatenate(rows)).bfloat16().float().numpy()
    vectors[ZERO_ROW], vectors[INF_ROW, 1] = 0.0, np.inf
    made = {"model": str(root / "base"), "dtype": "float32"}
    made["weights"] = load_model(root / "base", device="cpu", dtype="float32").fingerprint()
    path = tmp_path_factory.mktemp("patched") / "made.zarr"
    return random_store(path, vectors, LAYER, SIZES, provenance=made)


def plain_reading(ar: Path, text: str) -> np.ndarray:
    """The AR's vector of a text, float64 [d]."""
    head = load_file(ar / "value_head.safetensors")["weight"].double().numpy()
    return head @ plain_state(ar, f"Summary of <text>{text}</text> <summary>", LAYER).astype(np.float64)


def options(root: Path, store: Path, explained: Path, out: Path, **changes: object) -> PatchOptions:
    given = {"store": str(store), "model": str(root / "base"), "explained": explained, "out": out}
    return PatchOptions(**{**given, "ar": str(root / "ar"), "device": "cpu", **changes})  # type: ignore[arg-type]


def random_texts(path: Path, rng: np.random.Generator, count: int = 18) -> Path:
    letters, total = list("abc {}é\n<> "), sum(SIZES)
    rows = [*rng.integers(0, total, count).tolist(), ZERO_ROW, INF_ROW, 0, total - 1]
    texts = ["".join(rng.choice(letters, int(rng.integers(0, 20)))) for _ in rows]
    return json_lines(
        path, [{"row": r, "text": t, "n": n} for n, (r, t) in enumerate(zip(rows, texts, strict=True))]
    )


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("norm", ["row", "raw", "number"])
def test_the_table_is_that_of_plain_transformers(
    norm: str, root: Path, store: Path, plain: Plain, tmp_path: Path, rng: np.random.Generator, monkeypatch
) -> None:
    few = rng.integers(1, (9, 30)).tolist()
    texts_at_once, tokens_at_once = {"row": (1000, 1000), "raw": (1, 1), "number": few}[norm]
    monkeypatch.setattr(run, "_TEXTS", {"cpu": texts_at_once})
    monkeypatch.setattr(run, "_TOKENS", {"cpu": tokens_at_once})
    norm = f"{rng.uniform(1, 30):.4f}" if norm == "number" else norm
    horizon = int(rng.integers(1, 4))
    texts = random_texts(tmp_path / "t.jsonl", rng)
    out = tmp_path / "p.parquet"
    summary = nla_engine.run_patch(options(root, store, texts, out, norm=norm, horizon=horizon))
    table = pq.read_table(out).to_pylist()
    records = sorted(map(json.loads, texts.read_text().splitlines()), key=lambda record: record["row"])
    assert [(r["row"], r["explanation"], r["n"]) for r in table] == [
        (r["row"], r["text"], r["n"]) for r in records
    ]
    opened = CaptureStore.open(store)
    stored = opened.layer(LAYER)[:].astype(np.float64)
    sound = [row for row in range(len(stored)) if row not in (ZERO_ROW, INF_ROW)]
    mean = unit(unit(stored[sound]).mean(0))
    read = [plain_reading(root / "ar", record["text"]) for record in records]
    sequence = opened.column("sequence")
    expected_kl, expected_mean = [], []
    for record, row, vector in zip(records, table, read, strict=True):
        number = record["row"]
        if number in (ZERO_ROW, INF_ROW):
            assert all(
                row[name] is None for name in row if name.startswith(("kl", "top1", "log", "loss", "cos"))
            )
            assert row["status"] == {ZERO_ROW: "zero_vector", INF_ROW: "nonfinite_vector"}[number]
            continue
        ids, at = np.arange(SIZES[sequence[number]]) % len(VOCABULARY), row["position"]
        own, _ = plain.read(ids)
        of_row = np.linalg.norm(stored[number])
        length = of_row if norm in ("row", "raw") else float(norm)
        scaled = (
            (lambda v, length=length: v) if norm == "raw" else (lambda v, length=length: unit(v) * length)
        )
        vectors = {
            "": scaled(vector),
            "_mean": mean * length,
            "_zero": np.zeros(D),
            "_stored": stored[number],
        }
        assert row["cos"] == pytest.approx(float(unit(vector) @ unit(stored[number])), abs=1e-5)
        found = {}
        for variant, patched in vectors.items():
            new, _ = plain.read(ids, at, patched)
            kl = (np.exp(own) * (own - new)).sum(1)
            same, following = own.argmax(1) == new.argmax(1), ids[at + 1 : at + 2 + horizon]
            change = [new[at + i, token] - own[at + i, token] for i, token in enumerate(following)]
            found[variant] = kl[at]
            assert row["kl" + variant] == pytest.approx(kl[at], abs=2e-5, rel=2e-3)
            assert row["top1_same" + variant] == same[at]
            if len(change):
                assert row["logprob_change" + variant] == pytest.approx(change[0], abs=1e-3)
            else:
                assert row["logprob_change" + variant] is None and at == len(ids) - 1
            behind = slice(at + 1, at + 1 + horizon)
            if len(kl[behind]):
                assert row["later_kl" + variant] == pytest.approx(kl[behind].mean(), abs=2e-5, rel=2e-3)
                assert row["later_top1_same" + variant] == pytest.approx(same[behind].mean())
            else:
                assert row["later_kl" + variant] is None and row["later_top1_same" + variant] is None
            if len(change) > 1:
                assert row["later_logprob_change" + variant] == pytest.approx(np.mean(change[1:]), abs=1e-3)
        assert row["later_positions"] == min(horizon, len(ids) - 1 - at)
        assert row["loss_recovered"] == pytest.approx(1 - found[""] / found["_mean"], abs=2e-3, rel=2e-3)
        expected_kl.append(found[""])
        expected_mean.append(found["_mean"])
        others = [
            (np.exp(own[at]) * (own[at] - plain.read(ids, at, scaled(other))[0][at])).sum()
            for each, other in zip(records, read, strict=True)
            if sequence[each["row"]] != sequence[number]
        ]
        assert np.isclose(others, row["kl_shuffled"], atol=2e-5, rtol=2e-3).any()
    assert summary.patched == len(expected_kl) and summary.explanations == len(table)
    assert summary.measures["kl"] == pytest.approx(np.mean(expected_kl), rel=2e-3)
    assert summary.loss_recovered == pytest.approx(
        1 - np.mean(expected_kl) / np.mean(expected_mean), abs=5e-3
    )
    assert summary.measures["kl_stored"] < 0.05 * summary.measures["kl_mean"], (
        "rounding to bfloat16 is no patch"
    )
    made = read_metadata(out)
    assert made["weights"] == opened.provenance["weights"] and made["control_rows"] >= 2
    assert "later_kl" in summary.to_dict() and summary.to_dict()["horizon"] == horizon


def test_interrupted_and_resumed_equals_uninterrupted(
    root: Path, store: Path, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_TEXTS", {"cpu": 4})
    texts = random_texts(tmp_path / "t.jsonl", rng)
    how = {"where": "position > 0", "limit": 9}
    whole, parts = tmp_path / "whole.parquet", tmp_path / "parts.parquet"
    nla_engine.run_patch(options(root, store, texts, whole, **how))
    append, left = ResultTable.append, int(rng.integers(0, 3))

    def interrupted(self: ResultTable, columns: dict) -> None:
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        append(self, columns)

    with monkeypatch.context() as interrupting:
        interrupting.setattr(ResultTable, "append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            nla_engine.run_patch(options(root, store, texts, parts, **how))
    assert not parts.exists()
    seen: list[tuple[int, int]] = []
    nla_engine.run_patch(
        options(root, store, texts, parts, **how, resume=True), progress=lambda *done: seen.append(done)
    )
    tables = [pq.read_table(path) for path in (whole, parts)]
    assert tables[0].replace_schema_metadata().equals(tables[1].replace_schema_metadata())
    assert len({*tables[0]["row"].to_pylist()}) <= 9 and min(tables[0]["position"].to_pylist()) > 0
    assert seen[-1] == (len(tables[0]), len(tables[0]))
    again = nla_engine.run_patch(options(root, store, texts, whole, **how, resume=True))
    assert again.rows_per_second == 0.0 and again.explanations == len(tables[0])
    for change in ({"norm": "3"}, {"horizon": 1}, {"seed": 1}, {"limit": 8}):
        with pytest.raises(nla_engine.NLAError, match="made with other options"):
            nla_engine.run_patch(options(root, store, texts, whole, **{**how, **change}, resume=True))


def test_the_command_reads_the_ar_that_the_table_names(root: Path, tmp_path: Path) -> None:
    ran = call(*patch(root, tmp_path / "a.parquet", json=True))
    assert ran.code == 0, ran.err
    given = call(*patch(root, tmp_path / "b.parquet", ar=root / "ar", dtype="float32", json=True))
    facts, same = ran.json, given.json
    assert facts["kl"] == same["kl"] and facts["loss_recovered"] == same["loss_recovered"]
    assert facts["rows"] == CaptureStore.open(root / "run.zarr").rows and facts["kl_zero"] is not None
    assert [name for name in facts if name.startswith("later")] == []
    scores = pq.read_table(root / "explained.parquet")["cos"].to_pylist()
    assert pq.read_table(tmp_path / "a.parquet")["cos"].to_pylist() == pytest.approx(scores, abs=1e-5)
    rounded = call(*patch(root, tmp_path / "c.parquet", dtype="bfloat16", json=True))
    assert rounded.code == 0 and rounded.json["kl_mean"] == pytest.approx(facts["kl_mean"], rel=0.3)


def test_planted_texts_on_the_bundled_models(tmp_path: Path) -> None:
    """The verbalizer's own texts recover most of the loss; texts of other rows, and one text for all, do not."""
    trio = demo_models()
    records = [prompt_record(problem) for problem in held_out_problems(4, 1)]
    prompts = json_lines(tmp_path / "problems.jsonl", records)
    store = tmp_path / "run.zarr"
    captured = call(
        *("capture", trio.base, "--prompts", prompts, "--layer", trio.layer, "--out", store),
        *("--max-new-tokens", 16, "--device", "cpu"),
    )
    assert captured.code == 0, captured.err
    explained = tmp_path / "explained.parquet"
    made = call(
        *("roundtrip", store, "--av", trio.av, "--ar", trio.ar, "--out", explained, "--limit", 16),
        *("--device", "cpu", "--max-new-tokens", 80),
    )
    assert made.code == 0, made.err
    table = pq.read_table(explained).to_pylist()
    others = [next(t for t in table[::-1] if t["sequence"] != row["sequence"]) for row in table]
    planted = {
        "own": table,
        "of other rows": [
            {**row, "explanation": o["explanation"]} for row, o in zip(table, others, strict=True)
        ],
        "one for all": [{**row, "explanation": table[0]["explanation"]} for row in table],
    }
    recovered = {}
    for name, rows in planted.items():
        texts = json_lines(tmp_path / "t.jsonl", [{"row": r["row"], "text": r["explanation"]} for r in rows])
        ran = call(
            *("patch", store, "--model", trio.base, "--ar", trio.ar, "--explained", texts),
            *("--out", tmp_path / f"{name}.parquet", "--device", "cpu", "--json"),
        )
        assert ran.code == 0, ran.err
        recovered[name] = ran.json["loss_recovered"]
        assert ran.json["kl_stored"] < 0.01 * ran.json["kl_mean"]
    own = pq.read_table(tmp_path / "own.parquet").to_pylist()
    assert recovered["own"] > 0.6 and np.mean([row["top1_same"] for row in own]) > 0.75
    assert recovered["of other rows"] < 0.3 and recovered["one for all"] < 0.3
    for control in ("mean", "shuffled", "zero"):
        assert np.mean([row["kl"] < row[f"kl_{control}"] for row in own]) > 0.75


@pytest.mark.gpu
def test_the_command_on_a_gpu(root: Path, tmp_path: Path) -> None:
    """In float32 the columns of a CPU; in bfloat16 nearly the same means."""
    assert call(*patch(root, tmp_path / "cpu.parquet", horizon=2)).code == 0
    want = pq.read_table(tmp_path / "cpu.parquet")
    for dtype, near in (("float32", {"rel": 1e-2, "abs": 1e-3}), ("bfloat16", {"rel": 0.3, "abs": 0.3})):
        out = tmp_path / f"{dtype}.parquet"
        ran = call(*patch(root, out, horizon=2, device="cuda", dtype=dtype, json=True))
        assert ran.code == 0, ran.err
        made = pq.read_table(out)
        assert made.schema.names == want.schema.names and made["row"] == want["row"]
        for name in ("kl_mean", "kl_zero", "kl_stored", "later_kl_mean"):
            mean = np.nanmean(want[name].to_numpy())
            assert ran.json[name] == pytest.approx(mean, **near)
            if dtype == "float32":
                np.testing.assert_allclose(made[name].to_numpy(), want[name].to_numpy(), 1e-2, 1e-3)
