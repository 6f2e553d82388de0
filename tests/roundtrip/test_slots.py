"""AVs that read several vectors at several markers, ARs that give several layers: against plain transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from adapters import merged, save_adapter, save_tap_adapter
from commands import Ran, call, check_refused, contents, explain, flags, roundtrip, score
from safetensors.torch import load_file, save_file
from stand_in_hub import Hub
from store_samples import fill_store
from test_verbalizer_families import Family, told_text
from tiny import MARKER, D, byte_tokenizer, save_av, save_model, write_sidecar

from nla_engine.codec.rows import Codec
from nla_engine.roundtrip.results import read_metadata
from nla_engine.store import CaptureStore

TAPS = [1, 2, 3]
LAYERS = "L1@0,L2@0,L3@0"
MESSAGE = "{m} {m} {m}: describe"
ADDED = {"injection": "add@1", "norm_match": True}
AR_TEXT = "Summary of <text>{explanation}</text> <summary>"


@pytest.fixture(scope="module")
def slotted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """base, av (an adapter whose template has three markers), ar (an adapter that gives TAPS), a store of random
    vectors at these layers, some zero or not finite, some positions missing; the merged AV and AR."""
    torch.manual_seed(7)  # with some seeds a model writes the same about every vector
    root = tmp_path_factory.mktemp("slots")
    base = save_model(root / "base")
    av = merged(base, save_adapter(root / "av", base))
    said = yaml.safe_load((save_av(root / "like", 2) / "nla_meta.yaml").read_text())
    for key in ("injection_left_neighbor_id", "injection_right_neighbor_id"):
        del said["tokens"][key]
    del said["extraction_layer_index"]
    said["prompt_templates"] = {"av": MESSAGE.format(m="{injection_char}")}
    write_sidecar(root / "av", said)
    ar = merged(base, save_tap_adapter(root / "ar", base, TAPS), lambda name: 6 / 2)
    write_sidecar(root / "ar", {"kind": "nla_model", "d_model": D, "prompt_templates": {"ar": AR_TEXT}})
    fill_store(root / "run.zarr", Codec.named("bf16", D), [9, 8, 10], layers=tuple(TAPS))
    return root, av, ar


def both(root: Path, out: Path, slots: str | None = LAYERS, **changes: object) -> list[object]:
    return roundtrip(
        root,
        out,
        **{"slots": slots, "layer": 2, "ar_base": root / "base", "max_new_tokens": 12, **ADDED, **changes},
    )


def read_back(ar: Any, head: torch.Tensor, text: str, layer: int) -> np.ndarray:
    """What the AR makes of a text for a layer: its head on the output of the block of that layer."""
    ids = torch.tensor([byte_tokenizer().encode(AR_TEXT.format(explanation=text), add_special_tokens=False)])
    kept: list[torch.Tensor] = []
    handle = ar.model.layers[layer].register_forward_hook(
        lambda _m, _i, output: kept.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        ar(ids)
    handle.remove()
    state = kept[0][0, -1].double()
    return (
        head.double() @ (state / state.norm() * D**0.5)
    ).numpy()  # the trainer's, with the state at norm sqrt(d)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    if not (np.isfinite(b).all() and b.any()):
        return float("nan")
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize(
    "slots", [LAYERS, "L2@-2,L2@-1,L2@0", "L3@0,L1@-3,L2@-1"], ids=["layers", "positions", "both"]
)
def test_texts_and_scores_of_every_layer(slotted: tuple[Path, Any, Any], tmp_path: Path, slots: str) -> None:
    root, av, ar = slotted
    out = tmp_path / "x.parquet"
    ran = call(*both(root, out, slots))
    assert ran.code == 0, ran.err
    store = CaptureStore.open(root / "run.zarr")
    vectors = {layer: store.layer(layer)[:] for layer in TAPS}
    of = {
        (s, p): row
        for row, (s, p) in enumerate(zip(store.column("sequence"), store.column("position"), strict=True))
    }
    places = [slot.removeprefix("L").split("@") for slot in slots.split(",")]
    table = pq.read_table(out).to_pylist()
    complete = [row for (s, p), row in of.items() if all((s, p + int(offset)) in of for _, offset in places)]
    assert [line["row"] for line in table] == complete
    assert ("rows are left out" in ran.err) == (len(complete) < len(of))
    heads = load_file(root / "ar" / "ar_multitap.safetensors")
    family = Family(block=1, message=MESSAGE.format(m=MARKER))
    for line in table[::2]:
        entering = np.stack(
            [
                vectors[int(layer)][of[line["sequence"], line["position"] + int(offset)]]
                for layer, offset in places
            ]
        )
        norms = np.linalg.norm(entering.astype(np.float64), axis=1)
        if not (np.isfinite(norms).all() and norms.all()):
            assert line["explanation"] == "" and line["status"] in ("zero_vector", "nonfinite_vector")
            assert line["cos"] is line["cos_L1"] is line["fve_nrm_L3"] is None
            continue
        assert line["explanation"] == told_text(av, family, entering)
        for layer in TAPS:
            again = read_back(ar, heads[f"heads.{layer}.weight"], line["explanation"], layer)
            cos = cosine(again, vectors[layer][line["row"]])
            told = line["cos" if layer == 2 else f"cos_L{layer}"]
            assert told is None if np.isnan(cos) else told == pytest.approx(cos, abs=2e-5)
    assert len({line["explanation"] for line in table}) > 2, (
        "the vectors change nothing, so the test shows nothing"
    )
    for layer in (1, 3):
        unit = vectors[layer].astype(np.float64)
        with np.errstate(invalid="ignore"):
            unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        unit = unit[np.isfinite(unit).all(1)]
        variance = 1 - np.linalg.norm(unit.mean(0)) ** 2
        for line in (line for line in table if line[f"cos_L{layer}"] is not None):
            fve = 1 - 2 * (1 - line[f"cos_L{layer}"]) / variance
            assert line[f"fve_nrm_L{layer}"] == pytest.approx(fve, abs=1e-6)
            assert (
                1 <= line[f"retrieval_rank_L{layer}"] <= len(table)
                and abs(line[f"cos_shuffled_L{layer}"]) <= 1
            )
    assert read_metadata(out)["run"]["slots"] == slots


def test_the_summary_and_the_halves(slotted: tuple[Path, Any, Any], tmp_path: Path) -> None:
    """explain and score together give what the round trip gives; a summary has the means of every layer."""
    root = slotted[0]
    ran = call(*both(root, tmp_path / "x.parquet"), "--json")
    assert ran.code == 0, ran.err
    whole = pq.read_table(tmp_path / "x.parquet").to_pydict()
    assert set(ran.json["further_layers"]) == {"1", "3"}
    for layer, means in ran.json["further_layers"].items():
        for name in ("cos", "fve_nrm", "cos_shuffled"):
            known = [value for value in whole[f"{name}_L{layer}"] if value is not None]
            assert means[name] == pytest.approx(np.mean(known), abs=1e-5)
    given = {"slots": LAYERS, "layer": 2, "max_new_tokens": 12, **ADDED}
    assert call(*explain(root, tmp_path / "e.parquet", **given)).code == 0
    command = score(root, tmp_path / "s.parquet", tmp_path / "e.parquet", layer=2, ar_base=root / "base")
    assert call(*command).code == 0
    halves = pq.read_table(tmp_path / "s.parquet").to_pydict()
    for name in ("explanation", "cos", "cos_L1", "fve_nrm_L3", "retrieval_rank_L1", "cos_shuffled_L3"):
        assert halves[name] == whole[name]
    check_refused(call(*both(root, tmp_path / "x.parquet", "L1@0,L2@0,L2@0"), "--resume"), "slots was")
    command = score(root, tmp_path / "again.parquet", tmp_path / "x.parquet", ar_base=root / "base")
    assert (
        call(*command).code == 0
    )  # the layer and the texts are those of the table; scores are computed again
    again = pq.read_table(tmp_path / "again.parquet").to_pydict()
    assert again["cos_L1"] == whole["cos_L1"] and again.keys() == whole.keys()


def test_the_user_s_own_prompt_and_a_followed_row(slotted: tuple[Path, Any, Any], tmp_path: Path) -> None:
    """A prompt with two places for two slots; --where and --limit choose among the rows that have both."""
    root, av, _ = slotted
    out = tmp_path / "x.parquet"
    ran = call(
        *both(root, out, "L2@-1,L2@0", prompt="One <INJECT> two <INJECT>.", where="position < 6", limit=5)
    )
    assert ran.code == 0, ran.err
    store = CaptureStore.open(root / "run.zarr")
    vectors, position = store.layer(2)[:], store.column("position")
    table = pq.read_table(out).to_pylist()
    assert len(table) == 5 and all(1 <= line["position"] < 6 for line in table)
    family = Family(block=1, message=f"One {MARKER} two {MARKER}.")
    for line in table:
        row = line["row"]
        assert position[row - 1] == line["position"] - 1
        if line["explanation"]:
            assert line["explanation"] == told_text(av, family, vectors[row - 1 : row + 1])


def test_layers_that_the_store_lacks_are_not_scored(slotted: tuple[Path, Any, Any], tmp_path: Path) -> None:
    root = slotted[0]
    fill_store(tmp_path / "run.zarr", Codec.named("bf16", D), [5], layers=(2,))
    command = both(root, tmp_path / "x.parquet", "L2@0,L2@0,L2@0")
    ran = call(*[tmp_path / "run.zarr" if word == root / "run.zarr" else word for word in command])
    assert ran.code == 0 and "the AR also gives layer 1, 3, which the store lacks: not scored" in ran.err
    names = pq.read_schema(tmp_path / "x.parquet").names
    assert "cos" in names and not any("_L" in name for name in names)


def meta(**changes: Any) -> Callable[[Path], Any]:
    def put(root: Path) -> None:
        path = root / "ar" / "ar_meta.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return put


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], Any]:
    def put(root: Path) -> None:
        path = root / "ar" / "ar_multitap.safetensors"
        held = load_file(path)
        change(held)
        save_file(held, path)

    return put


FAULTS: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str]] = {
    "three markers and no slots": (
        lambda root: None, {"slots": None},
        "must hold {injection_char} once, it holds it 3 times: pass --slots",
    ),
    "two slots, three markers": (
        lambda root: None, {"slots": "L1@0,L2@0"}, "2 times, once for each of --slots, it holds it 3 times"
    ),
    "three slots, one place in the prompt": (
        lambda root: None, {"prompt": "What is <INJECT>?"}, "--slots names 3 vectors, which need 3 places"
    ),
    "a layer that the store lacks": (
        lambda root: None, {"slots": "L0@0,L1@0,L2@0"}, "--slots names layer 0, .* holds layer 1, 2, 3"
    ),
    "no such row": (lambda root: None, {"slots": "L1@-9999,L1@0,L1@0"}, "has no row|holds no rows"),
    "a position behind": (lambda root: None, {"slots": "L1@1,L1@0,L1@0"}, "a list such as L23@0,L24@-1"),
    "not a list": (lambda root: None, {"slots": "1,2,3"}, "a list such as L23@0,L24@-1"),
    "no layer": (lambda root: None, {"layer": None}, "holds heads of layers 1, 2, 3: pass --layer"),
    "a layer that it does not give": (
        lambda root: None, {"layer": 0}, "has no head for layer 0, it has those of 1, 2, 3"
    ),
    "a variance for all layers": (lambda root: None, {"variance": 0.5}, "--variance is that of one layer"),
    "a tap without a head": (tensors(lambda held: held.pop("heads.3.weight")), {}, "has no head for layer 3"),
    "a head with a bias": (
        tensors(lambda held: held.update({"heads.2.bias": torch.ones(D)})), {}, "holds heads.bias"
    ),
    "no LoRA": (
        tensors(lambda held: [held.pop(key) for key in list(held) if "lora" in key]), {}, "holds no tensors of a LoRA"
    ),
    "the final norm": (meta(strip_final_norm=False), {}, "strip_final_norm is not true"),
    "an unknown key": (meta(pool="mean"), {}, "pool is not known, and may change the weights"),
    "no taps": (meta(tap_layers=[]), {}, "tap_layers is .*, not a list of different block numbers"),
    "a tap twice": (meta(tap_layers=[1, 1]), {}, "tap_layers is .*, not a list of different block numbers"),
    "two kinds of heads": (
        lambda root: save_file({"value_head.weight": torch.eye(D)}, root / "ar" / "ar_lora_value_head.safetensors"),
        {},
        "has ar_meta.json beside other weights",
    ),
    "a map": (
        lambda root: save_file({"weight": torch.eye(D)}, root / "ar" / "ar_map.safetensors"), {}, "is of one layer"
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_refused(slotted: tuple[Path, Any, Any], tmp_path: Path, fault: str) -> None:
    put, given, message = FAULTS[fault]
    for name in ("av", "ar", "base"):
        shutil.copytree(slotted[0] / name, tmp_path / name)
    put(tmp_path)
    before = contents(tmp_path)
    options = {"slots": LAYERS, "layer": 2, "ar_base": tmp_path / "base", **ADDED, **given}
    ran: Ran = call("roundtrip", slotted[0] / "run.zarr", *flags({
        "av": tmp_path / "av", "ar": tmp_path / "ar", "out": tmp_path / "x.parquet", "device": "cpu", **options
    }))  # fmt: skip
    check_refused(ran, message)
    assert contents(tmp_path) == before


def test_from_the_hub(hub: Hub, slotted: tuple[Path, Any, Any], tmp_path: Path) -> None:
    """The adapter of several layers is fetched with its head file, from a folder of a repository."""
    root = slotted[0]
    files = {
        f"{half}/{path.name}": path.read_bytes() for half in ("av", "ar") for path in (root / half).iterdir()
    }
    hub.add("owner/pair", files)
    hub.add("owner/base", root / "base")
    given = {
        "av": "owner/pair/av",
        "av_base": "owner/base",
        "ar": "owner/pair/ar",
        "ar_base": "owner/base",
        "limit": 3,
    }
    for out, changes in ((tmp_path / "hub.parquet", given), (tmp_path / "here.parquet", {"limit": 3})):
        ran = call(*both(root, out, **changes))
        assert ran.code == 0, ran.err
    columns = ["explanation", "cos", "cos_L1", "cos_L3"]
    assert pq.read_table(tmp_path / "hub.parquet", columns=columns).equals(
        pq.read_table(tmp_path / "here.parquet", columns=columns)
    )
    assert read_metadata(tmp_path / "hub.parquet")["ar_revision"] == hub.repositories["owner/pair"].commit
