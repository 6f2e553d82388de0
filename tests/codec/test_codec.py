"""The host decoder: the bits of the stated order of float32 operations, whatever the codes; to float32 and bfloat16."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nla_engine.codec.rows import Codec, EncodedRows, bf16_bits, bf16_values, hadamard_matrix
from nla_engine.ops.encode import decode_rows_reference

WIDTHS = [1, 2, 7, 8, 48, 64, 96, 128, 640]


def in_stated_order(codec: Codec, encoded: EncodedRows) -> np.ndarray:
    """Every product and butterfly a float32 operation of its own, by torch."""
    stored = encoded.codes.view(np.int16) if codec.name == "bf16" else encoded.codes
    scales, norm = torch.from_numpy(encoded.scales), torch.from_numpy(encoded.norm)
    return decode_rows_reference(torch.from_numpy(stored), scales, norm, codec, torch.float32).numpy()


def same_bits(got: np.ndarray, want: np.ndarray) -> None:
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got.view(f"u{got.dtype.itemsize}"), want.view(f"u{want.dtype.itemsize}"))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    name=st.sampled_from(["int8", "int4", "bf16"]),
    width=st.sampled_from(WIDTHS),
    kind=st.sampled_from(["any", "largest", "aligned"]),
)
def test_any_codes_decode_to_the_bits_of_the_stated_order(seed, name, width, kind) -> None:
    if name == "int4" and width % 2:
        width += 1
    rng, codec, n = np.random.default_rng(seed), Codec.named(name, width), 12
    information = np.iinfo(codec.code_dtype)
    codes = rng.integers(information.min, information.max + 1, (n, codec.code_width)).astype(codec.code_dtype)
    if name == "int8" and kind == "largest":  # sums of 64 products that fill a float32's 24 bits
        codes = np.where(rng.random(codes.shape) < 0.5, 127, -128).astype(np.int8)
    if name == "int8" and kind == "aligned":  # all 128 add up in one channel: the one step that rounds
        signs = np.sign(hadamard_matrix(codec.block))[rng.integers(0, codec.block, n)]
        codes = np.tile(signs * 127, width // codec.block).astype(np.int8)
    if name == "bf16":
        codes[(codes & 0x7F80) == 0x7F80] = 0x3F80  # NaN apart: see below
    scales = rng.integers(1, 0x7C00, (n, codec.scale_width)).astype(np.uint16).view(np.float16)
    norm = np.exp(rng.uniform(-60, 60, n)).astype(np.float32)
    norm[:4] = [0.0, np.nan, np.inf, 1e-35]
    encoded = EncodedRows(codes, scales, norm)
    want = in_stated_order(codec, encoded)
    same_bits(codec.decode(encoded), want)
    poisoned = np.full((n, width), np.nan, np.float32)
    assert codec.decode(encoded, poisoned) is poisoned
    same_bits(poisoned, want)
    same_bits(
        codec.decode(encoded, np.full((n, width), 0x7FFF, np.uint16)),
        torch.from_numpy(want).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16),
    )


def test_bfloat16_bits_of_every_exponent() -> None:
    x = np.arange(0, 2**32, 65_521, dtype=np.uint32).view(np.float32)
    got = bf16_bits(x)
    finite = ~np.isnan(x)
    want = torch.from_numpy(x).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(got[finite], want[finite])
    assert np.isnan(bf16_values(got[~finite])).all()
    values = np.arange(2**16, dtype=np.uint16)
    same_bits(bf16_values(values), (values.astype(np.uint32) << 16).view(np.float32))
    assert bf16_bits(np.float32([[1.0]])).shape == (1, 1)


@pytest.mark.parametrize(
    "out",
    [
        np.empty((3, 8), np.float64),
        np.empty((2, 8), np.float32),
        np.empty((3, 9), np.float32),
        np.empty((3, 16), np.float32)[:, ::2],
    ],
)
def test_a_place_that_does_not_fit_is_refused(out: np.ndarray) -> None:
    codec = Codec.named("int8", 8)
    with pytest.raises(ValueError, match="not contiguous float32 or uint16"):
        codec.decode(codec.encode(np.ones((3, 8), np.float32)), out)
