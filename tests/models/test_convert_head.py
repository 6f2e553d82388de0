"""Pickled heads, maps and whitenings: converted by a command of its own that runs nothing they hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from maps import zca
from safetensors.torch import load_file

from nla_engine.errors import CheckpointError, RequestError
from nla_engine.models.convert_head import convert
from nla_engine.models.value_head import read_value_head
from nla_engine.models.vector_map import VectorMap, Whitening


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


ENC = torch.randn(6, 4)


@pytest.mark.parametrize("name", ["av_map.safetensors", "ar_map.safetensors"])
@pytest.mark.parametrize(
    ("value", "key"),
    [
        (ENC, None),
        ({"weight": ENC, "bias": BIAS, "prefix": W[:2]}, None),
        ({"enc.weight": ENC, "enc.bias": BIAS, "dec.weight": ENC.T}, "enc.weight"),
    ],
)
def test_a_map_is_the_same_as_safetensors(tmp_path: Path, name: str, value: Any, key: str | None) -> None:
    torch.save(value, tmp_path / "map.pt")
    convert(tmp_path / "map.pt", tmp_path / name, key)
    found = VectorMap.read(tmp_path / name)
    assert torch.equal(found.weight, ENC)
    assert found.bias is None or torch.equal(found.bias, BIAS)
    assert (found.bias is None) == isinstance(value, torch.Tensor)
    assert (found.prefix is not None) == (isinstance(value, dict) and "prefix" in value)


def test_a_whitening_is_the_same_as_safetensors(tmp_path: Path, rng: np.random.Generator) -> None:
    """As its trainers save it, an archive of numpy with eigenvalues and notes, and as a pickle."""
    rows = rng.standard_normal((50, 6)) @ rng.standard_normal((6, 6)) + 3
    mean, matrix, inverse = zca(rows)
    measured = rng.uniform(0.1, 2, 6)
    divided = np.maximum(measured, 0.5)
    notes = {
        "n_samples": np.int64(50),
        "layer_index": np.int64(-1),
        "source": np.str_("x"),
        "sha256": np.str_("y"),
    }
    np.savez(
        tmp_path / "stats.npz", mean=mean, w=matrix, w_inv=inverse, eigenvalues=divided, eigenvalues_raw=measured,
        shrinkage=np.float64(0), floor_quantile=np.float64(0.05), **notes,
    )  # fmt: skip
    (tmp_path / "a").mkdir()
    convert(tmp_path / "stats.npz", tmp_path / "a" / "whitening.safetensors")
    found = Whitening.read(tmp_path / "a" / "whitening.safetensors", back=True)
    assert found.inverse is not None and found.content is not None
    for got, wanted in ((found.mean, mean), (found.matrix, matrix), (found.inverse, inverse)):
        np.testing.assert_allclose(got, wanted, rtol=1e-6)
    assert found.norm == pytest.approx((measured / divided).sum() ** 0.5)
    torch.save(
        {"stats": {"mu": torch.from_numpy(mean), "W": torch.from_numpy(matrix), "norm": 2.5}},
        tmp_path / "s.pt",
    )
    convert(tmp_path / "s.pt", tmp_path / "whitening.safetensors")
    again = Whitening.read(tmp_path / "whitening.safetensors", back=True)
    assert again.norm == 2.5 and again.content == found.content and torch.equal(again.matrix, found.matrix)


def test_heads_of_layers_are_the_same_as_safetensors(tmp_path: Path) -> None:
    torch.save({"3": W, "11": 2 * W}, tmp_path / "heads.pt")
    convert(tmp_path / "heads.pt", tmp_path / "value_heads.safetensors")
    for layer, wanted in ((3, W), (11, 2 * W)):
        weight, bias = read_value_head(tmp_path, 6, layer)
        assert torch.equal(weight, wanted) and bias is None


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "av_map.safetensors",
            {"a": ENC, "b": ENC},
            r"holds 2 matrices, a map has one \(it holds a \[6, 4\]",
        ),
        (
            "ar_map.safetensors",
            {"a.weight": ENC, "scale": BIAS},
            "holds scale too, .* part of a larger map: pass --key",
        ),
        (
            "whitening.safetensors",
            {"mean": BIAS},
            r"has no matrix \(it holds mean \[6\]\): it is no whitening",
        ),
        (
            "whitening.safetensors",
            {"mean": BIAS, "w": W, "std": BIAS},
            r"holds std \[6\], which may change the",
        ),
        ("whitening.safetensors", {"mean": BIAS, "w": W, "matrix": W}, "holds matrix twice"),
        ("value_heads.safetensors", {"3": W, "norm": BIAS}, "holds norm, which is the head of no layer"),
        ("value_heads.safetensors", {}, "holds no heads"),
    ],
)
def test_what_is_of_another_kind_is_not_converted(
    tmp_path: Path, name: str, value: Any, message: str
) -> None:
    torch.save(value, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "x.pt", tmp_path / name)
    assert not (tmp_path / name).exists()


def test_a_key_is_for_one_matrix(tmp_path: Path) -> None:
    torch.save({"mean": BIAS, "matrix": W}, tmp_path / "x.pt")
    with pytest.raises(RequestError, match="--key is for one matrix: leave it out for whitening.safetensors"):
        convert(tmp_path / "x.pt", tmp_path / "whitening.safetensors", "matrix")


def test_an_archive_that_holds_a_pickle_runs_nothing(tmp_path: Path) -> None:
    value = np.array([Harmful(tmp_path / "touched")], dtype=object)
    np.savez(tmp_path / "x.npz", mean=value, matrix=np.eye(2))
    with pytest.raises(CheckpointError, match="x.npz: holds more than tensors"):
        convert(tmp_path / "x.npz", tmp_path / "whitening.safetensors")
    assert not (tmp_path / "touched").exists()
