"""ARs with a head for each layer: whole weights, adapters, heads alone beside a base; templates that name the layer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from adapters import merged, save_adapter, save_merged
from commands import Ran, call, capture, check_refused, contents, explain, flags, roundtrip, score
from plain_pair import plain_state, plain_text
from safetensors.torch import load_file, save_file
from stand_in_hub import Hub
from tiny import MARKER, D, save_av, save_model, write_prompts, write_sidecar

from nla_engine.roundtrip.results import read_metadata
from nla_engine.store import CaptureStore

LAYERS = (1, 2)
HEADS = "value_heads.safetensors"
AR_SIDECAR = {
    "kind": "nla_model",
    "role": "ar",
    "d_model": D,
    "n_layers": 4,
    "extraction": {"injection_scale": None},
    "prompt_templates": {"ar": "Summary at {layer}: <text>{explanation}</text> <summary>"},
}


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, av (of no layer, its template names it), ar (heads for layers 0 to 3 over 4 blocks), a store of LAYERS."""
    root = tmp_path_factory.mktemp("many")
    save_model(root / "base")
    save_av(root / "av", 2)
    sidecar = yaml.safe_load((root / "av" / "nla_meta.yaml").read_text())
    del sidecar["extraction_layer_index"]
    sidecar["prompt_templates"] = {"av": "At {layer}, {depth_pct}%: <concept>{injection_char}</concept>"}
    write_sidecar(root / "av", sidecar)
    save_heads(save_model(root / "ar", seed=2))
    write_prompts(root / "prompts.jsonl", 3)
    ran = call(*capture(root, root / "run.zarr", layer=",".join(map(str, LAYERS)), codec="bf16"))
    assert ran.code == 0, ran.err
    return root


def save_heads(directory: Path, form: str = "value_heads.{layer}.weight", bias: bool = False) -> Path:
    """A head for each of four layers, and the sidecar of such an AR."""
    directory.mkdir(exist_ok=True)
    torch.manual_seed(5)
    heads = {form.format(layer=layer): torch.eye(D) + torch.randn(D, D) / D**0.5 for layer in range(4)}
    if bias:
        heads |= {key.replace("weight", "bias"): torch.randn(D) for key in heads}
    save_file(heads, directory / HEADS)
    return write_sidecar(directory, AR_SIDECAR)


def both(root: Path, out: Path, layer: int | None, **changes: object) -> list[object]:
    return roundtrip(root, out, layer=layer, template_value="depth_pct=50", **changes)


def check_scores(ran: Ran, root: Path, out: Path, weights: Path, layer: int, heads: dict[str, Any]) -> None:
    """Check a table's cos: the head of the layer, on the output of the block of that layer. heads: weight and bias."""
    assert ran.code == 0, ran.err
    rows, table = CaptureStore.open(root / "run.zarr").layer(layer)[:], pq.read_table(out).to_pylist()
    weight = heads["weight"].double().numpy()
    bias = heads["bias"].double().numpy() if "bias" in heads else 0
    for row in table[::13]:
        prompt = f"Summary at {layer}: <text>{row['explanation']}</text> <summary>"
        r, v = weight @ plain_state(weights, prompt, layer) + bias, rows[row["row"]].astype(np.float64)
        assert row["cos"] == pytest.approx(float(v @ r / np.linalg.norm(v) / np.linalg.norm(r)), abs=2e-5)


@pytest.mark.parametrize(
    ("form", "bias", "layer"),
    [
        ("value_heads.{layer}.weight", True, 1),
        ("value_head.{layer}.weight", False, 2),
        ("{layer}.weight", True, 2),
        ("{layer}", False, 1),
    ],
)
def test_the_head_of_the_layer_that_is_read(
    many: Path, tmp_path: Path, form: str, bias: bool, layer: int
) -> None:
    shutil.copytree(many / "ar", tmp_path / "ar")
    save_heads(tmp_path / "ar", form, bias)
    held = load_file(tmp_path / "ar" / HEADS)
    out, key = tmp_path / "x.parquet", form.format(layer=layer)
    heads = {"weight": held[key]} | ({"bias": held[key.replace("weight", "bias")]} if bias else {})
    ran = call(*both(many, out, layer, ar=tmp_path / "ar"))
    check_scores(ran, many, out, tmp_path / "ar", layer, heads)
    assert read_metadata(out)["layer"] == layer
    vectors = CaptureStore.open(many / "run.zarr").layer(layer)
    for row in pq.read_table(out).to_pylist()[::16]:
        message = f"At {layer}, 50%: <concept>{MARKER}</concept>"
        text = plain_text(many / "av", vectors[row["row"]], new_tokens=8, message=message)
        assert row["explanation"] == text
    check_refused(
        call(*both(many, out, 3 - layer, ar=tmp_path / "ar"), "--resume"),
        "made with other options .*layer was",
    )


def test_the_layer_is_that_of_the_av_or_of_the_sidecar(many: Path, tmp_path: Path) -> None:
    for name, told in (("av", many / "av"), ("ar", many / "ar")):
        shutil.copytree(told, tmp_path / name)
        sidecar = yaml.safe_load((tmp_path / name / "nla_meta.yaml").read_text())
        write_sidecar(tmp_path / name, sidecar | {"extraction_layer_index": 1})
    for given in ({"av": tmp_path / "av"}, {"av": tmp_path / "av", "ar": tmp_path / "ar"}):
        out = tmp_path / f"{len(given)}.parquet"
        assert call(*both(many, out, None, **given)).code == 0
        assert read_metadata(out)["layer"] == 1
    texts = explain(many, tmp_path / "e.parquet", layer=1, template_value="depth_pct=50")
    assert call(*texts).code == 0
    ran = call(*score(many, tmp_path / "s.parquet", tmp_path / "e.parquet", ar=tmp_path / "ar"))
    held = load_file(many / "ar" / HEADS)["value_heads.1.weight"]
    check_scores(ran, many, tmp_path / "s.parquet", many / "ar", 1, {"weight": held})


@pytest.mark.parametrize("told", ["the table of explain", "a field"])
def test_score_takes_the_layer_from_the_texts(many: Path, tmp_path: Path, told: str) -> None:
    """The AR has a head for each layer and names none; --layer is left out, or says the same."""
    for layer in LAYERS:
        texts, out = tmp_path / f"{layer}.parquet", tmp_path / f"scored {layer}.parquet"
        assert call(*explain(many, texts, layer=layer, template_value="depth_pct=50")).code == 0
        if told == "a field":
            table = pq.read_table(texts, columns=["row", "explanation"]).rename_columns(["row", "text"])
            layers = pa.array([layer] * len(table), pa.int16())
            pq.write_table(table.replace_schema_metadata(None).append_column("layer", layers), texts)
        ran = call(*score(many, out, texts))
        held = load_file(many / "ar" / HEADS)[f"value_heads.{layer}.weight"]
        check_scores(ran, many, out, many / "ar", layer, {"weight": held})
        assert read_metadata(out)["layer"] == layer
        again = call(*score(many, tmp_path / f"again {layer}.parquet", texts, layer=layer))
        check_scores(again, many, out, many / "ar", layer, {"weight": held})
        ran = call(*score(many, tmp_path / "no.parquet", texts, layer=3 - layer))
        check_refused(ran, f"are about layer {layer}: leave --layer out")


def test_heads_alone_stand_over_a_base_that_is_given(many: Path, tmp_path: Path) -> None:
    """As the trainers of frozen backbones leave them: a sidecar and heads, and no weights."""
    save_heads(tmp_path / "ar")
    out, before = tmp_path / "x.parquet", contents(tmp_path)
    held = load_file(tmp_path / "ar" / HEADS)["value_heads.2.weight"]
    ran = call(*both(many, out, 2, ar=tmp_path / "ar"))
    check_refused(
        ran, "value_heads.safetensors does not name the base of these heads: pass --ar-base with the model"
    )
    ran = call(*both(many, out, 2, ar=tmp_path / "ar", ar_base=tmp_path / "none"))
    check_refused(ran, "has heads alone, and --ar-base cannot be had")
    assert contents(tmp_path) == before
    ran = call(*both(many, out, 2, ar=tmp_path / "ar", ar_base=many / "base"))
    check_scores(ran, many, out, many / "base", 2, {"weight": held})
    metadata = read_metadata(out)
    assert metadata["ar"] == str(tmp_path / "ar") and metadata["ar_base"] == str(many / "base")
    assert "ar_adapter" not in metadata


def test_heads_beside_an_adapter(many: Path, tmp_path: Path) -> None:
    """The adapter changes all blocks; those behind the layer are left out."""
    base = many / "base"
    tensors = save_adapter(tmp_path / "ar", base)
    save_heads(tmp_path / "ar")
    whole = save_merged(tmp_path / "merged", merged(base, tensors), tmp_path / "ar")
    for layer in LAYERS:
        out = tmp_path / f"{layer}.parquet"
        ran = call(*both(many, out, layer, ar=tmp_path / "ar"))
        held = load_file(tmp_path / "ar" / HEADS)[f"value_heads.{layer}.weight"]
        check_scores(ran, many, out, whole, layer, {"weight": held})


def test_heads_alone_in_a_folder_of_the_hub(hub: Hub, many: Path, tmp_path: Path) -> None:
    save_heads(tmp_path / "ar")
    held = load_file(tmp_path / "ar" / HEADS)
    hub.add("owner/pair", {f"ar/{path.name}": path.read_bytes() for path in (tmp_path / "ar").iterdir()})
    hub.add("owner/base", many / "base")
    out = tmp_path / "x.parquet"
    ran = call(*both(many, out, 1, ar="owner/pair/ar", ar_base="owner/base"))
    check_scores(ran, many, out, many / "base", 1, {"weight": held["value_heads.1.weight"]})
    assert read_metadata(out)["ar_revision"] == hub.repositories["owner/pair"].commit
    assert read_metadata(out)["ar_base_revision"] == hub.repositories["owner/base"].commit


def heads(**changes: torch.Tensor) -> Callable[[Path], Any]:
    """Put these heads in place of those there are; their keys with underscores for dots."""
    return lambda root: save_file(
        {key.replace("_", ".").lstrip("."): tensor for key, tensor in changes.items()}, root / "ar" / HEADS
    )


FAULTS: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str]] = {
    "no layer": (lambda root: None, {"layer": None}, "hole {layer} without a value: pass --layer"),
    "no layer for the heads": (
        lambda root: (root / "av" / "nla_meta.yaml").write_text(
            (root / "av" / "nla_meta.yaml").read_text().replace("{layer}", "one")
        )
        and write_sidecar(root / "ar", AR_SIDECAR | {"prompt_templates": {"ar": "{explanation}"}}),
        {"layer": None},
        "holds heads of layers 0, 1, 2, 3: pass --layer with the one to read",
    ),
    "a layer without a head": (
        heads(_0_weight=torch.eye(D), _2_weight=torch.eye(D)), {}, "has no head for layer 1, it has those of 0, 2",
    ),
    "a bias alone": (
        heads(_1_bias=torch.ones(D), _2_weight=torch.eye(D)), {}, "has no head for layer 1, it has those of 2",
    ),
    "a layer beyond the blocks": (heads(_1=torch.eye(D), _9=torch.eye(D)), {"layer": 9}, "has 4 blocks, 10 are needed"),
    "another tensor": (heads(_1=torch.eye(D), norm=torch.ones(D)), {}, "holds norm, which is the head of no layer"),
    "twice": (
        heads(_1=torch.eye(D), _1_weight=torch.eye(D)), {}, "holds 1 and 1.weight, two heads of one layer",
    ),
    "of another width": (heads(_1_weight=torch.eye(D - 1)), {}, r"weight has shape \(63, 63\)"),
    "NaN": (heads(_1_weight=torch.full((D, D), torch.nan)), {}, "weight holds NaN or Inf"),
    "two files": (
        lambda root: save_file({"weight": torch.eye(D)}, root / "ar" / "value_head.safetensors"),
        {},
        "has value_head.safetensors and value_heads.safetensors: which of the two",
    ),
    "a layer that the store lacks": (lambda root: None, {"layer": 3}, "holds layer 1, 2, the AV and AR were made for"),
    "two layers": (lambda root: None, {"template_value": "layer=2"}, "--template-value layer=2, but layer 1 is read"),
    "another layer than the sidecar's": (
        lambda root: write_sidecar(root / "ar", AR_SIDECAR | {"extraction_layer_index": 2}),
        {},
        "--layer 1: this AV and AR were made for layer 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_heads_that_do_not_fit_are_refused(many: Path, tmp_path: Path, fault: str) -> None:
    put, given, message = FAULTS[fault]
    for name in ("av", "ar"):
        shutil.copytree(many / name, tmp_path / name)
    put(tmp_path)
    before = contents(tmp_path)
    command = roundtrip(tmp_path, tmp_path / "x.parquet", many / "run.zarr", **{"layer": 1, **given})
    check_refused(call(*command, *flags({"template_value": "depth_pct=50"})), message)
    assert contents(tmp_path) == before
