"""Families of verbalizers, from tiny imitations of their files: texts and scores as plain transformers gives them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from adapters import merged, save_adapter, save_ar_adapter, whole_model
from commands import LAYER, call
from safetensors.torch import load_file
from tiny import MARKER, D, byte_tokenizer, save_ar, save_av, write_sidecar

from nla_engine.roundtrip.results import read_metadata
from nla_engine.roundtrip.verbalize import parse_explanation
from nla_engine.store import CaptureStore

NEW = 12


@dataclass(frozen=True)
class Family:
    """What its AV's trainer does. block: None: the marker's embedding is replaced; else added there, norm-matched.

    sidecar: entries of its file in place of the released kind's; None takes one out
    message: the user's message, with the marker; told: what a user passes; prefill: the beginning of the reply
    """

    sidecar: dict[str, Any] = field(default_factory=dict)
    block: int | None = None
    scale: float | None = 12.0
    message: str = f"Say what this is: <concept>{MARKER}</concept>"
    told: tuple[str, ...] = ()
    prefill: str = ""


DATASET = {
    "kind": "nla_dataset",
    "role": None,
    "d_model": None,
    "extraction": {"d_model": D, "norm": "none"},
    "prompt_templates": {"av": "", "actor": "Say what this is: <concept>{injection_char}</concept>"},
}
ADDED = ("--injection", "add@1", "--norm-match")
FAMILIES = {
    "released": Family(),
    "released, raw": Family({"extraction": {"injection_scale": "raw"}}, scale=None),
    "nanoNLA, EasyNLA": Family(DATASET, block=1, told=ADDED),
    "a template with the layer (Oracle Lens)": Family(
        {
            "extraction": {"injection_scale": 16000},
            "prompt_templates": {
                "av": "List layer {layer} at {depth_pct}%: <concept>{injection_char}</concept>"
            },
        },
        scale=16000.0,
        message=f"List layer {LAYER} at 50%: <concept>{MARKER}</concept>",
        told=("--template-value", "depth_pct=50"),
    ),
    "a free prompt with the beginning of an answer (SelfIE)": Family(
        block=1,
        message=f"What does {MARKER} mean?",
        told=(*ADDED, "--prompt", "What does <INJECT> mean?", "--prefill", "It means"),
        prefill="It means",
    ),
}


def told_text(model: Any, family: Family, vector: np.ndarray) -> str:
    """What plain transformers generates with a hook. vector: float32 [d], or [k, d] for the k markers."""
    tokenizer = byte_tokenizer()
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": family.message}], tokenize=False, add_generation_prompt=True
    )
    ids = torch.tensor([tokenizer.encode(text + family.prefill, add_special_tokens=False)])
    marker = tokenizer.convert_tokens_to_ids(MARKER)
    places = [place for place, id_ in enumerate(ids[0].tolist()) if id_ == marker]

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.shape[1] > 1:
            for v, place in zip(torch.from_numpy(np.atleast_2d(vector)), places, strict=True):
                there = hidden[0, place].clone()
                if family.block is not None:
                    hidden[0, place] = there + there.norm() * v / v.norm()
                else:
                    hidden[0, place] = v if family.scale is None else v * family.scale / v.norm()
        return output

    at = model.get_input_embeddings() if family.block is None else model.model.layers[family.block]
    handle = at.register_forward_hook(hook)
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=tokenizer.eos_token_id,
        )
    handle.remove()
    new = out[0, ids.shape[1] :].tolist()
    if new[-1] == tokenizer.eos_token_id:
        new.pop()
    return parse_explanation(family.prefill + tokenizer.decode(new, skip_special_tokens=False))[0]


@pytest.fixture(scope="module")
def trained(adapted: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any, torch.Tensor]:
    """Adapters of an AV and an AR in folders of one directory (av, critic), the merged models, the AR's head."""
    torch.manual_seed(1)  # with some seeds a model writes the same about every vector
    root, base = tmp_path_factory.mktemp("families"), adapted / "base"
    shutil.copytree(base, root / "base")
    av = merged(base, save_adapter(root / "av", base))
    ar = merged(base, save_ar_adapter(root / "critic", base, LAYER + 1), lambda name: 6 / 2)
    save_ar(root / "released", LAYER)
    sidecar = yaml.safe_load((root / "released" / "nla_meta.yaml").read_text()) | {"role": None}
    write_sidecar(root / "critic", {key: value for key, value in sidecar.items() if value is not None})
    head = load_file(root / "critic" / "ar_lora_value_head.safetensors")["value_head.weight"]
    return root, av, ar, head


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_s_texts_and_scores(
    name: str, trained: tuple[Path, Any, Any, torch.Tensor], adapted: Path, tmp_path: Path
) -> None:
    family, (root, av, ar, head) = FAMILIES[name], trained
    said = yaml.safe_load((save_av(tmp_path / "like", LAYER) / "nla_meta.yaml").read_text()) | family.sidecar
    shutil.copytree(root / "av", tmp_path / "av")
    write_sidecar(tmp_path / "av", {key: value for key, value in said.items() if value is not None})
    out = tmp_path / "x.parquet"
    ran = call(
        "roundtrip", adapted / "run.zarr", "--av", tmp_path / "av", "--av-base", root / "base",
        "--ar", root / "critic", "--ar-base", root / "base", "--out", out,
        "--max-new-tokens", NEW, "--device", "cpu", *family.told,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    table, store = pq.read_table(out).to_pydict(), CaptureStore.open(adapted / "run.zarr")
    vectors, tokenizer = store.layer(LAYER)[:], byte_tokenizer()
    assert len(table["row"]) == len(vectors) >= 8
    for row, text, cos in zip(table["row"], table["explanation"], table["cos"], strict=True):
        assert text == told_text(av, family, vectors[row])
        ids = torch.tensor(
            [tokenizer.encode(f"Summary of <text>{text}</text> <summary>", add_special_tokens=False)]
        )
        with torch.no_grad():
            state = ar(ids, output_hidden_states=True).hidden_states[LAYER + 1][0, -1]
        again, v = (state @ head.T).double().numpy(), vectors[row].astype(np.float64)
        assert abs(cos - again @ v / np.linalg.norm(again) / np.linalg.norm(v)) < 1e-5
    assert len(set(table["explanation"])) > 2, "the vectors change nothing, so the test shows nothing"
    metadata = read_metadata(out)
    how = ("add@1", None, True) if family.block == 1 else ("replace", family.scale, False)
    assert tuple(metadata[key] for key in ("injection", "injection_scale", "norm_match")) == how


def test_the_base_alone_writes_other_texts(
    trained: tuple[Path, Any, Any, torch.Tensor], adapted: Path
) -> None:
    """So that the texts above show the adapter."""
    root, av, _, _ = trained
    vectors, base = CaptureStore.open(adapted / "run.zarr").layer(LAYER)[:3], whole_model(root / "base")
    assert [told_text(av, Family(), v) for v in vectors] != [told_text(base, Family(), v) for v in vectors]
