"""`--kernels library` through the commands: the same stores and tables, chosen by itself, refusals in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import transformers
from commands import LAYER, call, capture, check_refused, roundtrip
from small_families import small_model
from tiny import byte_tokenizer, write_prompts

from nla_engine.store import CaptureStore


def save_family(directory: Path, config: str) -> Path:
    """`base`, a small model of a family, and prompts.jsonl."""
    small_model(getattr(transformers, config)).save_pretrained(directory / "base")
    byte_tokenizer().save_pretrained(directory / "base")
    write_prompts(directory / "prompts.jsonl", 4)
    return directory


@pytest.mark.parametrize("corpus", [None, True])
def test_a_store_is_the_same(root: Path, tmp_path: Path, corpus: bool | None) -> None:
    more = {"max_new_tokens": None} if corpus else {"positions": "all"}
    for kernels in ("auto", "library"):
        done = call(*capture(root, tmp_path / kernels, kernels=kernels, corpus=corpus, codec="bf16", **more))
        assert done.code == 0, done.err
    one, other = (CaptureStore.open(tmp_path / kernels) for kernels in ("auto", "library"))
    for column in ("token_id", "next_token_id", "position", "sequence", "flags"):
        assert np.array_equal(one.column(column), other.column(column))
    np.testing.assert_allclose(one.layer(LAYER)[:], other.layer(LAYER)[:], rtol=2e-2, atol=1e-2)
    assert other.provenance["attention"].startswith("transformers' own generation")
    assert call("verify", tmp_path / "library", "--model", root / "base").code == 0


def test_a_round_trip_is_the_same(root: Path, tmp_path: Path) -> None:
    tables = []
    for kernels in ("auto", "library"):
        out = tmp_path / f"{kernels}.parquet"
        done = call(*roundtrip(root, out, kernels=kernels, samples=2, temperature=0.8, limit=5))
        assert done.code == 0, done.err
        tables.append(pq.read_table(out).to_pydict())
    assert tables[0]["explanation"] == tables[1]["explanation"]
    np.testing.assert_allclose(tables[0]["cos"], tables[1]["cos"], atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_it_is_chosen_for_a_family_that_the_engine_does_not_run(tmp_path: Path) -> None:
    root = save_family(tmp_path, "XGLMConfig")
    forced = call(*capture(root, tmp_path / "no.zarr", kernels="reference"))
    last = forced.err.splitlines()[-1]
    assert forced.code == 1 and last.startswith("error: ") and "XGLMForCausalLM" in last
    assert last.endswith("this architecture is not supported here; --kernels library runs it, slower")
    assert not (tmp_path / "no.zarr").exists()
    done = call(*capture(root, tmp_path / "run.zarr"))
    assert done.code == 0 and "it runs by transformers' own generation (--kernels library)" in done.err
    assert call("verify", tmp_path / "run.zarr", "--model", root / "base").code == 0


@pytest.mark.filterwarnings("ignore")
def test_what_neither_way_runs_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    root = save_family(tmp_path, "XLMConfig")
    check_refused(
        call(*capture(root, tmp_path / "run.zarr")),
        r"XLMWithLMHeadModel keeps its blocks in no list .*: this architecture is not supported$",
    )
    assert not (tmp_path / "run.zarr").exists()
