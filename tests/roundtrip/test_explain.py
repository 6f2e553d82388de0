"""An AV alone: the texts are those of a round trip, there are no scores, and neither can be taken for the other."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from commands import LAYER, call, check_refused, explain, roundtrip
from store_samples import random_store
from tiny import D, save_av, write_sidecar

import nla_engine
from nla_engine.config import ExplainOptions, RoundtripOptions
from nla_engine.errors import RequestError, StoreError
from nla_engine.roundtrip import pipeline
from nla_engine.roundtrip.results import SCHEMA, SCORES, read_metadata
from nla_engine.roundtrip.verbalize import Verbalizer

SAMPLED = {"samples": 3, "temperature": 1.0, "seed": 4}
CUT = {"temperature": 1.5, "top_p": 0.8, "top_k": 30, "min_p": 0.01}


@pytest.fixture
def store(tmp_path: Path, rng: np.random.Generator) -> Path:
    """Random rows, one of them zero and one not finite."""
    vectors = rng.standard_normal((14, D)).astype(np.float32)
    vectors[3], vectors[8, 1] = 0.0, np.inf
    return random_store(tmp_path / "random.zarr", vectors, LAYER, sizes=[6, 3, 5])


def options(root: Path, store: Path, out: Path, **changes: object) -> ExplainOptions:
    base = {"store": str(store), "av": str(root / "av"), "out": out, "device": "cpu", "max_new_tokens": 10}
    return ExplainOptions(**{**base, "batch_size": 7, **changes})  # type: ignore[arg-type]


def both(root: Path, store: Path, out: Path, **changes: object) -> RoundtripOptions:
    base = {"store": str(store), "av": str(root / "av"), "ar": str(root / "ar"), "out": out, "device": "cpu"}
    return RoundtripOptions(**{**base, "max_new_tokens": 10, "batch_size": 5, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("how", [{}, SAMPLED, CUT, {"where": "position > 0", "limit": 5}, {"follow": True}])
def test_the_texts_are_those_of_a_round_trip(
    root: Path, store: Path, tmp_path: Path, how: dict[str, object]
) -> None:
    summary = nla_engine.run_explain(options(root, store, tmp_path / "e.parquet", **how))
    whole = nla_engine.run_roundtrip(both(root, store, tmp_path / "r.parquet", **how))
    mine, theirs = (pq.read_table(tmp_path / f"{name}.parquet") for name in "er")
    assert mine.column_names == [name for name in SCHEMA.names if name not in SCORES]
    assert mine.replace_schema_metadata().equals(theirs.drop_columns(list(SCORES)).replace_schema_metadata())
    told, told_whole = summary.to_dict(), whole.to_dict()
    assert not set(told) - set(told_whole) and not {"cos", "fve_nrm", "variance", "cos_best"} & set(told)
    for name in set(told) - {"out", "seconds", "seconds_by_phase", "rows_per_second"}:
        assert told[name] == told_whole[name], name
    metadata = read_metadata(tmp_path / "e.parquet")
    assert not {"ar", "variance", "control_rows"} & set(metadata) and metadata["av"].endswith("av")
    assert metadata["injection_scale"] == read_metadata(tmp_path / "r.parquet")["injection_scale"]
    together = pa.concat_tables([mine, theirs], promote_options="default")
    assert together["cos"].null_count >= len(mine), "the two can be read as one"


@pytest.mark.parametrize("stop_after", [0, 2])
def test_interrupted_and_resumed_equals_uninterrupted(
    root: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    monkeypatch.setattr(pipeline, "CHUNK", 6)
    nla_engine.run_explain(options(root, store, tmp_path / "whole.parquet", **SAMPLED))
    real, calls = pipeline.Pipeline.columns, []

    def fail_later(self: pipeline.Pipeline, chunk: pipeline.Explained) -> dict[str, object]:
        if len(calls) == stop_after:
            raise KeyboardInterrupt
        calls.append(1)
        return real(self, chunk)

    out = tmp_path / "x.parquet"
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.Pipeline, "columns", fail_later)
        with pytest.raises(KeyboardInterrupt):
            nla_engine.run_explain(options(root, store, out, **SAMPLED))
    assert not out.exists() and len(calls) == stop_after
    if stop_after:
        with pytest.raises(RequestError, match="--resume"):
            nla_engine.run_explain(options(root, store, out, **SAMPLED))
    said: list[str] = []
    resumed = options(root, store, out, **SAMPLED, resume=True)
    nla_engine.run_explain(resumed, announce=said.append)
    assert ("(12 already there)" in said[-1]) == bool(stop_after)
    whole, mine = (
        pq.read_table(path).replace_schema_metadata() for path in (tmp_path / "whole.parquet", out)
    )
    assert mine.equals(whole) and not list(tmp_path.glob("*.parts"))


def test_a_table_with_scores_is_not_resumed_as_one_without(root: Path, store: Path, tmp_path: Path) -> None:
    nla_engine.run_explain(options(root, store, tmp_path / "e.parquet"))
    nla_engine.run_roundtrip(both(root, store, tmp_path / "r.parquet"))
    with pytest.raises(RequestError, match="scores was not given, is now false"):
        nla_engine.run_explain(options(root, store, tmp_path / "r.parquet", resume=True))
    with pytest.raises(RequestError, match="ar was not given"):
        nla_engine.run_roundtrip(both(root, store, tmp_path / "e.parquet", resume=True))


def test_an_av_that_does_not_say_its_layer(root: Path, store: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "av", tmp_path / "av")
    sidecar = yaml.safe_load((tmp_path / "av" / "nla_meta.yaml").read_text())
    del sidecar["extraction_layer_index"]
    write_sidecar(tmp_path / "av", sidecar)
    av = str(tmp_path / "av")
    with pytest.raises(RequestError, match="does not say which layer it reads: give --layer"):
        nla_engine.run_explain(options(root, store, tmp_path / "e.parquet", av=av))
    with pytest.raises(RequestError, match="--layer 9: .*holds layer 2"):
        nla_engine.run_explain(options(root, store, tmp_path / "e.parquet", av=av, layer=9))
    assert not list(tmp_path.glob("e.parquet*"))
    nla_engine.run_explain(options(root, store, tmp_path / "e.parquet", av=av, layer=LAYER))
    nla_engine.run_explain(options(root, store, tmp_path / "f.parquet"))
    texts = [pq.read_table(tmp_path / name)["explanation"].to_pylist() for name in ("e.parquet", "f.parquet")]
    assert texts[0] == texts[1]


def test_what_does_not_fit_together_is_refused(root: Path, store: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.parquet"
    other = str(save_av(tmp_path / "av1", 1))
    with pytest.raises(RequestError, match="holds layer 2, the AV was made for layer 1: capture that one"):
        nla_engine.run_explain(options(root, store, out, av=other))
    with pytest.raises(RequestError, match="--layer 3: this AV was made for layer 2; leave --layer out"):
        nla_engine.run_explain(options(root, store, out, layer=3))
    narrow = random_store(tmp_path / "n.zarr", np.ones((2, 32), np.float32), LAYER)
    with pytest.raises(RequestError, match="width 64, .*n.zarr holds 32: give the AV of the captured model"):
        nla_engine.run_explain(options(root, narrow, out))
    with pytest.raises(RequestError, match=r"--max-new-tokens is 5000: .*av has room for \d+: lower it"):
        nla_engine.run_explain(options(root, store, out, max_new_tokens=5000))
    with pytest.raises(StoreError, match="no row for --where"):
        nla_engine.run_explain(options(root, store, out, where="position > 9999"))
    with pytest.raises(RequestError, match="--samples above 1"):
        options(root, store, out, samples=2)
    with pytest.raises(RequestError, match="--limit spreads over all rows"):
        options(root, store, out, limit=2, follow=True)
    with pytest.raises(RequestError, match="has to be on a local disk"):
        options(root, store, Path("s3://bucket/x.parquet"))
    with pytest.raises(RequestError, match="fp8 has no reference kernels"):
        options(root, store, out, precision="fp8", kernels="reference")
    assert not list(tmp_path.glob("x.parquet*"))


def test_given_rows_and_a_given_model(root: Path, store: Path, tmp_path: Path) -> None:
    av = Verbalizer.load(str(root / "av"), device=torch.device("cpu"), dtype=torch.float32)
    given = options(root, store, tmp_path / "e.parquet", av="loaded already")
    summary = nla_engine.run_explain(given, verbalizer=av, rows=np.array([2, 7], np.int64))
    assert pq.read_table(given.out)["row"].to_pylist() == [2, 7] and summary.rows == 2


def test_the_command(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "e.parquet"
    ran = call(*explain(root, out, json=True))
    assert ran.code == 0 and ran.json["rows"] == ran.json["explanations"] == len(pq.read_table(out))
    assert "cos" not in ran.json and "rows of layer 2, one explanation per row" in ran.err
    check_refused(call(*explain(root, out)), "e.parquet: exists; pass --resume .*--overwrite")
    check_refused(call(*explain(root, tmp_path / "x.parquet", av=root / "ar")), "is an AR checkpoint")
    check_refused(call(*explain(root, tmp_path / "x", av=None)), "Missing option '--av'")
    check_refused(call(*explain(root, tmp_path / "x"), "--ar", root / "ar"), "No such option: --ar")
    check_refused(call(*roundtrip(root, out), "--resume"), "made with other options")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.parquet"]
