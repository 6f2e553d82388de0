"""explain: the texts and scores of a round trip, for vectors of any origin. What is no vector is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from commands import LAYER
from store_samples import random_store
from tiny import D, save_ar, save_av

import nla_engine
from nla_engine.config import RoundtripOptions
from nla_engine.errors import NLAError, RequestError
from nla_engine.roundtrip.reconstruct import Reconstructor
from nla_engine.roundtrip.verbalize import Verbalizer
from nla_engine.store import CaptureStore

HOW: dict[str, Any] = {"max_new_tokens": 8, "device": "cpu", "quiet": True}


@pytest.fixture(scope="module")
def pair(root: Path) -> tuple[Verbalizer, Reconstructor]:
    return nla_engine.load_av(root / "av", device="cpu"), nla_engine.load_ar(str(root / "ar"), device="cpu")


@pytest.mark.parametrize("how", [{}, {"samples": 3, "temperature": 1.0, "seed": 4}])
def test_it_is_a_round_trip(
    root: Path,
    tmp_path: Path,
    pair: tuple[Verbalizer, Reconstructor],
    rng: np.random.Generator,
    how: dict[str, Any],
) -> None:
    """Of every row of a store, one sequence each, with rows that have no direction: the same table."""
    vectors = rng.standard_normal((9, D)).astype(np.float32)
    vectors[3], vectors[6, 1] = 0.0, np.nan
    store = random_store(tmp_path / "r.zarr", vectors, LAYER, sizes=[1] * 9)
    given = {"av": str(root / "av"), "ar": str(root / "ar"), "device": "cpu", "max_new_tokens": 8, **how}
    nla_engine.run_roundtrip(RoundtripOptions(store=str(store), out=tmp_path / "t.parquet", **given))
    table = pq.read_table(tmp_path / "t.parquet").to_pandas()
    layer = CaptureStore.open(store).layer(LAYER)
    explained = nla_engine.explain(layer, *pair, variance=layer, **HOW, **how)
    assert explained.texts == table["explanation"].tolist() and explained.statuses == table["status"].tolist()
    assert {"zero_vector", "nonfinite_vector"} < set(explained.statuses)
    assert explained.vector.tolist() == table["row"].tolist()
    frame = explained.to_pandas()
    for name in ("sample", "n_tokens", "best", "cos", "cos_shuffled", "retrieval_rank", "fve_nrm"):
        np.testing.assert_allclose(
            frame[name].astype(float), table[name].astype(float), atol=1e-6, err_msg=name
        )
    assert len(explained) == len(frame) == 9 * how.get("samples", 1)
    # Independently, in float64.
    v, r = layer[:].astype(np.float64)[explained.vector], explained.reconstructions.astype(np.float64)
    with np.errstate(invalid="ignore"):
        cos = (v * r).sum(1) / np.linalg.norm(v, axis=1) / np.linalg.norm(r, axis=1)
    np.testing.assert_allclose(explained.cos, cos, atol=1e-6)
    sound = layer[:][np.isfinite(layer[:]).all(1) & layer[:].any(1)].astype(np.float64)
    var = 1 - np.square((sound / np.linalg.norm(sound, axis=1, keepdims=True)).mean(0)).sum()
    np.testing.assert_allclose(explained.fve, 1 - 2 * (1 - cos) / var, atol=1e-5)
    assert explained.reconstructions.shape == (len(explained), D) and explained.layer == LAYER


def test_any_form_of_the_same_vectors(
    pair: tuple[Verbalizer, Reconstructor], rng: np.random.Generator, root: Path
) -> None:
    vectors = rng.standard_normal((2, D)).astype(np.float32)
    tensor = torch.from_numpy(vectors)
    expected = nla_engine.explain(vectors, *pair, **HOW)
    assert expected.fve is None and expected.variance is None
    forms = [
        vectors.astype(np.float64),
        tensor.double().requires_grad_(),
        vectors.tolist(),
        list(vectors),
        list(tensor),
        np.asfortranarray(vectors),
        np.repeat(vectors, 2, 0)[::2],
    ]
    for form in forms:
        found = nla_engine.explain(form, *pair, **HOW)
        assert found.texts == expected.texts
        np.testing.assert_array_equal(found.vectors, vectors)
        np.testing.assert_array_equal(found.reconstructions, expected.reconstructions)
    for form in (tensor.bfloat16(), vectors.astype(np.float16)):
        assert nla_engine.explain(form, *pair, **HOW).vectors.dtype == np.float32
    for one in (vectors[1], tensor[1], vectors[1].tolist(), 1e30 * vectors[1].astype(np.float64)):
        assert nla_engine.explain(one, pair[0], **HOW).texts == expected.texts[1:]
    alone = nla_engine.explain(vectors, root / "av", **HOW)
    assert alone.texts == expected.texts
    assert alone.cos is alone.fve is alone.reconstructions is alone.scores is None
    assert "cos" not in alone.to_pandas()
    again = nla_engine.explain(expected.reconstructions, *pair, variance=0.5, **HOW)
    np.testing.assert_allclose(again.fve, 1 - 2 * (1 - again.cos) / 0.5)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (np.zeros((2, D), np.int64), "the vectors are int64: give floating-point numbers"),
        (torch.zeros(2, D, dtype=torch.int32), "the vectors are int32"),
        (np.zeros((2, D), complex), "complex128"),
        ([["a"] * D], "the vectors are <U1"),
        ([[0.5] * D, [0.5]], "the vectors are no array"),
        ([torch.zeros(D), torch.zeros(3)], "the vectors have shapes"),
        (np.zeros((2, 3, D)), r"shape \(2, 3, 64\): give \[d\] or \[n, d\]"),
        (np.zeros((0, D)), r"shape \(0, 64\)"),
        (0.5, "shape"),
        (None, "the vectors are object"),
        (np.full((2, D), 1e300), "vector 0 has numbers beyond what float32 holds: scale it"),
        (np.full((2, D), 1e-300), "vector 0 has numbers beyond"),
        (np.ones((2, D + 1)), f"made for vectors of width {D}, these have width {D + 1}"),
    ],
    ids=lambda given: str(getattr(given, "shape", given)),
)
def test_what_is_no_vector(pair: tuple[Verbalizer, Reconstructor], vectors: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        nla_engine.explain(vectors, *pair, **HOW)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 2}, "samples above 1 would write one greedy text several times: give temperature=..."),
        ({"variance": 2.0}, "variance is 2.0: it must be above 0 and at most 1"),
        ({"max_new_tokens": 5000}, "max_new_tokens is 5000: .* has room for"),
        ({"where": "early"}, "where is no option of explain, which reads no store"),
        ({"sample": 2}, "sample is no option of explain: did you mean samples"),
        ({"max_tokens_new": 3}, "max_tokens_new is no option of explain: did you mean max_new_tokens"),
        ({"dry_run": True}, "dry_run is no option of explain, which reads no store"),
        ({"out": "x"}, "out is no option of explain"),
        ({"ar": "nowhere"}, "nowhere"),
        ({"injection_scale": "loud"}, "injection_scale"),
        ({"kernels": "reference"}, "a given model was loaded with"),
    ],
    ids=lambda value: "" if isinstance(value, (dict, type)) else str(value),
)
def test_what_the_options_refuse(
    pair: tuple[Verbalizer, Reconstructor], changes: dict[str, Any], message: str
) -> None:
    given = {"av": pair[0], "ar": pair[1], **HOW, **changes}
    with pytest.raises(NLAError, match=message):
        nla_engine.explain(np.ones(D, np.float32), **given)


def test_models_that_are_no_pair(root: Path, tmp_path: Path, pair: tuple[Verbalizer, Reconstructor]) -> None:
    av, ar = pair
    with pytest.raises(RequestError, match="av and ar are swapped"):
        nla_engine.explain(np.ones(D), ar, av, **HOW)  # type: ignore[arg-type]
    other = nla_engine.load_ar(save_ar(tmp_path / "ar", LAYER - 1), device="cpu")
    with pytest.raises(RequestError, match="they are no pair"):
        nla_engine.explain(np.ones(D), av, other, **HOW)
    with pytest.raises(NLAError, match="av"):
        nla_engine.load_ar(root / "av", device="cpu")
    loud = save_av(tmp_path / "av", LAYER, extraction={"mse_scale": 8.0})
    with pytest.raises(NLAError, match="injection_scale|injection-scale"):
        nla_engine.explain(np.ones(D), loud, **HOW)
    for scale in ("12", 12, np.float64(12)):
        said = nla_engine.explain(np.ones(D), loud, injection_scale=scale, **HOW)
        assert said.texts == nla_engine.explain(np.ones(D), av, **HOW).texts


def test_models_show_what_they_are(root: Path, pair: tuple[Verbalizer, Reconstructor]) -> None:
    assert (
        repr(pair[0])
        == f"<Verbalizer {root / 'av'}: AV for layer {LAYER}, vectors of width {D}, on {pair[0].lm.device}>"
    )
    assert repr(pair[1]).startswith(
        f"<Reconstructor {root / 'ar'}: AR for layer {LAYER}, vectors of width {D}"
    )


def test_one_vector_alone_says_that_it_has_no_control(
    pair: tuple[Verbalizer, Reconstructor], rng: np.random.Generator
) -> None:
    rows = rng.standard_normal((4, D))
    alone = nla_engine.explain(rows[0], *pair, **HOW)
    assert np.isnan(alone.scores.cos_shuffled).all() and np.isnan(alone.scores.retrieval_rank).all()
    for shown in (repr(alone), alone._repr_html_()):
        assert "one vector alone has no cos_shuffled" in shown and "np.vstack([vector, rows])" in shown
    along = nla_engine.explain(np.vstack([rows[0], rows[1:]]), *pair, **HOW)
    assert np.isfinite(along.scores.cos_shuffled[0]) and "alone" not in repr(along)
    assert "alone" not in repr(nla_engine.explain(rows[0], pair[0], **HOW))


def test_how_it_shows_itself(pair: tuple[Verbalizer, Reconstructor], rng: np.random.Generator) -> None:
    explained = nla_engine.explain(rng.standard_normal((25, D)), *pair, variance=0.7, **HOW)
    object.__setattr__(explained, "texts", ["<script>alert(1)</script>\nline two", *explained.texts[1:]])
    lines = repr(explained).splitlines()
    assert lines[0].startswith(f"Explanations of 25 vectors; layer {LAYER}; cos ") and "; fve " in lines[0]
    assert len(lines) == 12 and lines[1].startswith("  0  cos ") and lines[-1] == "  and 15 more"
    html = explained._repr_html_()
    assert "&lt;script&gt;" in html and "<script" not in html and html.count("<tr>") == 21
    pl = pytest.importorskip("polars")
    assert isinstance(explained.to_polars(), pl.DataFrame)
    assert explained.to_polars()["explanation"].to_list() == explained.texts
