"""Rows that try an encoder, and what a stage must hold after them: for the tests of ops/encode."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from nla_engine.codec.rows import (
    INT4_DIVISORS,
    INT4_TOP,
    Codec,
    bf16_bits,
    exact_rows,
    hadamard_matrix,
    ordinary_rows,
)
from nla_engine.ops.encode import RowStage

#: name, device, and for kernels on a CPU the number of multiprocessors: up to 16 rows for each get their own CTA.
NUMBA = pytest.param(("numba", "cpu", 0), id="numba")
CUDA = [
    pytest.param(("cuda", "cpu", 1), id="cuda-on-cpu"),
    pytest.param(("cuda", "cpu", 99), id="cuda-on-cpu-few-rows"),
    pytest.param(("cuda", "cuda", 0), id="cuda", marks=pytest.mark.gpu),
]
TORCH = [
    pytest.param(("torch", "cpu", 0), id="torch"),
    pytest.param(("torch", "cuda", 0), id="torch-cuda", marks=pytest.mark.gpu),
]
IMPLEMENTATIONS = [NUMBA, *TORCH, *CUDA]

SINK_NORM = 2000.0
POISON = {torch.int8: -77, torch.uint8: 199, torch.int16: -12345, torch.int64: -999, torch.int32: 0}


def awkward_rows(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    """Ordinary rows with massive channels, and one of each kind that breaks a codec. float32 [n, d]"""
    rows = rng.normal(size=(n, d)).astype(np.float32) * np.exp(rng.normal(size=(n, 1))).astype(np.float32)
    rows[:, rng.integers(d, size=2)] *= np.float32(60.0)
    special = iter(rng.permutation(n)[:14])
    rows[next(special)] = 0.0
    rows[next(special)] *= 3e4 / math.sqrt(d)
    rows[next(special), rng.integers(d)] = np.nan
    rows[next(special), rng.integers(d)] = np.inf
    rows[next(special), rng.integers(d)] = -np.inf
    rows[next(special)] *= np.float32(1e-30)
    rows[next(special)] *= np.float32(1e-38)  # subnormal
    rows[next(special)] *= np.float32(1e-6)
    rows[next(special)] *= np.float32(1e33)
    rows[next(special)] = 3.4e38  # the norm overflows
    row = next(special)
    rows[row] = 0.0
    rows[row, rng.integers(d)] = 5.0  # one channel
    rows[next(special)] = 0.25  # all alike
    row = next(special)  # one block huge, the rest so small that scales are subnormal halves, or 0
    rows[row, : d // 2] *= np.float32(1e-6)
    row = next(special)
    rows[row] = rng.integers(-3, 4, d) * np.float32(0.5)  # ties
    return rows


def poisoned_stage(codec: Codec, places: int, capacity: int, device: str) -> RowStage:
    stage = RowStage.allocate(codec, places, capacity, device)
    for tensor in stage.tensors:
        tensor.fill_(math.nan if tensor.is_floating_point() else POISON[tensor.dtype])
    return stage


def on_host(stage: RowStage) -> RowStage:
    return dataclasses.replace(
        stage,
        **{f.name: getattr(stage, f.name).cpu() for f in dataclasses.fields(stage) if f.name != "codec"},
    )


def bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


def one_nan(exact: np.ndarray) -> np.ndarray:
    """bfloat16 bits with every NaN the same: the payload of a float16 NaN depends on the processor."""
    return np.where((exact & 0x7FFF) > 0x7F80, 0x7FC0, exact)


def same_norm(got: np.ndarray, want: np.ndarray) -> None:
    """At most one unit in the last place apart: the order of a float64 sum may differ."""
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    finite = ~np.isnan(want)
    apart = np.abs(bits(got)[finite].astype(np.int64) - bits(want)[finite].astype(np.int64))
    assert apart.max(initial=0) <= 1


def sums_on_tensor_cores(name: str, codec: Codec, hidden: torch.Tensor) -> bool:
    """Whether the rotation may round in another order (see nla_engine/codec/rows.py)."""
    return name == "cuda" and codec.name != "bf16" and codec.block == 128 and hidden.dtype != torch.float32


def raw_codes(codec: Codec, codes: np.ndarray) -> np.ndarray:
    """Codes as they are stored, int8 or int4, as whole numbers [n, d]."""
    if codec.name == "int8":
        return codes.astype(int)
    return np.stack((codes & 15, codes >> 4), axis=2).reshape(len(codes), -1).astype(int) - 8


def check_definition(codec: Codec, rows: np.ndarray, norm: np.ndarray, codes: np.ndarray, scales: np.ndarray):
    """scale is the float16 nearest to a clip's range / top, code the integer nearest to y / scale, y from float64.

    And no other clip of int4 is better by more than the rounding of fine codes, of distances and of two scales: 0.014
    of a scale for each channel.
    """
    top, clips = (127, [1.0]) if codec.name == "int8" else (INT4_TOP, [29 / m for m in INT4_DIVISORS])
    ordinary = ordinary_rows(norm)
    code = raw_codes(codec, codes)
    assert not code[~ordinary].any()
    assert not scales[~ordinary].any()
    rows, scales = rows[ordinary].astype(np.float64), scales[ordinary].reshape(-1, 1)
    rms = norm[ordinary].astype(np.float64) / math.sqrt(codec.d_model)
    blocks = rows.reshape(len(rows), -1, codec.block)
    y = (blocks @ hadamard_matrix(codec.block) / rms[:, None, None]).reshape(-1, codec.group)
    wide = scales.astype(np.float64)
    exact = np.abs(y).max(axis=1, keepdims=True) * np.array(clips) / top
    room = np.spacing(scales).astype(np.float64) / 2
    near = np.abs(wide - exact) <= room * 1.001 + exact * 1e-6
    assert near.any(axis=1).all()
    code = code[ordinary].reshape(y.shape)
    apart = np.abs(code * wide - y)
    cut = (np.abs(code) == top) & (np.abs(y) > top * wide)
    assert (cut | (apart <= (0.5 + 2**-11) * wide) | (wide == 0)).all()
    assert not code[wide[:, 0] == 0].any()
    if codec.name == "int8":
        return
    subnormal = exact[:, 0] < 2.0**-14
    assert near[subnormal, 0].all()
    y, chosen, scales = y[~subnormal], apart[~subnormal], exact[~subnormal]
    for scale in scales.T[:, :, None]:
        other = y - np.clip(np.rint(y / scale), -top, top) * scale
        gain = np.linalg.norm(chosen, axis=1) - np.linalg.norm(other, axis=1)
        assert (gain <= 2 * 0.014 * math.sqrt(codec.group) * scales[:, 0]).all()


def check_stage(
    stage: RowStage, hidden: torch.Tensor, dest: np.ndarray, sink_norm: float = SINK_NORM, *, name: str
) -> None:
    """Check `stage`, poisoned before, after the implementation `name` has encoded `hidden` into the rows `dest`."""
    codec, stage = stage.codec, on_host(stage)
    chosen = dest >= 0
    rows = hidden.cpu().float().numpy()[chosen]
    want, places = codec.encode(rows), dest[chosen]

    same_norm(stage.norm.numpy()[places], want.norm)
    agree = bits(stage.norm.numpy()[places]) == bits(
        want.norm
    )  # other norms give other scales: compare where equal
    agree |= np.isnan(want.norm)
    assert agree.mean() > 0.9
    codes = stage.codes.numpy().view(codec.code_dtype)
    got_codes, want_codes = codes[places], want.codes
    if codec.name == "bf16":
        got_codes, want_codes = one_nan(got_codes), one_nan(want_codes)
    got_scales = stage.scales.numpy()[places]
    if sums_on_tensor_cores(name, codec, hidden):
        check_definition(codec, rows, stage.norm.numpy()[places], got_codes, got_scales)
        assert (got_codes == want_codes)[agree].mean() > 0.99
    else:
        np.testing.assert_array_equal(got_codes[agree], want_codes[agree])
        np.testing.assert_array_equal(bits(got_scales)[agree], bits(want.scales)[agree])

    untouched = np.setdiff1d(np.arange(len(codes)), places)
    assert (stage.codes[untouched] == POISON[stage.codes.dtype]).all()
    assert stage.scales[untouched].isnan().all()
    assert stage.norm[untouched].isnan().all()

    mask = exact_rows(want.norm, sink_norm) if codec.name != "bf16" else np.zeros(len(rows), bool)
    count = int(stage.exact_count)
    assert count == mask.sum()
    kept = min(count, len(stage.exact))
    pool = dict(
        zip(stage.exact_dest[:kept].tolist(), stage.exact[:kept].numpy().view(np.uint16), strict=True)
    )
    assert len(pool) == kept
    wanted = dict(zip(places[mask].tolist(), bf16_bits(rows[mask]), strict=True))
    assert set(pool) <= set(wanted)
    for place, row in pool.items():
        np.testing.assert_array_equal(one_nan(row), one_nan(wanted[place]))
    assert (stage.exact[kept:] == POISON[torch.int16]).all()
    assert (stage.exact_dest[kept:] == POISON[torch.int64]).all()
