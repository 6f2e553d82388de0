"""The second stage against a plain-transformers round trip, one vector at a time; resume; samples; bad vectors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from plain_pair import plain_state, plain_text
from safetensors.torch import load_file
from tiny import D, byte_tokenizer, save_ar, save_av, save_model, write_prompts

from nla_engine.capture.run import run_capture
from nla_engine.codec.rows import Codec
from nla_engine.config import CaptureOptions, RoundtripOptions
from nla_engine.engine.generator import Generator
from nla_engine.engine.request import Completion
from nla_engine.errors import RequestError, StoreError
from nla_engine.models import source
from nla_engine.models.load import load_model
from nla_engine.ops.backends import Kernels
from nla_engine.ops.sampling import Sampling
from nla_engine.roundtrip import pipeline
from nla_engine.roundtrip.reconstruct import Reconstructor
from nla_engine.roundtrip.results import read_metadata
from nla_engine.roundtrip.rows import select_rows
from nla_engine.roundtrip.run import run_roundtrip
from nla_engine.roundtrip.summary import summarise
from nla_engine.roundtrip.verbalize import Verbalizer, parse_explanation
from nla_engine.store import CaptureStore, Finish, LayerRows, SequenceRows, StoreWriter, row_flags

LAYER = 2
CPU = {"device": torch.device("cpu"), "dtype": torch.float32}


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, av, ar checkpoints of one architecture, and a captured store."""
    root = tmp_path_factory.mktemp("trio")
    save_model(root / "base")
    save_av(root / "av", LAYER)
    save_ar(root / "ar", LAYER)
    write_prompts(root / "prompts.jsonl", 6)
    run_capture(
        CaptureOptions(
            model=str(root / "base"),
            prompts=root / "prompts.jsonl",
            layer=(LAYER,),
            out=root / "run.zarr",
            max_new_tokens=6,
            codec="bf16",
            device="cpu",
        )
    )
    return root


def options(trio: Path, out: Path, **changes: object) -> RoundtripOptions:
    base = {
        "store": trio / "run.zarr",
        "av": str(trio / "av"),
        "ar": str(trio / "ar"),
        "out": out,
        "device": "cpu",
    }
    return RoundtripOptions(**{**base, "max_new_tokens": 24, "batch_size": 7, **changes})  # type: ignore[arg-type]


def plain_round_trip(trio: Path, vector: np.ndarray) -> tuple[str, np.ndarray]:
    """The reference: transformers alone, batch 1. Returns the AV's text and the AR's vector."""
    explanation = plain_text(trio / "av", vector)
    state = plain_state(trio / "ar", f"Summary of <text>{explanation}</text> <summary>", LAYER)
    return explanation, load_file(trio / "ar" / "value_head.safetensors")["weight"].numpy() @ state


def test_whole_stage_equals_a_plain_round_trip(trio: Path, tmp_path: Path) -> None:
    run_roundtrip(options(trio, tmp_path / "x.parquet"))
    store = CaptureStore.open(trio / "run.zarr")
    table = pq.read_table(tmp_path / "x.parquet").to_pylist()
    assert [row["row"] for row in table] == list(range(store.rows))
    units = store.layer(LAYER)[:].astype(np.float64)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    variance = ((units - units.mean(0)) ** 2).sum(1).mean()
    for row in table[::5]:
        explanation, r = plain_round_trip(trio, store.layer(LAYER)[row["row"]])
        assert row["explanation"] == explanation
        cos = float(units[row["row"]] @ r / np.linalg.norm(r))
        assert row["cos"] == pytest.approx(cos, abs=1e-5)
        assert row["mse_nrm"] == pytest.approx(2 - 2 * cos, abs=2e-5)
        assert row["fve_nrm"] == pytest.approx(1 - (2 - 2 * cos) / variance, abs=1e-4)
        assert row["token"] == store.token_text([store.column("token_id")[row["row"]]])[0]
    metadata = read_metadata(tmp_path / "x.parquet")
    assert metadata["variance"] == pytest.approx(variance, abs=1e-6)
    assert metadata["variance_rows"] == store.rows


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gemma3"])
def test_reconstructor_equals_transformers(architecture: str, tmp_path: Path) -> None:
    from transformers import AutoModel

    save_ar(tmp_path / "ar", LAYER, architecture)
    texts = ["a {brace} b", "", "longer text " * 9, "x"]
    got = Reconstructor.load(str(tmp_path / "ar"), **CPU).reconstruct(texts)
    model = AutoModel.from_pretrained(tmp_path / "ar", dtype=torch.float32)
    decoder = model.get_decoder()
    head = load_file(tmp_path / "ar" / "value_head.safetensors")["weight"]
    seen: list[torch.Tensor] = []
    decoder.layers[LAYER].register_forward_hook(
        lambda _m, _i, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    for text, r in zip(texts, got, strict=True):
        ids = byte_tokenizer().encode(f"Summary of <text>{text}</text> <summary>")
        with torch.no_grad():
            decoder(torch.tensor([ids]))
        assert np.allclose(r, (seen[-1][0, -1] @ head.T).numpy(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stop_after", [0, 1, 2])
def test_interrupted_and_resumed_equals_uninterrupted(
    trio: Path, tmp_path: Path, monkeypatch, stop_after: int
) -> None:
    monkeypatch.setattr(pipeline, "CHUNK", 8)
    sampled = {"samples": 2, "temperature": 0.9, "seed": 4}
    run_roundtrip(options(trio, tmp_path / "whole.parquet", **sampled))
    real, calls = pipeline.Pipeline._score, []

    def fail_later(self, chunk):
        if len(calls) == stop_after:
            raise KeyboardInterrupt
        calls.append(1)
        return real(self, chunk)

    monkeypatch.setattr(pipeline.Pipeline, "_score", fail_later)
    out = tmp_path / "x.parquet"
    with pytest.raises(KeyboardInterrupt):
        run_roundtrip(options(trio, out, **sampled))
    assert not out.exists()
    monkeypatch.setattr(pipeline.Pipeline, "_score", real)
    if stop_after:
        with pytest.raises(RequestError, match="--resume"):
            run_roundtrip(options(trio, out, **sampled))
        with pytest.raises(RequestError, match="seed was 4, is now 5"):
            run_roundtrip(options(trio, out, **{**sampled, "seed": 5}, resume=True))
    else:  # no part was written: nothing blocks another run
        assert not list(tmp_path.glob("x.parquet*"))
    run_roundtrip(options(trio, out, **sampled, resume=True, batch_size=3))
    columns = ["row", "sample", "explanation", "best", "retrieval_rank", "status"]
    whole, resumed = (pq.read_table(path, columns=columns) for path in (tmp_path / "whole.parquet", out))
    assert resumed.equals(whole)
    assert not list(tmp_path.glob("*.parts")) and not list(tmp_path.glob("*.tmp"))
    again = run_roundtrip(options(trio, out, **sampled, resume=True))
    assert again.explanations == len(whole)


def test_resuming_over_another_store_is_refused(trio: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.parquet"
    run_roundtrip(options(trio, out, limit=4))
    other = hand_made_store(tmp_path / "made.zarr", np.ones((9, D), np.float32))
    with pytest.raises(RequestError, match="store was"):
        run_roundtrip(options(trio, out, limit=4, store=other, resume=True))
    with pytest.raises(RequestError, match="the content of selection differs"):
        run_roundtrip(options(trio, out, limit=4, where="row > 5", resume=True))


def test_samples_mark_the_best_of_each_row(trio: Path, tmp_path: Path) -> None:
    summary = run_roundtrip(options(trio, tmp_path / "x.parquet", samples=3, temperature=1.0, limit=5))
    rows = pq.read_table(tmp_path / "x.parquet").to_pylist()
    assert len(rows) == 15 and summary.rows == 5
    for start in range(0, 15, 3):
        group = rows[start : start + 3]
        assert [row["sample"] for row in group] == [0, 1, 2] and len({row["row"] for row in group}) == 1
        assert [row["best"] for row in group] == [row["cos"] == max(r["cos"] for r in group) for row in group]
    assert len({row["explanation"] for row in rows}) > 5
    assert summary.cos_best >= summary.cos


def hand_made_store(path: Path, vectors: np.ndarray) -> Path:
    """A store of one sequence with these rows."""
    codec = Codec.named("bf16", D)
    ids = np.arange(len(vectors), dtype=np.int32) + 5
    position = np.arange(len(vectors), dtype=np.int32)
    rows = SequenceRows(
        token_id=ids,
        next_token_id=np.append(ids[1:], np.int32(-1)),
        position=position,
        flags=row_flags(position, len(ids), len(ids), nonfinite=~np.isfinite(vectors).all(1)),
        layers={LAYER: LayerRows.encode(codec, vectors, float("inf"))},
        tokens=ids,
        prompt_size=len(ids),
        finish=Finish.GIVEN,
        source=b"{}",
    )
    with StoreWriter.create(
        path,
        layers=[LAYER],
        codec=codec,
        sink_norm={LAYER: float("inf")},
        vocabulary=[bytes([i]) for i in range(256)],
        provenance={},
        options={},
    ) as writer:
        writer.append(rows)
    return path


def test_vectors_without_a_direction_get_a_status(trio: Path, tmp_path: Path, rng) -> None:
    vectors = rng.standard_normal((5, D)).astype(np.float32)
    vectors[1], vectors[3, 2] = 0.0, np.nan
    store = hand_made_store(tmp_path / "made.zarr", vectors)
    summary = run_roundtrip(options(trio, tmp_path / "x.parquet", store=store))
    rows = pq.read_table(tmp_path / "x.parquet").to_pylist()
    assert [row["status"] for row in rows[1:4:2]] == ["zero_vector", "nonfinite_vector"]
    assert [row["cos"] is None for row in rows] == [False, True, False, True, False]
    assert summary.retrieval_sample == 3


def test_selection(trio: Path, tmp_path: Path) -> None:
    store = CaptureStore.open(trio / "run.zarr")
    some = options(trio, tmp_path / "x.parquet", where="sequence_end and sequence < 3")
    assert (
        select_rows(store, some).tolist() == np.flatnonzero(store.column("next_token_id") == -1)[:3].tolist()
    )
    with pytest.raises(StoreError, match="no row for --where"):
        run_roundtrip(options(trio, tmp_path / "x.parquet", where="position > 9999"))
    limited = select_rows(store, options(trio, tmp_path / "x.parquet", limit=4))
    assert len(limited) == 4 and limited[0] == 0 and limited[-1] == store.rows - 1


def test_what_does_not_fit_together_is_refused(trio: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.parquet"
    av, ar = save_av(tmp_path / "av1", 1), save_ar(tmp_path / "ar1", 1)
    with pytest.raises(RequestError, match="holds layer 2, the AV and AR were made for layer 1"):
        run_roundtrip(options(trio, out, av=str(av), ar=str(ar)))
    with pytest.raises(RequestError, match="reads layer 2, .* gives layer 1"):
        run_roundtrip(options(trio, out, ar=str(ar)))
    with pytest.raises(RequestError, match="--layer 3: .* made for layer 2"):
        run_roundtrip(options(trio, out, layer=3))
    with pytest.raises(RequestError, match=r"--max-new-tokens is 5000: .*av has room for \d+: lower it"):
        run_roundtrip(options(trio, out, max_new_tokens=5000))
    narrow = tmp_path / "narrow.zarr"
    codec = Codec.named("bf16", 32)
    StoreWriter.create(
        narrow, layers=[2], codec=codec, sink_norm={2: 1.0}, vocabulary=[], provenance={}, options={}
    ).close()
    with pytest.raises(StoreError, match="holds no rows"):
        run_roundtrip(options(trio, out, store=narrow))
    with pytest.raises(RequestError, match="an AR checkpoint, but was given as the AV"):
        run_roundtrip(options(trio, out, av=str(trio / "ar")))
    assert not out.exists() and not list(tmp_path.glob("*.parts"))


def test_each_model_is_looked_for_once(trio: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the Hub every look is a request."""
    looked: list[str] = []
    real = source.find_directory

    def find(name: str, *args: Any, **how: Any) -> Path:
        looked.append(name)
        return real(name, *args, **how)

    monkeypatch.setattr(source, "find_directory", find)
    run_roundtrip(options(trio, tmp_path / "x.parquet", limit=2))
    assert looked == [str(trio / "av"), str(trio / "ar")]


def test_a_given_model_with_other_kernels_is_refused(trio: Path, tmp_path: Path) -> None:
    given = Verbalizer.load(str(trio / "av"), **CPU, kernels=Kernels("reference"))
    with pytest.raises(
        RequestError, match="loaded with --kernels reference .*the options say --kernels auto"
    ):
        run_roundtrip(options(trio, tmp_path / "x.parquet"), verbalizer=given)
    assert not list(tmp_path.iterdir())


def test_explanations_do_not_depend_on_batching(trio: Path) -> None:
    store = CaptureStore.open(trio / "run.zarr")
    verbalizer = Verbalizer.load(str(trio / "av"), **CPU)
    vectors = list(enumerate(store.layer(LAYER)[:12]))
    one = list(verbalizer.explain(iter(vectors), max_new_tokens=16, batch_size=1))
    many = list(verbalizer.explain(iter(vectors), max_new_tokens=16, batch_size=9))
    assert one == many and [e.id for e in many] == list(range(12))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" <explanation> a {b} </explanation> rest", ("a {b}", "ok")),
        ("x<explanation>cut off", ("cut off", "unclosed")),
        ("no tag at all ", ("no tag at all", "untagged")),
        ("late</explanation>", ("late</explanation>", "untagged")),
        ("<explanation></explanation>", ("", "ok")),
    ],
)
def test_parse(text: str, expected: tuple[str, str]) -> None:
    assert parse_explanation(text) == expected


def test_summary_is_of_the_file(trio: Path, tmp_path: Path) -> None:
    given = options(trio, tmp_path / "x.parquet", limit=7)
    summary = run_roundtrip(given)
    table = pq.read_table(given.out)
    assert summary.cos == pytest.approx(np.mean(table["cos"].to_pylist()), abs=1e-6)
    assert summary.retrieval_top1 == pytest.approx(np.mean(np.array(table["retrieval_rank"]) == 1), abs=1e-6)
    assert summarise(given).to_dict() == {
        **summary.to_dict(),
        "seconds": 0.0,
        "seconds_by_phase": {},
        "rows_per_second": 0.0,
    }


def test_loading_is_quiet_and_complete(trio: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_model(str(trio / "base"), **CPU)
    out, err = capfd.readouterr()
    assert out == "" and err == ""


def test_special_tokens_belong_to_an_explanation_but_for_the_one_that_ends_it(
    trio: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: dict[int, list[int]] = {}
    groups = Generator.groups

    def noted(self: Generator, requests: object, **how: object) -> Iterator[list[Completion]]:
        for group in groups(self, requests, **how):
            ended.update({each.request.id: each.generated.tolist() for each in group})
            yield group

    monkeypatch.setattr(Generator, "groups", noted)
    verbalizer = Verbalizer.load(str(trio / "av"), **CPU)
    end = verbalizer.lm.tokenizer.eos_token_id
    vectors = enumerate(np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32))
    texts = list(verbalizer.explain(vectors, max_new_tokens=40, sampling=Sampling(1e6, 1)))
    for each in texts:
        ids = ended[each.id]
        assert each.n_tokens == len(ids) and end not in ids[:-1]
        assert (
            each.text == verbalizer.lm.tokenizer.decode(ids[: ids.index(end)] if end in ids else ids).strip()
        )
    assert any("<|im_start|>" in each.text for each in texts)
    assert any(ended[each.id][-1] == end and "<|im_end|>" not in each.text for each in texts)
