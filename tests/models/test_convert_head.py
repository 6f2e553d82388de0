"""Pickled heads: converted by a command of its own that runs nothing they hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nla_engine.errors import CheckpointError, RequestError
from nla_engine.models.convert_head import convert


class Harmful:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


W, BIAS = torch.randn(6, 6), torch.randn(6)
FORMS: dict[str, tuple[Any, bool]] = {
    "a tensor": (W, False),
    "a state dict": ({"weight": W, "bias": BIAS}, True),
    "in a model's": ({"value_head.weight": W.double(), "value_head.bias": BIAS}, True),
    "nested": ({"step": 7, "state_dict": {"head": {"weight": W}}}, False),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_head_is_the_same_as_safetensors(tmp_path: Path, form: str) -> None:
    value, bias = FORMS[form]
    torch.save(value, tmp_path / "head.pt")
    convert(tmp_path / "head.pt", tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    assert set(found) == ({"weight", "bias"} if bias else {"weight"})
    assert torch.equal(found["weight"], W) and (not bias or torch.equal(found["bias"], BIAS))
    with pytest.raises(RequestError, match="exists: give another name"):
        convert(tmp_path / "head.pt", tmp_path / "out.safetensors")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": torch.ones(2, 3)}, r"holds 0 square matrices, a head has one \(it holds a \[2, 3\]\)"),
        ({"a.weight": W, "b.weight": W}, "holds 2 square matrices.*: name it with --key"),
        ({"a.weight": W, "norm": BIAS}, "holds norm too, .*: pass --key a.weight if it is the whole head"),
        ("text", "holds 0 square matrices.*no tensors"),
    ],
)
def test_what_is_no_head_is_not_guessed(tmp_path: Path, value: Any, message: str) -> None:
    torch.save(value, tmp_path / "head.pt")
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "head.pt", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
    if isinstance(value, dict) and "a.weight" in value:
        convert(tmp_path / "head.pt", tmp_path / "out.safetensors", "a.weight")
        assert torch.equal(load_file(tmp_path / "out.safetensors")["weight"], W)


def test_the_command_runs_nothing_that_a_file_holds(tmp_path: Path) -> None:
    def run(name: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "nla_engine.models.convert_head", name, "out.safetensors"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    torch.save({"weight": W, "more": Harmful(tmp_path / "touched")}, tmp_path / "harmful.pt")
    done = run("harmful.pt")
    assert done.returncode == 2 and done.stderr.startswith("error: harmful.pt: holds more than tensors")
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "out.safetensors").exists()
    torch.save({"weight": W}, tmp_path / "head.pt")
    done = run("head.pt")
    assert done.returncode == 0 and "weight [6, 6]" in done.stdout and "no code in it was run" in done.stdout
    assert not (tmp_path / "touched").exists()
