"""Maps and whitenings around both models, against plain transformers with the maps in numpy; and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from commands import LAYER, call, capture, check_refused, contents, explain, roundtrip, score
from maps import save_map, save_whitening, zca
from plain_pair import plain_state, plain_text
from safetensors.torch import load_file, save_file
from tiny import MARKER, D, byte_tokenizer, save_ar, save_av, tiny_config, write_prompts, write_sidecar
from transformers import AutoModelForCausalLM

from nla_engine.models.map_files import Maps
from nla_engine.models.vector_map import VectorMap
from nla_engine.roundtrip.results import read_metadata
from nla_engine.roundtrip.verbalize import Verbalizer
from nla_engine.store import CaptureStore

Apply = Callable[[np.ndarray], np.ndarray]
CPU: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}
#: Width of the vectors of a base that is narrower than its AV and AR.
NARROW = 48


def same(v: np.ndarray) -> np.ndarray:
    return v


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """av, ar, a base and its store; the same of a narrow base in `narrow`."""
    root = tmp_path_factory.mktemp("pair")
    (root / "narrow").mkdir()
    for place, width in ((root, D), (root / "narrow", NARROW)):
        config = tiny_config("qwen2")
        config.hidden_size = width
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).float().save_pretrained(place / "base")
        byte_tokenizer().save_pretrained(place / "base")
        save_av(place / "av", LAYER, d_model=width)
        save_ar(place / "ar", LAYER, d_model=width)
        write_prompts(place / "prompts.jsonl", 4)
        ran = call(*capture(place, place / "run.zarr", codec="bf16", positions="all"))
        assert ran.code == 0, ran.err
    return root


def changed(root: Path, to: Path, name: str, **extraction: Any) -> Path:
    """A copy of the AV or AR, with these entries under `extraction`; None takes one out."""
    shutil.copytree(root / name, to / name)
    sidecar = yaml.safe_load((to / name / "nla_meta.yaml").read_text())
    sidecar["extraction"] |= extraction
    return write_sidecar(to / name, sidecar)


def rows_of(root: Path) -> np.ndarray:
    return CaptureStore.open(root / "run.zarr").layer(LAYER)[:].astype(np.float64)


def check_pair(
    root: Path, at: Path, out: Path, enters: Apply = same, leaves: Apply = same, every: int = 23
) -> None:
    """Check a table: each text is what the AV says of enters(v), each cos that of v and leaves(head of the AR)."""
    rows, table = rows_of(root), pq.read_table(out).to_pylist()
    assert [row["row"] for row in table] == list(range(len(rows)))
    head = load_file(at / "ar" / "value_head.safetensors")["weight"].double().numpy()
    for row in table[::every]:
        v = rows[row["row"]]
        assert row["explanation"] == plain_text(at / "av", enters(v), new_tokens=8)
        state = plain_state(at / "ar", f"Summary of <text>{row['explanation']}</text> <summary>", LAYER)
        r = leaves(head @ state)
        assert r.shape == v.shape
        assert row["cos"] == pytest.approx(float(v @ r / np.linalg.norm(v) / np.linalg.norm(r)), abs=2e-5)
    assert len({row["explanation"] for row in table}) > 1


@pytest.mark.parametrize(
    "prompt", [None, "<INJECT>, <INJECT>, <INJECT>, <INJECT> or <INJECT>.", "What is <INJECT>?"]
)
def test_a_soft_prompt_is_constant_rows_and_several_vectors_of_a_row(
    pair: Path, tmp_path: Path, prompt: str | None
) -> None:
    rng = np.random.default_rng(0)  # with some numbers the model writes the same about every vector
    weight, bias = rng.standard_normal((3 * D, D)), rng.standard_normal(3 * D)
    prefix = rng.standard_normal((2, D)) * 0.1
    parts = {"weight": weight, "bias": bias, "prefix": prefix}
    save_file({key: torch.from_numpy(x).float() for key, x in parts.items()}, tmp_path / "m.safetensors")
    told = {"av_map": tmp_path / "m.safetensors", "injection_scale": 7, "prompt": prompt}
    ran = call(*explain(pair, tmp_path / "x.parquet", **told))
    assert ran.code == 0, ran.err
    rows, table = rows_of(pair), pq.read_table(tmp_path / "x.parquet").to_pylist()
    for row in table[::29]:
        v = (weight @ rows[row["row"]] + bias).reshape(3, D)
        entering = np.concatenate([prefix, v * 7 / np.linalg.norm(v, axis=1, keepdims=True)])
        message = prompt and prompt.replace("<INJECT>", MARKER)
        assert row["explanation"] == plain_text(pair / "av", entering, new_tokens=8, message=message)
    assert len({row["explanation"] for row in table}) > 1


@pytest.mark.parametrize("tag", ["whitened_zca", "whitened_zca_v1"])
def test_a_whitened_pair_reads_white_vectors_and_scores_captured_ones(
    pair: Path, tmp_path: Path, tag: str
) -> None:
    mean, matrix, inverse = zca(rows_of(pair), shrinkage=0.1)
    parts = {"mean": mean, "matrix": matrix, "inverse": inverse, "norm": np.array(9.0)}
    sha = save_whitening(tmp_path / "w", **parts)
    told = {"stats_sha256": sha, "layer_index": LAYER} if tag.endswith("v1") else None
    for name in ("av", "ar"):
        changed(pair, tmp_path, name, norm=tag, whitening=told)
        shutil.copy(tmp_path / "w", tmp_path / name / "whitening.safetensors")
    ran = call(*roundtrip(tmp_path, tmp_path / "x.parquet", pair / "run.zarr"))
    assert ran.code == 0, ran.err
    check_pair(
        pair,
        tmp_path,
        tmp_path / "x.parquet",
        lambda v: (v - mean) @ matrix,
        lambda r: r * 9.0 / np.linalg.norm(r) @ inverse + mean,
    )
    metadata = read_metadata(tmp_path / "x.parquet")
    assert len(metadata["av_whitening"]) == 16 and metadata["av_whitening"] == metadata["ar_whitening"]
    assert "av_map" not in metadata
    ran = call(*roundtrip(pair, tmp_path / "plain.parquet"))
    plain, white = (pq.read_table(tmp_path / f"{name}.parquet").to_pydict() for name in ("plain", "x"))
    assert plain["explanation"] != white["explanation"] and "av_whitening" not in read_metadata(
        tmp_path / "plain.parquet"
    )


def test_an_encoder_and_a_decoder_that_are_given(
    pair: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    enc, dec = (rng.standard_normal((D, D)) / D**0.5 for _ in range(2))
    bias = rng.standard_normal(D) * rows_of(pair).std() / 4  # short enough for the vectors to differ
    save_map(tmp_path / "enc", enc, bias)
    save_map(tmp_path / "dec", dec)
    given = {"av_map": tmp_path / "enc", "ar_map": tmp_path / "dec"}
    out = tmp_path / "x.parquet"
    ran = call(*roundtrip(pair, out, **given))
    assert ran.code == 0, ran.err
    check_pair(pair, pair, out, lambda v: enc @ v + bias, lambda r: dec @ r)
    assert read_metadata(out)["run"]["av_map"] == str(tmp_path / "enc")
    assert read_metadata(out)["av_map"] != read_metadata(out)["ar_map"]

    halves = explain(pair, tmp_path / "e.parquet", av_map=tmp_path / "enc")
    assert call(*halves).code == 0
    ran = call(*score(pair, tmp_path / "s.parquet", tmp_path / "e.parquet", ar_map=tmp_path / "dec"))
    assert ran.code == 0, ran.err
    whole, scored = (pq.read_table(path).to_pydict() for path in (out, tmp_path / "s.parquet"))
    assert scored["explanation"] == whole["explanation"]
    np.testing.assert_allclose(scored["cos"], whole["cos"], atol=1e-6)

    before = contents(out)
    assert call(*roundtrip(pair, out, **given), "--resume").code == 0
    for name in given:  # the same options with another file are another run
        kept = (tmp_path / given[name].name).read_bytes()
        save_map(tmp_path / given[name].name, rng.standard_normal((D, D)))
        ran = call(*roundtrip(pair, out, **given), "--resume")
        check_refused(ran, rf"was made with other options \({name[:2]} was \".*map [0-9a-f]{{16}}")
        (tmp_path / given[name].name).write_bytes(kept)
    check_refused(call(*roundtrip(pair, out), "--resume"), "was made with other options")
    assert contents(out) == before


def test_a_whitening_and_maps_together(pair: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    """A whitening that is given, for sidecars that do not say; maps beside the weights; no norm, no inverse."""
    mean, matrix, _ = zca(rows_of(pair), shrinkage=0.2)
    save_whitening(tmp_path / "w", torch.float32, mean=mean, matrix=matrix)
    enc, dec = (rng.standard_normal((D, D)) / D**0.5 for _ in range(2))
    save_map(changed(pair, tmp_path, "av") / "av_map.safetensors", enc)
    save_map(changed(pair, tmp_path, "ar") / "ar_map.safetensors", dec)
    out = tmp_path / "x.parquet"
    save_map(tmp_path / "av" / "decoder.safetensors", dec)  # of the other model
    torch.save({}, tmp_path / "ar" / "optimizer.pt")
    ran = call(*roundtrip(tmp_path, out, pair / "run.zarr", whitening=tmp_path / "w", residency="turns"))
    assert ran.code == 0, ran.err

    def leaves(r: np.ndarray) -> np.ndarray:
        white = dec @ r
        return white * D**0.5 / np.linalg.norm(white) @ np.linalg.inv(matrix) + mean

    check_pair(pair, tmp_path, out, lambda v: enc @ ((v - mean) @ matrix), leaves)


def test_models_of_another_width_than_the_vectors(
    pair: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    root = pair / "narrow"
    enc, dec = rng.standard_normal((D, NARROW)), rng.standard_normal((NARROW, D))
    bias = rng.standard_normal(NARROW)
    save_map(tmp_path / "enc", enc)
    save_map(tmp_path / "dec", dec, bias)
    given = {"av_map": tmp_path / "enc", "ar_map": tmp_path / "dec"}
    ran = call(*roundtrip(root, tmp_path / "x.parquet", **given))
    assert ran.code == 0, ran.err
    check_pair(root, root, tmp_path / "x.parquet", lambda v: enc @ v, lambda r: dec @ r + bias)


def whitened(width: int = D, **more: np.ndarray) -> Callable[[Path], Any]:
    parts = {"mean": np.zeros(width), "matrix": np.eye(width)} | more
    return lambda root: save_whitening(root / "w", **parts)


def mapped(*shape: int) -> Callable[[Path], Any]:
    return lambda root: save_map(root / "m", np.ones(shape))


def several(root: Path) -> None:
    save_file({"weight": torch.ones(D, D), "prefix": torch.ones(3, D)}, root / "m")


def pickled(name: str) -> Callable[[Path], Any]:
    return lambda root: torch.save({"weight": torch.eye(D)}, root / name)


def beside(**parts: np.ndarray) -> Callable[[Path], Any]:
    return lambda root: (
        whitened(**parts)(root) and shutil.move(root / "w", root / "av" / "whitening.safetensors")
    )


WHITE = {"norm": "whitened_zca"}
SKEW = np.eye(D) + np.triu(np.full((D, D), 0.5), 1)
#: What is put there, what the sidecars say under `extraction`, the options, the message.
FAULTS: dict[str, tuple[Callable[[Path], Any], dict[str, Any], dict[str, str], str]] = {
    "no whitening": (lambda root: None, WHITE, {}, "norm is whitened_zca, and there is no whitening.safetensors"),
    "a pickled whitening": (
        lambda root: torch.save({}, root / "av" / "whitening_stats.pt"),
        WHITE,
        {},
        r"pass --whitening FILE, made from whitening_stats.pt with python -m nla_engine.models.convert_head .*"
        r"whitening_stats.pt whitening.safetensors",
    ),
    "a whitening that the sidecar denies": (
        whitened(), {"norm": "none"}, {"whitening": "w"}, "says extraction.norm: none: take one of the two away",
    ),
    "a whitening that the sidecar does not know": (
        beside(), {}, {}, "whitening.safetensors: is a whitening, and .* does not say .*: pass it with --whitening",
    ),
    "a whitening by another name": (
        lambda root: np.savez(root / "av" / "zca_stats.npz", mean=np.ones(D)), {}, {},
        "av: has zca_stats.npz, which may change vectors .*: pass --whitening with it, converted with .*convert_head",
    ),
    "an encoder by another name": (
        pickled("av/enc.pt"), {}, {},
        r"av: has enc.pt, which .*: pass --av-map with it, converted with .*convert_head enc.pt av_map.safetensors, or",
    ),
    "a decoder by another name": (
        lambda root: save_map(root / "ar" / "nla-decoder.safetensors", np.eye(D)), {}, {},
        "ar: has nla-decoder.safetensors, which may change .*: pass --ar-map with it, or give a directory without it",
    ),
    "of another width": (whitened(D - 1), WHITE, {"whitening": "w"}, "vectors of width 63, .* says 64"),
    "no ZCA": (whitened(matrix=SKEW), WHITE, {"whitening": "w"}, "matrix is not symmetric, and .* whitened_zca"),
    "of another checksum": (
        whitened(), WHITE | {"whitening": {"stats_sha256": "ab" * 32}}, {"whitening": "w"}, f"says {'ab' * 32}",
    ),
    "of another layer": (
        whitened(), WHITE | {"whitening": {"layer_index": 7}}, {"whitening": "w"}, r"two different numbers .* 7\)",
    ),
    "a whitening without its word": (
        whitened(), {"whitening": {"layer_index": LAYER}}, {}, "extraction.norm does not say whitened_zca",
    ),
    "another norm": (lambda root: None, {"norm": "layer_norm"}, {}, "extraction.norm is 'layer_norm': only"),
    "a singular one": (
        whitened(matrix=np.ones((D, D))), WHITE, {"whitening": "w"}, "matrix is (singular|badly conditioned)",
    ),
    "no such file": (lambda root: None, {}, {"av_map": "m"}, "m: no such file: mend --av-map"),
    "no such whitening": (lambda root: None, WHITE, {"whitening": "m"}, "m: no such file: mend --whitening"),
    "pickled": (
        pickled("m.pt"), {}, {"ar_map": "m.pt"},
        "m.pt: is not safetensors .*: convert it with .*convert_head .*m.pt ar_map.safetensors, and pass --ar-map",
    ),
    "an encoder of other vectors": (mapped(D, D + 1), {}, {"av_map": "m"}, "takes vectors of width 65, .* says 64"),
    "an encoder of another model": (mapped(D + 1, D), {}, {"av_map": "m"}, r"weight has shape \[65, 64\], which"),
    "several vectors and two places": (
        mapped(3 * D, D), {}, {"av_map": "m", "prompt": "<INJECT>, <INJECT>"}, "holds 2 times <INJECT>.* vectors: 3",
    ),
    "a prefix that is added": (
        several, {}, {"av_map": "m", "injection": "add@1", "norm_match": True},
        "has a prefix, which replaces embeddings",
    ),
    "a decoder of another head": (mapped(D, D + 1), {}, {"ar_map": "m"}, r"weight has shape \(64, 64\), "),
    "a decoder of other vectors": (mapped(D + 1, D), {}, {"ar_map": "m"}, r"weight has shape \[65, 64\], which"),
    "several that leave": (mapped(2 * D, D), {}, {"ar_map": "m"}, "makes several vectors .*, and one leaves an AR"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_refused_and_nothing_is_written(pair: Path, tmp_path: Path, fault: str) -> None:
    put, extraction, given, message = FAULTS[fault]
    for name in ("av", "ar"):
        changed(pair, tmp_path, name, **extraction)
    put(tmp_path)
    before = contents(tmp_path)
    files = ("av_map", "ar_map", "whitening")
    options = {name: tmp_path / what if name in files else what for name, what in given.items()}
    check_refused(call(*roundtrip(tmp_path, tmp_path / "x.parquet", pair / "run.zarr", **options)), message)
    assert contents(tmp_path) == before


def test_a_map_that_leaves_a_vector_no_direction_stops_the_run(pair: Path, tmp_path: Path) -> None:
    save_map(tmp_path / "m", np.zeros((D, D)))
    before = contents(tmp_path)
    ran = call(*roundtrip(pair, tmp_path / "x.parquet", av_map=tmp_path / "m"))
    assert ran.code == 2 and "m: makes a vector zero or infinite" in ran.err.splitlines()[-1]
    assert contents(tmp_path) == before


def test_a_pair_of_another_width_needs_its_maps(pair: Path, tmp_path: Path) -> None:
    check_refused(
        call(*roundtrip(pair / "narrow", tmp_path / "x.parquet")), "d_model is 48, the model's width is 64"
    )


def test_loaded_models_take_no_maps_from_the_options(pair: Path, tmp_path: Path) -> None:
    save_map(tmp_path / "m", np.eye(D))
    av = Verbalizer.load(str(pair / "av"), **CPU)
    mapped = Verbalizer(av.lm, av.sidecar, maps=Maps(map=VectorMap.read(tmp_path / "m")))
    assert mapped.fingerprint() == f"{av.fingerprint()}-map {mapped.maps.checksums()['map']}"
    save_map(tmp_path / "m", np.ones((2 * D, D)))
    two = Verbalizer(av.lm, av.sidecar, maps=Maps(map=VectorMap.read(tmp_path / "m")))
    assert len(two.prompt.places) == 2
