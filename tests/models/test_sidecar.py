"""Sidecars: every dialect, every check, and a clear error for each fault."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import ARCHITECTURES, MARKER, D, byte_tokenizer, save_ar, save_av, save_model, write_sidecar

from nla_engine.errors import CheckpointError
from nla_engine.models.av_prompt import verbalizer_prompt
from nla_engine.models.load import load_model
from nla_engine.models.sidecar import Given, read_sidecar, reconstructor_prompts
from nla_engine.roundtrip.reconstruct import Reconstructor
from nla_engine.roundtrip.verbalize import Verbalizer

CPU: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}
TOKENS = {"injection_char": MARKER, "injection_token_id": 258}
AV = {
    "kind": "nla_model",
    "role": "av",
    "d_model": D,
    "extraction": {"injection_scale": 150},
    "tokens": TOKENS,
    "prompt_templates": {"av": "x {injection_char} y"},
}
AR = {"role": "ar", "d_model": D, "prompt_templates": {"ar": "x {explanation} y"}}


def read(tmp_path: Path, sidecar: dict[str, Any], role: str, **given: Any) -> Any:
    return read_sidecar(write_sidecar(tmp_path, sidecar), role, Given(**given))


@pytest.mark.parametrize(("word", "role"), [("av", "av"), ("actor", "av"), ("ar", "ar"), ("critic", "ar")])
def test_roles(tmp_path: Path, word: str, role: str) -> None:
    assert read(tmp_path, {**(AV if role == "av" else AR), "role": word}, role).role == role


def test_a_prompt_that_changes_with_the_day_is_part_of_the_fingerprint(tmp_path: Path, monkeypatch) -> None:
    """A round trip that goes on another day must not mix two prompts."""
    from datetime import datetime

    from transformers.utils import chat_template_utils

    class Day(datetime):
        today = 1

        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return datetime(2031, 1, cls.today)

    def fingerprints() -> list[str]:
        found = []
        for Day.today in (1, 1, 2):
            found.append(Verbalizer.load(str(directory), **CPU).fingerprint())
        return found

    directory = save_av(tmp_path / "av", 2)
    monkeypatch.setattr(chat_template_utils, "datetime", Day)
    assert len(set(fingerprints())) == 1
    template = directory / "chat_template.jinja"
    template.write_text("{{ strftime_now('%d') }} " + template.read_text())
    first, again, next_day = fingerprints()
    assert first == again != next_day


@pytest.mark.parametrize("name", ["av", "actor", "verbalizer"])
def test_av_template_names(tmp_path: Path, name: str) -> None:
    sidecar = {**AV, "prompt_templates": {"av": "", name: "t {injection_char}"}}  # an empty one is none
    assert read(tmp_path, sidecar, "av").template == ("t ", "")


@pytest.mark.parametrize("name", ["ar", "critic", "reconstructor"])
def test_ar_template_names(tmp_path: Path, name: str) -> None:
    sidecar = {**AR, "prompt_templates": {name: "t {explanation}"}}
    assert read(tmp_path, sidecar, "ar").template == ("t ", "")


@pytest.mark.parametrize(
    ("entry", "layer"),
    [
        ({"extraction_layer_index": 20}, 20),
        ({"critic": {"extraction_layer_index": 7}}, 7),
        ({"critic": {"num_hidden_layers": 8}}, 8),
        ({"ar": {"num_hidden_layers": 9}}, 9),
        ({}, None),
    ],
)
def test_layer_dialects(tmp_path: Path, entry: dict[str, Any], layer: int | None) -> None:
    assert read(tmp_path, {**AR, **entry}, "ar").layer == layer


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (150, 150.0),
        (80000.0, 80000.0),
        ("150", 150.0),
        ("8e4", 80000.0),
        ("raw", None),
        ("none", None),
        ("sqrt_d_model", math.sqrt(D)),
    ],
)
def test_injection_scales(tmp_path: Path, scale: Any, expected: float | None) -> None:
    assert read(tmp_path, {**AV, "extraction": {"injection_scale": scale}}, "av").injection.scale == expected


@pytest.mark.parametrize("extraction", [{}, {"injection_scale": None}, None])
def test_an_av_without_a_scale_is_refused_unless_it_is_given(tmp_path: Path, extraction: Any) -> None:
    """null, too: the reference writes raw for vectors that enter as they are."""
    sidecar = {**AV, "extraction": extraction}
    with pytest.raises(CheckpointError, match="injection_scale is missing: pass --injection-scale"):
        read(tmp_path, sidecar, "av")
    for scale, expected in (("150", 150.0), ("raw", None), ("sqrt_d_model", math.sqrt(D))):
        assert read(tmp_path, sidecar, "av", scale=scale).injection.scale == expected
    with pytest.raises(
        CheckpointError, match="--injection-scale is 'loud', not a positive number or one of raw"
    ):
        read(tmp_path, sidecar, "av", scale="loud")
    assert read(tmp_path, AV, "av", scale="7").injection.scale == 7, "what is given comes first"


def test_what_is_given_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    found = [
        read(tmp_path, AV, "av", **given).fingerprint() for given in ({}, {"scale": "150"}, {"scale": "raw"})
    ]
    assert found[0] == found[1] != found[2]


def test_the_first_position_of_its_training_is_read_and_changes_no_fingerprint(tmp_path: Path) -> None:
    plain = read(tmp_path, AV, "av")
    stated = read(tmp_path, AV | {"extraction": {**AV["extraction"], "min_position": 50}}, "av")
    assert (plain.min_position, stated.min_position) == (None, 50)
    assert plain.fingerprint() == stated.fingerprint(), "a run that was begun before can be resumed"


def test_a_dataset_sidecar_says_neither_the_role_nor_how_vectors_enter(tmp_path: Path) -> None:
    av = {key: value for key, value in AV.items() if key not in ("role", "d_model")}
    av |= {"kind": "nla_dataset", "extraction": {"d_model": D, "norm": "none", "injection_scale": 150}}
    with pytest.raises(
        CheckpointError, match="nla_dataset.*does not say how vectors enter.*--injection replace"
    ):
        read(tmp_path, av, "av")
    assert read(tmp_path, av, "av", injection="replace").role == "av"
    assert read(tmp_path, {**AR, "role": None, "kind": "nla_dataset"}, "ar").role == "ar"


@pytest.mark.parametrize(
    "change",
    [
        {"injection": "add"},
        {"injection_layer": 1},
        {"extraction": {"injection_scale": 150, "injection_mode": "add"}},
        {"tokens": {**TOKENS, "injection_count": 4}},
    ],
)
def test_other_ways_for_a_vector_to_enter_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(
        CheckpointError, match="injection_?[a-z]* is not known, and may change how vectors enter"
    ):
        read(tmp_path, {**AV, **change}, "av")
    read(tmp_path, {**AV, **change}, "av", injection="replace")


@pytest.mark.parametrize(
    "places",
    [
        {"extraction_layer_index": 20, "critic": {"extraction_layer_index": 21}},
        {"extraction": {"layer_index": 20}, "ar": {"num_hidden_layers": 21}},
    ],
)
def test_two_places_that_disagree_about_the_layer_are_refused(tmp_path: Path, places: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"two different numbers \(.*20.*21\)"):
        read(tmp_path, {**AR, **places}, "ar")


def test_width_of_a_dataset_sidecar(tmp_path: Path) -> None:
    sidecar = {key: value for key, value in AR.items() if key != "d_model"}
    assert (
        read(tmp_path, {**sidecar, "kind": "nla_dataset", "extraction": {"d_model": 3584}}, "ar").d_model
        == 3584
    )


@pytest.mark.parametrize(
    ("change", "role", "message"),
    [
        ({"kind": "nla_adapter"}, "av", "kind is 'nla_adapter', which is none of nla_model, nla_dataset"),
        ({"extraction": {"injection_scale": 9, "norm": "layer_norm"}}, "av", "norm is 'layer_norm': only"),
        (
            {"extraction": {"injection_scale": 9, "norm": "none", "whitening": {}}},
            "av",
            "has extraction.whitening, and extraction.norm does not say whitened_zca",
        ),
        (
            {
                "extraction_layer_index": 4,
                "extraction": {
                    "injection_scale": 9,
                    "norm": "whitened_zca_v1",
                    "whitening": {"layer_index": 5},
                },
            },
            "av",
            r"two different numbers \(extraction_layer_index 4, extraction.whitening.layer_index 5\)",
        ),
        ({"extraction": {"injection_scale": 9, "d_model": D + 1}}, "av", "two different numbers"),
        ({"role": "judge"}, "av", "role 'judge' is none of"),
        ({"role": "ar"}, "av", "is an AR checkpoint, but was given as the AV"),
        ({"d_model": None}, "av", "d_model is missing"),
        ({"d_model": "wide"}, "av", "d_model is 'wide', not an integer"),
        ({"tokens": {}}, "av", "injection_char or tokens.injection_token_id is missing"),
        ({"prompt_templates": {}}, "av", "prompt_templates.av is missing"),
        ({"prompt_templates": {"av": ""}}, "av", "prompt_templates.av is missing"),
        ({"extraction": {"injection_scale": -1}}, "av", "not a positive number"),
        ({"extraction": {"injection_scale": float("nan")}}, "av", "not a positive number"),
        (
            {"extraction": {"injection_scale": 9, "min_position": -1}},
            "av",
            "min_position is -1, which is no position",
        ),
        ({"extraction": {"injection_scale": 9, "min_position": "early"}}, "av", "'early', not an integer"),
        ({"tokens": {**TOKENS, "critic_suffix_ids": "abc"}}, "av", "not a list of token ids"),
    ],
)
def test_broken_sidecars(tmp_path: Path, change: dict[str, Any], role: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        read(tmp_path, {**AV, **change}, role)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("text", ["{", "- a\n- b", "\x00", "a: !!python/object/apply:os.system ['true']"])
def test_sidecars_that_are_not_plain_yaml(tmp_path: Path, text: str) -> None:
    (tmp_path / "nla_meta.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=r"nla_meta\.yaml"):
        read_sidecar(tmp_path, "av")


def test_missing_sidecar(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="missing; .* is not an NLA checkpoint"):
        read_sidecar(tmp_path, "av")


def test_marker_checks(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    prompt = verbalizer_prompt(read(tmp_path, AV, "av"), tokenizer)
    assert prompt.token_ids.count(258) == 1 and prompt.token_ids[prompt.places[0]] == 258
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"tokens": {"injection_char": MARKER, "injection_token_id": 77}}, "must encode to the one id 77"),
        ({"tokens": {"injection_char": "ab", "injection_token_id": 258}}, "must encode to the one id 258"),
        ({"prompt_templates": {"av": f"{MARKER} and {{injection_char}}"}}, "it stands 2 times"),
        (
            {"tokens": {**TOKENS, "injection_left_neighbor_id": 3}},
            "left neighbour is token .* the sidecar says 3",
        ),
        ({"tokens": {**TOKENS, "injection_right_neighbor_id": 3}}, "right neighbour is token"),
    ]
    for change, message in wrong:
        with pytest.raises(CheckpointError, match=message):
            verbalizer_prompt(read(tmp_path, {**AV, **change}, "av"), tokenizer)


def test_a_normaliser_that_eats_the_marker_is_found(tmp_path: Path) -> None:
    from tokenizers import normalizers

    tokenizer = byte_tokenizer()
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.NFKC()
    backend.add_tokens([])
    broken = type(tokenizer)(tokenizer_object=backend, eos_token="<|im_end|>")
    sidecar = read(tmp_path, {**AV, "tokens": {"injection_char": "①", "injection_token_id": 258}}, "av")
    with pytest.raises(CheckpointError, match="must encode to the one id 258"):
        verbalizer_prompt(sidecar, broken)


def test_explanations_with_braces_and_suffix(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    suffix = tokenizer.encode(" y")
    sidecar = read(tmp_path, {**AR, "tokens": {"critic_suffix_ids": suffix}}, "ar")
    [ids] = reconstructor_prompts(sidecar, tokenizer, ["a {b} {explanation} {0}"])
    assert tokenizer.decode(ids) == "x a {b} {explanation} {0} y" and ids[-2:] == suffix
    wrong = read(tmp_path, {**AR, "tokens": {"critic_suffix_ids": [1, 2]}}, "ar")
    with pytest.raises(CheckpointError, match=r"ends with tokens .* the sidecar says \[1, 2\]"):
        reconstructor_prompts(wrong, tokenizer, ["text"])


def test_a_merge_across_the_suffix_is_undone(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(
        [".</"]
    )  # as a BPE merge would, it takes the explanation's full stop into the suffix
    suffix = tokenizer.encode("</text>")
    templates = {"ar": "x {explanation}</text>"}
    sidecar = read(
        tmp_path, {**AR, "tokens": {"critic_suffix_ids": suffix}, "prompt_templates": templates}, "ar"
    )
    [ids] = reconstructor_prompts(sidecar, tokenizer, ["It ends."])
    assert ids[-len(suffix) :] == suffix and tokenizer.decode(ids) == "x It ends.</text>"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_loads_in_every_role(tmp_path: Path, architecture: str) -> None:
    base = load_model(str(save_model(tmp_path / "base", architecture)), **CPU)
    assert (base.d_model, len(base.blocks), base.vocab_size) == (D, 4, 259)
    assert Verbalizer.load(str(save_av(tmp_path / "av", 2, architecture)), **CPU).sidecar.layer == 2
    assert Reconstructor.load(str(save_ar(tmp_path / "ar", 2, architecture)), **CPU).layer == 2


def head(path: Path, **tensors: torch.Tensor) -> None:
    save_file(tensors, path / "value_head.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "value_head.safetensors").unlink(), "value_head.safetensors: missing"),
        (
            lambda d: (d / "value_head.safetensors").write_bytes(b"\x08\x00"),
            "value_head.safetensors: cannot be read",
        ),
        (lambda d: head(d, weight=torch.full((D, D), math.nan)), "weight holds NaN or Inf"),
        (lambda d: head(d, weight=torch.eye(D), bias=torch.full((D,), math.inf)), "bias holds NaN or Inf"),
        (lambda d: head(d, weight=torch.eye(D - 1)), "weight has shape"),
        (lambda d: head(d, other=torch.eye(D)), "holds other, not 'weight'"),
        (lambda d: truncate(d / "model.safetensors"), r"model\.safetensors: cannot be read"),
        (lambda d: drop(d / "model.safetensors", "q_proj"), "weights are missing, the first is"),
        (lambda d: (d / "config.json").write_text("{"), r"config\.json: cannot be read as JSON"),
        (lambda d: (d / "tokenizer.json").write_text("{"), "the tokenizer cannot be loaded"),
        (lambda d: save_ar(d, 2, extraction_layer_index=3), "layer 3 needs 4 blocks, the model has 3"),
        (lambda d: save_ar(d, 2, d_model=D // 2), "this AR needs width 32"),
    ],
)
def test_damaged_ar_checkpoints(tmp_path: Path, damage: Any, message: str) -> None:
    directory = save_ar(tmp_path / "ar", 2)
    damage(directory)
    with pytest.raises(CheckpointError, match=message):
        Reconstructor.load(str(directory), **CPU)


def truncate(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def drop(path: Path, part: str) -> None:
    tensors = load_file(path)
    save_file({k: v for k, v in tensors.items() if part not in k}, path, metadata={"format": "pt"})


def test_value_head_bias_is_used(tmp_path: Path) -> None:
    directory = save_ar(tmp_path / "ar", 2)
    plain = Reconstructor.load(str(directory), **CPU).reconstruct(["a"])
    weight = load_file(directory / "value_head.safetensors")["weight"]
    head(directory, weight=weight, bias=torch.arange(D).float())
    assert np.allclose(
        Reconstructor.load(str(directory), **CPU).reconstruct(["a"]) - plain, np.arange(D), atol=1e-3
    )
