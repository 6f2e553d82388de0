"""What a sidecar does not say and the user does: the same run as with a whole sidecar, and refusals without it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from commands import call, check_refused
from tiny import D, write_sidecar

from nla_engine.errors import RequestError
from nla_engine.roundtrip.run import run_roundtrip
from nla_engine.roundtrip.verbalize import Verbalizer

WITHOUT_SCALE: dict[str, Any] = {"extraction": {"mse_scale": 8.0}}
DATASET: dict[str, Any] = {
    "kind": "nla_dataset",
    "role": None,
    "d_model": None,
    "extraction": {"d_model": D, "norm": "none", "injection_scale": "12"},
}
HOLES: dict[str, Any] = {
    "prompt_templates": {
        "av": "",
        "actor": "At {depth_pct}% of {{depth}}: <concept>{injection_char}</concept>",
    }
}
FILLED: dict[str, Any] = {
    "prompt_templates": {"av": "At 57% of {{depth}}: <concept>{injection_char}</concept>"}
}


def changed(root: Path, to: Path, change: dict[str, Any]) -> Path:
    """A copy of the AV with other entries in its sidecar; None takes one out."""
    shutil.copytree(root / "av", to)
    data = yaml.safe_load((to / "nla_meta.yaml").read_text()) | change
    return write_sidecar(to, {key: value for key, value in data.items() if value is not None})


def words(root: Path, av: Path, out: Path, *more: object) -> list[object]:
    return [
        "roundtrip", root / "run.zarr", "--av", av, "--ar", root / "ar", "--out", out,
        "--max-new-tokens", 12, "--device", "cpu", *more,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("whole", "change", "given"),
    [
        ({}, WITHOUT_SCALE, ["--injection-scale", "12"]),
        ({"extraction": {"injection_scale": "none"}}, WITHOUT_SCALE, ["--injection-scale", "raw"]),
        ({}, DATASET, ["--injection", "replace"]),
        (FILLED, HOLES, ["--template-value", "depth_pct=57"]),
    ],
)
def test_what_is_given_equals_what_a_sidecar_says(
    root: Path, tmp_path: Path, whole: dict[str, Any], change: dict[str, Any], given: list[str]
) -> None:
    intact, broken = changed(root, tmp_path / "intact", whole), changed(root, tmp_path / "broken", change)
    assert call(*words(root, intact, tmp_path / "a.parquet")).code == 0
    assert call(*words(root, broken, tmp_path / "b.parquet", *given)).code == 0
    one, other = (pq.read_table(tmp_path / f"{name}.parquet") for name in "ab")
    assert one.num_rows > 10 and one.equals(other)
    run = str(other.schema.metadata[b"nla_engine"])
    assert all(word in run for word in given[1].split("="))


REFUSED: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "no scale": (WITHOUT_SCALE, [], "injection_scale is missing: pass --injection-scale"),
    "no scale that is one": (
        {},
        ["--injection-scale", "loud"],
        "--injection-scale is 'loud': it must be a positive",
    ),
    "a data set": (DATASET, [], "does not say how vectors enter: pass --injection replace"),
    "another injection": (
        {},
        ["--injection", "add"],
        "--injection is 'add': it must be replace, replace@L or add@L",
    ),
    "a block that is not there": ({}, ["--injection", "add@4"], "--injection add@4: .* has blocks 0 to 3"),
    "two norms": (
        {},
        ["--injection", "add@1", "--norm-match", "--injection-scale", "3"],
        "--norm-match and --injection-scale exclude each other",
    ),
    "a norm of nothing": ({}, ["--norm-match"], "--norm-match goes with --injection"),
    "a prompt without a place": ({}, ["--prompt", "What is it?"], "does not hold <INJECT>"),
    "a prompt with two places": ({}, ["--prompt", "<INJECT> and <INJECT>"], "gives 1 vector for 2 places"),
    "a system message alone": ({}, ["--system", "Be brief."], "--system goes with --prompt"),
    "an option that is not read": (
        {},
        ["--template-option", "enable_thinking=false"],
        "--template-option enable_thinking, which the chat template does not read",
    ),
    "a hole": (HOLES, [], "a hole {depth_pct} without a value: pass --template-value depth_pct="),
    "a value twice": (HOLES, ["--template-value", "a=1", "--template-value", "a=2"], "gives a twice"),
    "a value without a name": (HOLES, ["--template-value", "57"], "is '57': it must be NAME=VALUE"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_is_not_known_is_refused(root: Path, tmp_path: Path, fault: str) -> None:
    change, given, message = REFUSED[fault]
    av = changed(root, tmp_path / "av", change)
    check_refused(call(*words(root, av, tmp_path / "x.parquet", *given)), message)
    assert not list(tmp_path.glob("x.parquet*"))


def test_what_is_given_with_a_loaded_model_is_refused(root: Path, tmp_path: Path) -> None:
    from test_roundtrip import CPU, options

    av = Verbalizer.load(str(root / "av"), **CPU)
    with pytest.raises(RequestError, match="for models that are loaded here"):
        run_roundtrip(options(root, tmp_path / "x.parquet", injection_scale="raw"), verbalizer=av)
