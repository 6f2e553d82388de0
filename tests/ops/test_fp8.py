"""fp8 products: codes of the kernels against the reference, bit by bit; what quantising costs a block."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton.language as tl
from interpreted import DEVICE, run_in_the_interpreter, runs_kernels, starts_the_interpreter
from tiny import ARCHITECTURES, byte_tokenizer, tiny_model
from triton.runtime import interpreter

from nla_engine.engine import fused
from nla_engine.engine.runner import Runner
from nla_engine.errors import EngineError, RequestError
from nla_engine.models.load import wrap_model
from nla_engine.ops import fp8
from nla_engine.ops.backends import Kernels
from nla_engine.ops.fp8 import Quantised
from nla_engine.ops.gate import gate_reference
from nla_engine.ops.norm import rms_norm_reference

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def conversions_of_the_hardware(monkeypatch) -> None:
    """The interpreter cuts bfloat16 and e4m3 off, or loses carries and NaN; torch rounds as the GPU does."""
    own = interpreter._convert_float
    dtypes = {tl.float8e4nv: (torch.float8_e4m3fn, np.uint8), tl.bfloat16: (torch.bfloat16, np.uint16)}

    def convert(data, source, target, rounding):
        if source != tl.float32 or target not in dtypes:
            return own(data, source, target, rounding)
        narrow, container = dtypes[target]
        rounded = torch.from_numpy(data.view(np.float32)).to(narrow)
        return rounded.view(torch.int8 if container == np.uint8 else torch.int16).numpy().view(container)

    monkeypatch.setattr(interpreter, "_convert_float", convert)


def randn(rng: np.random.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).to(DEVICE, dtype)


def bits(x: Quantised) -> torch.Tensor:
    return x.codes.view(torch.uint8).int()


def values(x: Quantised) -> torch.Tensor:
    return x.codes.double() * x.scale.double()


def nearly(actual: Quantised, wanted: Quantised, dtype: torch.dtype) -> None:
    """The same but where exp or rsqrt rounded otherwise: a code's neighbour, seldom where the dtype is coarse."""
    assert ((actual.scale - wanted.scale).abs() <= 2**-7 * wanted.scale).all()
    apart = (bits(actual) - bits(wanted)).abs()
    assert apart.max() <= 1
    assert (apart > 0).float().mean() <= (0.05 if dtype == torch.bfloat16 else 1e-3)


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 77), (5, 4096), (2, 9000)])
def test_quantise_bit_by_bit(rng, dtype: torch.dtype, rows: int, width: int) -> None:
    x = (randn(rng, rows, width) * torch.logspace(-12, 12, rows, device=DEVICE)[:, None]).to(dtype)
    x[0] = 0
    x[-1, -1] = 3e38  # the row's other entries vanish beside it
    fast, slow = fp8.quantise_triton(x), fp8.quantise_reference(x)
    assert torch.equal(fast.scale, slow.scale)
    assert torch.equal(bits(fast) & 127, bits(slow) & 127)  # a zero may lose its sign
    zero = bits(slow) & 127 == 0
    assert torch.equal(bits(fast)[~zero], bits(slow)[~zero])
    assert (values(slow)[0] == 0).all() or rows == 1


@runs_kernels
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_is_not_finite_stays_so(rng) -> None:
    x = randn(rng, 4, 300)
    x[0, 5], x[1, 7], x[2, 299] = float("nan"), float("inf"), float("-inf")
    w = fp8.quantise_reference(randn(rng, 16, 300))
    for run in (fp8.quantise_triton, fp8.quantise_reference):
        quantised = run(x)
        assert torch.isinf(quantised.scale[:3]).all() and torch.isfinite(quantised.scale[3]).all()
        out = fp8.scaled_linear_reference(quantised, w, None, torch.float32)
        assert not torch.isfinite(out[:3]).any() and torch.isfinite(out[3]).all()


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "d"), [(1, 16), (13, 96), (2, 3584)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("added", [False, True])
def test_rms_norm_quantised(rng, dtype: torch.dtype, rows: int, d: int, offset: float, added: bool) -> None:
    x, weight = randn(rng, rows, d, dtype=dtype) * 30, randn(rng, d, dtype=dtype)
    add = randn(rng, rows, d, dtype=dtype) if added else None
    residuals = x.clone(), x.clone()
    fast = fp8.rms_norm_quantised_triton(residuals[0], weight, 1e-6, offset, add)
    slow = fp8.rms_norm_quantised_reference(residuals[1], weight, 1e-6, offset, add)
    nearly(fast, slow, dtype)
    assert torch.equal(*residuals)
    assert torch.equal(residuals[0], x if add is None else x + add)
    parts = fp8.quantise_reference(rms_norm_reference(residuals[1], weight, 1e-6, offset))
    assert torch.equal(bits(slow), bits(parts))


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (13, 77), (3, 4096), (2, 5000), (2, 18_944)])
def test_gate_quantised(rng, dtype: torch.dtype, activation: str, rows: int, width: int) -> None:
    both = randn(rng, rows, 2 * width, dtype=dtype) * 3
    if activation == "gelu":
        both.clamp_(min=-4)  # below, torch's 1 + tanh cancels
    fast, slow = fp8.gate_quantised_triton(both, activation), fp8.gate_quantised_reference(both, activation)
    nearly(fast, slow, dtype)
    parts = fp8.quantise_reference(gate_reference(both, activation))
    assert torch.equal(bits(slow), bits(parts))


@runs_kernels
@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_a_gate_that_is_not_finite_stays_so(rng, activation: str) -> None:
    """In the first piece of a row, in the last one, as gate and as what it multiplies."""
    width = 5000
    both = randn(rng, 5, 2 * width)
    both[0, 3], both[1, width - 1], both[2, width + 7] = float("nan"), float("inf"), float("nan")
    both[3, -1] = float("-inf")
    for run in (fp8.gate_quantised_triton, fp8.gate_quantised_reference):
        scale = run(both, activation).scale
        assert torch.isinf(scale[:4]).all() and torch.isfinite(scale[4]).all()


@runs_kernels
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_a_gate_far_from_zero(rng) -> None:
    """Where the exponential overflows, and where it vanishes: act(g) is 0, or g. Against float64."""
    g = torch.tensor([-1e37, -1e4, -100.0, -88.0, -20.0, 20.0, 88.0, 1e4], device=DEVICE).repeat(1, 2)
    both = torch.cat([g, torch.ones_like(g)], -1)
    got = values(fp8.gate_quantised_triton(both, "silu"))
    wide = g.double()
    assert torch.allclose(got, wide * torch.sigmoid(wide), rtol=2**-4, atol=1e4 * 2**-9 / 448)


def test_codes_are_the_nearest_e4m3_values(rng) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    every = every[every.isfinite()].unique()
    x = torch.from_numpy(rng.standard_normal((20, 500)))
    quantised = fp8.quantise_reference(x.float())
    scaled = x.float().double() / quantised.scale.double()
    nearest = (scaled[..., None] - every).abs().amin(-1)
    assert ((scaled - quantised.codes.double()).abs() <= nearest + 1e-4).all()
    assert (quantised.codes.double().abs().amax(1) == 448).all()


def test_a_product_errs_as_its_factors_do(rng) -> None:
    """e4m3 rounds by 2^-4 at most, 2.6% as root mean square; both factors together sqrt(2) times that."""
    x, w, bias = (torch.from_numpy(rng.standard_normal(s)).float() for s in ((64, 512), (96, 512), (96,)))
    got = fp8.scaled_linear_reference(
        fp8.quantise_reference(x), fp8.quantise_reference(w), bias, torch.float32
    )
    truth = x.double() @ w.double().T
    error = float((got.double() - bias - truth).norm() / truth.norm())
    assert 0.02 <= error <= 0.045


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_states_in_fp8_are_near_those_of_the_model(architecture: str, rng) -> None:
    lm = wrap_model(tiny_model(architecture).to(DEVICE), byte_tokenizer(), name=architecture)
    ids = rng.integers(1, 250, 12).tolist()
    states = {}
    for precision in ("full", "fp8"):
        with Runner(lm, slots=2, length=20, kernels=Kernels("fused", precision)) as runner:
            states[precision] = runner.prefill([(0, 0, ids)]).double()
    error = float((states["fp8"] - states["full"]).norm() / states["full"].norm())
    assert 1e-3 <= error <= 0.25  # 3.7% a product, eight sublayers deep
    with Runner(
        lm, slots=2, length=20, kernels=Kernels("fused")
    ) as runner:  # the model's own weights are as they were
        assert torch.equal(runner.prefill([(0, 0, ids)]).double(), states["full"])


def test_the_self_check_sees_misplaced_channels(monkeypatch) -> None:
    right = fused.scaled_linear
    monkeypatch.setattr(fused, "scaled_linear", lambda *args: right(*args).roll(1, -1))
    lm = wrap_model(tiny_model("qwen2"), byte_tokenizer(), name="small")
    with pytest.raises(EngineError, match="not supported in fp8"):
        Runner(lm, slots=1, length=8, kernels=Kernels(precision="fp8"))
    assert not any("forward" in vars(block) for block in lm.blocks)  # and the model is given back


def test_fp8_that_cannot_be_is_refused() -> None:
    with pytest.raises(RequestError, match="fp8 has no reference kernels"):
        Kernels("reference", "fp8")
    for unknown in ({"precision": "int3"}, {"name": "fast"}):
        with pytest.raises(RequestError, match="is unknown: use (full or fp8|auto or fused or reference)"):
            Kernels(**unknown)


@starts_the_interpreter
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__)
