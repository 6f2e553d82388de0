"""The table of lens against plain transformers, from capture to Parquet; resuming; what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from commands import LAYER, call, capture, check_refused, flags
from tiny import D, byte_tokenizer, save_model, tiny_model, write_records
from transformers import AutoModelForCausalLM

import nla_engine
from nla_engine.config import LensOptions
from nla_engine.errors import RequestError
from nla_engine.roundtrip import lens
from nla_engine.roundtrip.results import read_metadata
from nla_engine.store import CaptureStore

LAST = 3
K = 5


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, and run.zarr of three of its layers, stored exactly."""
    root = tmp_path_factory.mktemp("lens")
    save_model(root / "base")
    records = [{"prompt": f"say {i} " * (i + 1), "topic": {"n": i}} for i in range(4)]
    write_records(root, records).rename(root / "prompts.jsonl")
    every = {"layer": f"0,{LAYER},{LAST}", "positions": "all", "codec": "bf16", "dtype": "float32"}
    assert call(*capture(root, root / "run.zarr", **every)).code == 0
    return root


def options(root: Path, out: Path, **changes: Any) -> LensOptions:
    given = {
        "store": str(root / "run.zarr"),
        "model": str(root / "base"),
        "out": out,
        "device": "cpu",
        "top_k": K,
    }
    return LensOptions(**{**given, **changes})  # type: ignore[arg-type]


def expected(root: Path, store: CaptureStore, layer: int) -> np.ndarray:
    """log_softmax of the model's own norm and head, float64 [rows, V], of the rows as stored."""
    model = AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float32)
    with torch.inference_mode():
        states = model.model.norm(torch.from_numpy(store.layer(layer)[:]))
        return torch.log_softmax(model.lm_head(states).double(), -1).numpy()


def test_every_line_is_what_norm_and_head_say(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "lens.parquet"
    steps: list[tuple[int, int]] = []
    run = options(made, out, batch_size=7)
    summary = nla_engine.run_lens(run, progress=lambda *at: steps.append(at))
    store = CaptureStore.open(made / "run.zarr")
    table = pq.read_table(out)
    assert table.schema.names == [*lens.LENS.names, "record.prompt", "record.topic.n"]
    assert steps[0] == (0, store.rows) and steps[-1] == (store.rows, store.rows) and len(steps) > 9
    data = table.to_pylist()
    assert [(line["row"], line["layer"]) for line in data] == [
        (row, layer) for row in range(store.rows) for layer in store.layers
    ]
    texts = store.vocabulary
    following, sequence = store.column("next_token_id"), store.column("sequence")
    for at, layer in enumerate(store.layers):
        log, norms = expected(made, store, layer), store.layer(layer).norm()
        for row, line in enumerate(data[at :: len(store.layers)]):
            own, token = log[row], following[row]
            assert (line["sequence"], line["position"]) == (sequence[row], store.column("position")[row])
            assert line["record.topic.n"] == store.sequence(sequence[row]).source["topic"]["n"]
            assert line["norm"] == norms[row] and line["token"] == texts.text(store.column("token_id")[row])
            if token < 0:
                assert line["next_logprob"] is None and line["next_rank"] is None
            else:
                assert line["next_logprob"] == pytest.approx(own[token], abs=1e-4)
                assert (
                    abs(line["next_rank"] - 1 - (own > own[token]).sum())
                    <= (abs(own - own[token]) < 1e-4).sum() - 1
                )
            assert line["entropy"] == pytest.approx(-(np.exp(own) * own).sum(), abs=1e-4)
            assert line["top_logprob"] == pytest.approx(np.sort(own)[::-1][:K], abs=1e-4)
            assert own[line["top_id"]] == pytest.approx(line["top_logprob"], abs=1e-4)
            assert line["top_token"] == [texts.text(id_) for id_ in line["top_id"]]
    # Greedy replies: of the last block, the token that was generated is the likeliest.
    ends = store.column("generated") | store.column("prompt_end")
    last = [line["next_rank"] for line in data[2::3]]
    assert {rank for rank, end in zip(last, ends, strict=True) if end and rank is not None} == {1}
    assert (summary.layers, summary.rows) == ([0, LAYER, LAST], store.rows)
    known = [line["next_logprob"] for line in data[2::3] if line["next_logprob"] is not None]
    assert summary.next_logprob[str(LAST)] == pytest.approx(np.mean(known), abs=1e-5)
    metadata = read_metadata(out)
    assert metadata["layers"] == [0, LAYER, LAST] and metadata["weights"] == store.provenance["weights"]


def test_the_last_block_is_the_models_own_distribution(made: Path, tmp_path: Path) -> None:
    """Against a whole pass of transformers over the tokens, which never sees the store's vectors."""
    out = tmp_path / "lens.parquet"
    nla_engine.run_lens(options(made, out, layer=LAST))
    store = CaptureStore.open(made / "run.zarr")
    model = AutoModelForCausalLM.from_pretrained(made / "base", dtype=torch.float32)
    data = pq.read_table(out).to_pylist()
    for sequence in store.iter_sequences():
        ids = torch.from_numpy(sequence.tokens.astype(np.int64))[None]
        with torch.inference_mode():
            log = torch.log_softmax(model(ids).logits[0].double(), -1)
        for line in data[sequence.rows]:
            own = log[line["position"]].numpy()
            assert own[line["top_id"]] == pytest.approx(
                line["top_logprob"], abs=0.05
            )  # a row is rounded to bfloat16
            if line["next_logprob"] is not None:
                assert line["next_logprob"] == pytest.approx(
                    own[sequence.tokens[line["position"] + 1]], abs=0.1
                )


def test_a_run_resumes_and_a_table_is_protected(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole.parquet", tmp_path / "part.parquet"
    some = {"where": "position > 3", "limit": 30, "layer": (0, LAST), "batch_size": 4}
    nla_engine.run_lens(options(made, whole, **some))
    monkeypatch.setattr(lens, "CHUNK", 12)
    parts, write = [], lens.ResultTable.append

    def fails(self: Any, columns: Any) -> None:
        if len(parts) == 3:
            raise OSError("no more")
        write(self, columns)
        parts.append(len(columns["row"]))

    with monkeypatch.context() as patch:
        patch.setattr(lens.ResultTable, "append", fails)
        with pytest.raises(OSError, match="no more"):
            nla_engine.run_lens(options(made, out, **some))
    assert parts == [12, 12, 12] and not out.exists()
    for change in ({"top_k": 2}, {"layer": 0}, {"where": None}, {"limit": 29}):
        with pytest.raises(RequestError, match="was made with other options"):
            nla_engine.run_lens(options(made, out, **{**some, **change}, resume=True))
    said: list[str] = []
    nla_engine.run_lens(options(made, out, **some, resume=True), announce=said.append)
    assert said == ["30 rows of layers 0, 3, the likeliest 5 tokens of each (18 already there)"]
    one, other = pq.read_table(whole), pq.read_table(out)
    assert one.equals(other)
    with pytest.raises(RequestError, match="exists; pass --resume"):
        nla_engine.run_lens(options(made, out, **some))
    nla_engine.run_lens(options(made, out, limit=1, overwrite=True))
    assert len(pq.read_table(out)) == 3


def test_vectors_that_are_zero_or_not_finite(tmp_path: Path) -> None:
    save_model(tmp_path / "base")
    vectors = np.random.default_rng(0).standard_normal((5, D)).astype(np.float32)
    vectors[1], vectors[2, 3], vectors[3, 0] = 0, np.nan, np.inf
    np.save(tmp_path / "v.npy", vectors)
    assert call("import", tmp_path / "v.npy", "--out", tmp_path / "run.zarr", "--layer", LAYER).code == 0
    said: list[str] = []
    out = tmp_path / "l.parquet"
    nla_engine.run_lens(options(tmp_path, out), announce=said.append)
    data = pq.read_table(out).to_pylist()
    assert "does not say which model its rows are of: taken to be" in said[0]
    for row in (2, 3):
        assert {data[row][name] for name in ("entropy", "next_rank", "next_logprob")} == {None}
        assert data[row]["top_id"] is data[row]["top_token"] is data[row]["top_logprob"] is None
    assert data[1]["entropy"] == pytest.approx(np.log(259), abs=1e-4)  # the norm of zero is zero
    assert data[4]["entropy"] > 0 and data[4]["next_rank"] is None  # the file holds no tokens


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"layer": 1}, "--layer 1: .*run.zarr holds layer 0, 2, 3"),
    ({"layer": "x"}, "--layer is 'x': it must be block numbers"),
    ({"top_k": 0}, "--top-k is 0: it must be 1 or more"),
    ({"top_k": 260}, r"--top-k is 260: .*run.zarr has 259 tokens: lower it"),
    ({"where": "position > 999"}, "no row for --where"),
    ({"out": "l.csv"}, r"l.csv: ends in .csv, and the table is Parquet"),
    ({"out": "s3://bucket/l.parquet"}, "has to be on a local disk"),
    ({"resume": True, "overwrite": True}, "--resume and --overwrite exclude each other"),
    ({"batch_size": 0}, "--batch-size is 0"),
    ({"device": "tpu"}, "tpu"),
    ({"base": "none"}, "base is no adapter, it has weights of its own: leave --base out"),
    ({"model": "other"}, "--model other has the weights .* was captured from .*give that model, or --any-weights"),
    ({"model": "narrow", "any_weights": True}, "--model narrow has width 32, .* holds rows of width 64"),
    ({"model": "tokens", "any_weights": True}, "--model tokens has other tokens than .*: give the captured"),
    ({"model": "fewer", "any_weights": True}, r"--model fewer has other tokens .*\(259 tokens there\)"),
    ({"model": "shallow", "any_weights": True}, "layer 2 does not exist: shallow has 2 blocks"),
    ({"model": "nowhere"}, "nowhere"),
]  # fmt: skip


@pytest.fixture(scope="module")
def others(made: Path) -> Path:
    """Models beside the captured one."""
    save_model(made / "other", seed=7)
    save_model(made / "shallow", layers=2)
    for name, change in (("narrow", {"hidden_size": 32}), ("fewer", {"vocab_size": 300})):
        config = tiny_model("qwen2").config
        for key, value in change.items():
            setattr(config, key, value)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(made / name)
        byte_tokenizer().save_pretrained(made / name)
    save_model(made / "tokens")
    path = made / "tokens" / "tokenizer.json"
    path.write_text(path.read_text().replace("㈎", "㈏"))
    return made


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_what_is_refused_writes_nothing(
    others: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(others)
    before = sorted(others.iterdir())
    given = {"model": "base", "out": tmp_path / "l.parquet", "device": "cpu", **change}
    check_refused(call("lens", others / "run.zarr", *flags(given)), message)
    assert not list(tmp_path.iterdir()) and sorted(others.iterdir()) == before


def test_other_weights_may_be_allowed(others: Path, tmp_path: Path) -> None:
    ran = call("lens", others / "run.zarr", *flags({"model": others / "other", "out": tmp_path / "l.parquet",
               "any_weights": True, "layer": "2-3", "limit": 2, "device": "cpu", "json": True}))  # fmt: skip
    assert ran.code == 0 and "has other weights than the captured model" in ran.err
    assert ran.json["layers"] == [2, 3] and ran.json["rows"] == 2


def test_other_commands_refuse_the_table(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "l.parquet"
    nla_engine.run_lens(options(made, out, limit=2))
    ran = call("report", made / "run.zarr", "--explained", out, "--out", tmp_path / "r.html")
    check_refused(ran, "l.parquet: has no explanations: give the table that")
    assert not (tmp_path / "r.html").exists()
    ran = call("score", made / "run.zarr", *flags({"texts": out, "ar": "ar", "out": tmp_path / "s.parquet"}))
    check_refused(ran, "l.parquet: ")
