"""Maps and whitenings: their arithmetic against numpy in float64, and files that are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from maps import zca
from safetensors.torch import save_file

from nla_engine.errors import CheckpointError
from nla_engine.models.vector_map import VectorMap, Whitening

D_IN, D = 24, 16


def numbers(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(shape))


def saved(path: Path, **tensors: torch.Tensor) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("count", [1, 3])
def test_a_map_is_weight_times_vector_plus_bias(
    tmp_path: Path, rng: np.random.Generator, dtype: torch.dtype, count: int, device: str
) -> None:
    weight, bias = numbers(rng, count * D, D_IN).to(dtype), numbers(rng, count * D).to(dtype)
    vectors = numbers(rng, 7, D_IN).float()
    for more in ({}, {"bias": bias}):
        found = VectorMap.read(saved(tmp_path / "map.safetensors", weight=weight, **more))
        wanted = vectors.double() @ weight.double().T + (bias.double() if more else 0)
        assert (found.width, found.count(D)) == (D_IN, count)
        found, on_device = found.to(torch.device(device)), vectors.to(device)
        got = found.apply(on_device, D)
        assert got.shape == (7, count, D) and got.dtype == torch.float32
        torch.testing.assert_close(got.double().cpu(), wanted.reshape(7, count, D), rtol=1e-5, atol=1e-5)
        assert torch.equal(got[:, -1], found.apply(on_device, count * D)[:, 0, -D:])


def test_constant_rows_are_read_beside_a_map(tmp_path: Path, rng: np.random.Generator) -> None:
    prefix = numbers(rng, 4, D).float()
    found = VectorMap.read(saved(tmp_path / "m.safetensors", weight=numbers(rng, D, D_IN), prefix=prefix))
    assert found.prefix is not None and torch.equal(found.prefix, prefix) and found.count(D) == 1
    with pytest.raises(
        CheckpointError, match=r"prefix has shape \[4, 16\], which makes no vectors of width 8"
    ):
        found.count(D // 2)
    with pytest.raises(
        CheckpointError, match=r"weight has shape \[16, 24\], which makes no vectors of width 15"
    ):
        found.count(15)


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_whitening_and_its_way_back(
    tmp_path: Path, rng: np.random.Generator, given: bool, dtype: torch.dtype
) -> None:
    rows = rng.standard_normal((400, D)) @ rng.standard_normal((D, D)) + 5 * rng.standard_normal(D)
    mean, matrix, inverse = zca(rows)
    tensors = {"mean": mean, "matrix": matrix} | (
        {"inverse": inverse, "norm": np.array(7.5)} if given else {}
    )
    saved(tmp_path / "w", **{name: torch.from_numpy(array).to(dtype) for name, array in tensors.items()})
    found = Whitening.read(tmp_path / "w", back=True)
    assert found.symmetric and (found.content is None) == (dtype == torch.float32)
    white = (rows - mean) @ matrix
    np.testing.assert_allclose(np.cov(white.T), np.eye(D), atol=1e-8)  # so this is one
    np.testing.assert_allclose(found.white(torch.from_numpy(rows).float()), white, rtol=1e-3, atol=1e-3)
    norm = 7.5 if given else D**0.5
    wanted = white * (norm / np.linalg.norm(white, axis=1, keepdims=True)) @ np.linalg.inv(matrix) + mean
    for length in (1.0, 1e-3, 250.0):  # of an AR's output only the direction is trained
        got = found.captured(torch.from_numpy(white * length).float())
        np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-3)
    assert found.captured(torch.zeros(1, D)).isnan().all()
    assert Whitening.read(tmp_path / "w", back=False).inverse is None or given


@pytest.mark.parametrize("device", DEVICES)
def test_float32_is_enough_for_vectors_with_attention_sinks(
    tmp_path: Path, rng: np.random.Generator, device: str
) -> None:
    """As measured on a real model: a few vectors a hundred times as long as the others, a condition of 2000."""
    rows = (
        rng.standard_normal((4000, 64))
        * np.geomspace(3, 60, 64)
        @ np.linalg.qr(rng.standard_normal((64, 64)))[0]
    )
    rows[::500] += 25_000 * np.linalg.qr(rng.standard_normal((64, 1)))[0][:, 0]
    mean, matrix, inverse = zca(rows)
    assert np.linalg.cond(matrix) > 300
    saved(tmp_path / "w", mean=torch.from_numpy(mean).float(), matrix=torch.from_numpy(matrix).float())
    found, white = Whitening.read(tmp_path / "w", back=True), (rows - mean) @ matrix
    length = np.linalg.norm(white, axis=1, keepdims=True)
    found = found.to(torch.device(device))
    pairs = [
        (found.white(torch.from_numpy(rows).float().to(device)), white),
        (found.captured(torch.from_numpy(white).float().to(device)), white / length * 8 @ inverse + mean),
    ]
    for got, wanted in pairs:
        apart = np.linalg.norm(got.cpu().numpy() - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
        assert apart.max() < 1e-3 and np.median(apart) < 1e-5


def test_a_matrix_that_is_not_symmetric_multiplies_from_the_right(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    mean, matrix, vectors = (numbers(rng, *shape).float() for shape in ((D,), (D, D), (3, D)))
    found = Whitening.read(saved(tmp_path / "w", mean=mean, matrix=matrix), back=False)
    wanted = (vectors.numpy().astype(np.float64) - mean.numpy()) @ matrix.numpy()
    np.testing.assert_allclose(found.white(vectors), wanted, rtol=1e-4, atol=1e-4)
    assert not found.symmetric


def almost_singular(condition: float) -> torch.Tensor:
    basis = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64))[0]
    return basis * torch.logspace(0, -np.log10(condition), D, dtype=torch.float64) @ basis.T


MAP = {"weight": torch.randn(D, D_IN), "bias": torch.randn(D)}
EYE = {"mean": torch.zeros(D), "matrix": torch.eye(D)}
FAULTS: dict[str, tuple[Any, dict[str, torch.Tensor], str]] = {
    "unknown key": (
        VectorMap,
        MAP | {"scale": torch.ones(1)},
        "holds scale, which is not known and may change",
    ),
    "no weight": (VectorMap, {"bias": torch.ones(D)}, "holds bias, and no weight"),
    "bias of another": (
        VectorMap,
        MAP | {"bias": torch.ones(D + 1)},
        r"bias has shape \[17\], weight \[16, 24\]",
    ),
    "weight a vector": (
        VectorMap,
        {"weight": torch.ones(D)},
        r"weight has shape \[16\], it must be of 2 dimensions",
    ),
    "bias a matrix": (VectorMap, MAP | {"bias": torch.ones(D, 1)}, "it must be of 1 dimension:"),
    "empty prefix": (VectorMap, MAP | {"prefix": torch.ones(0, D)}, r"prefix has shape \[0, 16\]"),
    "NaN": (VectorMap, MAP | {"bias": torch.full((D,), torch.nan)}, "bias holds NaN or Inf"),
    "too large": (
        VectorMap,
        {"weight": torch.full((D, D), 1e300, dtype=torch.float64)},
        "weight holds NaN or Inf",
    ),
    "integers": (
        VectorMap,
        {"weight": torch.ones(D, D, dtype=torch.int8)},
        "weight holds torch.int8, not floating",
    ),
    "no mean": (Whitening, {"matrix": torch.eye(D)}, "holds matrix, and no mean"),
    "two widths": (
        Whitening,
        EYE | {"mean": torch.zeros(D - 1)},
        r"matrix has shape \[16, 16\], mean \[15\]",
    ),
    "oblong": (Whitening, EYE | {"matrix": torch.ones(D, D_IN)}, r"matrix has shape \[16, 24\], mean \[16\]"),
    "oblong inverse": (
        Whitening,
        EYE | {"inverse": torch.ones(D_IN, D)},
        r"inverse has shape \[24, 16\], mean",
    ),
    "norm a vector": (
        Whitening,
        EYE | {"norm": torch.ones(2)},
        r"norm has shape \[2\], it must be of one number",
    ),
    "norm 0": (Whitening, EYE | {"norm": torch.zeros(1)}, "norm is 0.0: it must be above 0"),
    "key of a map": (Whitening, EYE | {"bias": torch.zeros(D)}, "holds bias, which is not known"),
    "singular": (Whitening, EYE | {"matrix": torch.ones(D, D)}, "matrix is (singular|badly conditioned)"),
    "badly conditioned": (
        Whitening,
        EYE | {"matrix": almost_singular(1e7).float()},
        r"badly conditioned \(.*e\+0[678] in the 1-norm, 8.4e\+05 at most in its float32\): put the inverse",
    ),
    "rounded": (Whitening, EYE | {"matrix": almost_singular(100).bfloat16()}, "13 at most in its bfloat16"),
    "inverse of another": (Whitening, EYE | {"inverse": 2 * torch.eye(D)}, "inverse is not that of matrix"),
    "inverse the wrong way": (
        Whitening,
        EYE | {"matrix": (m := torch.eye(D) + torch.rand(D, D).triu(1)), "inverse": m.inverse().T},
        "inverse is not that of matrix",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_no_map_is_refused(tmp_path: Path, fault: str) -> None:
    kind, tensors, message = FAULTS[fault]
    read: Callable[[Path], Any] = (
        kind.read if kind is VectorMap else lambda path: Whitening.read(path, back=True)
    )
    with pytest.raises(CheckpointError, match=message) as error:
        read(saved(tmp_path / "x.safetensors", **tensors))
    assert str(error.value).startswith(f"{tmp_path / 'x.safetensors'}: ") and "\n" not in str(error.value)


def test_what_a_way_back_needs_is_asked_of_it_alone(tmp_path: Path) -> None:
    """A given inverse is taken for what computing one would refuse, and without a way back there is no need of one."""
    matrix = almost_singular(1e4)
    path = saved(tmp_path / "w", mean=torch.zeros(D), matrix=matrix.bfloat16())
    assert Whitening.read(path, back=False).inverse is None
    matrix = almost_singular(1e7)
    saved(path, mean=torch.zeros(D), matrix=matrix, inverse=matrix.inverse())
    assert Whitening.read(path, back=True).inverse is not None
    inverse = almost_singular(30.0)
    saved(path, mean=torch.zeros(D), matrix=inverse.inverse().bfloat16(), inverse=inverse.bfloat16())
    assert Whitening.read(path, back=True).inverse is not None


def test_a_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\x08\x00")
    with pytest.raises(CheckpointError, match="x: cannot be read as safetensors"):
        VectorMap.read(tmp_path / "x")
