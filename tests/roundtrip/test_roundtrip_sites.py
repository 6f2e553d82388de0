"""Stage 2 on stores that hold other sites than a block's output: refused, unless that site is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from commands import LAYER, call, capture, explain, roundtrip, score
from plain_pair import plain_text
from tiny import save_ar, save_av, save_model, write_prompts

from nla_engine.roundtrip.results import read_metadata
from nla_engine.store import CaptureStore


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sites")
    save_model(root / "base")
    save_av(root / "av", LAYER)
    save_ar(root / "ar", LAYER)
    write_prompts(root / "prompts.jsonl", 4)
    for name, sites in (("run", "resid_post,attn_out"), ("inner", "attn_out")):
        assert call(*capture(root, root / f"{name}.zarr", sites=sites, codec="bf16")).code == 0
    return root


def test_a_site_is_explained_only_if_it_is_named(root: Path, tmp_path: Path) -> None:
    inner = root / "inner.zarr"
    for given in ({}, {"layer": LAYER}):
        done = call(*roundtrip(root, tmp_path / "x.parquet", inner, **given))
        assert done.code == 2 and not (tmp_path / "x.parquet").exists()
        assert "holds layer 2_attn_out, the AV and AR were made for layer 2: capture that one" in done.err
        assert "pass --site attn_out" in done.err
    out = tmp_path / "attn.parquet"
    done = call(*roundtrip(root, out, inner, site="attn_out"), "--json")
    assert done.code == 0 and done.json["layer"] == "2_attn_out"
    store = CaptureStore.open(inner)
    table = pq.read_table(out).to_pylist()
    for row in table[::5]:
        assert row["explanation"] == plain_text(
            root / "av", store.layer(LAYER, "attn_out")[row["row"]], new_tokens=8
        )
    assert read_metadata(out)["layer"] == "2_attn_out"
    page = tmp_path / "report.html"
    assert call("report", inner, "--explained", out, "--out", page).code == 0
    assert "layer 2 attn_out" in page.read_text()


def test_without_a_name_it_is_the_output(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.parquet"
    assert call(*roundtrip(root, out)).code == 0
    assert read_metadata(out)["layer"] == LAYER
    other = tmp_path / "y.parquet"
    assert call(*roundtrip(root, other, site="attn_out")).code == 0
    first, second = pq.read_table(out), pq.read_table(other)
    assert first["row"].equals(second["row"]) and not np.allclose(first["cos"], second["cos"])


def test_texts_of_one_site_are_not_scored_as_those_of_another(root: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.parquet"
    assert call(*explain(root, texts, site="attn_out")).code == 0
    done = call(*score(root, tmp_path / "x.parquet", texts))
    assert (
        done.code == 2
        and "explains layer 2_attn_out, --ar" in done.err
        and "give --site attn_out" in done.err
    )
    assert call(*score(root, tmp_path / "x.parquet", texts, site="attn_out")).code == 0


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ("attn", "--site is 'attn': it must be"),
        ("mlp_out", "--layer 2_mlp_out: .* holds layer 2_attn_out, 2"),
    ],
)
def test_a_site_that_there_is_not(root: Path, tmp_path: Path, site: str, message: str) -> None:
    import re

    done = call(*roundtrip(root, tmp_path / "x.parquet", site=site))
    assert done.code == 2 and re.search(message, " ".join(done.err.split())) and not list(tmp_path.iterdir())
