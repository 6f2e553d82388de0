"""ops/encode: every implementation against the host codec, bit for bit, and the codec's definition against float64."""

import math

import numpy as np
import pytest
import torch
from encoded import POISON, SINK_NORM, awkward_rows, bits, check_stage, on_host, poisoned_stage

from nla_engine.codec.rows import Codec, EncodedRows, bf16_bits, bf16_values, decode_reference
from nla_engine.errors import RequestError
from nla_engine.ops.encode import RowStage, backend, decode_rows, encode_rows

WIDTHS = [1, 2, 7, 8, 48, 64, 96, 128, 256, 640, 3584, 5120]
INPUTS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["int8", "int4", "bf16"])
def codec_name(request) -> str:
    return request.param


def make_codec(name: str, d: int) -> Codec:
    if name == "int4" and d % 2:
        pytest.skip("int4 packs two channels per byte")
    return Codec.named(name, d)


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("dtype", INPUTS, ids=lambda dtype: str(dtype).split(".")[1])
def test_bits_are_those_of_the_host_codec(implementation, codec_name, d, dtype, rng):
    name, device = implementation
    codec = make_codec(codec_name, d)
    n = 37
    with np.errstate(over="ignore"):
        hidden = torch.from_numpy(awkward_rows(rng, n, d)).to(dtype).to(device)
    dest = rng.permutation(n + 6)[:n].astype(np.int64)
    dest[rng.permutation(n)[:9]] = -1
    stage = poisoned_stage(codec, n + 6, n, device)
    encode_rows(hidden, torch.from_numpy(dest).to(device), stage, SINK_NORM, with_backend=name)
    check_stage(stage, hidden, dest, name=name)


@pytest.mark.parametrize("d", [128, 640, 1152, 3584])
@pytest.mark.parametrize("dtype", INPUTS[1:], ids=lambda dtype: str(dtype).split(".")[1])
@pytest.mark.parametrize("n", [1, 2, 7, 600])
@pytest.mark.parametrize("codec_name", ["int8", "int4"])
def test_bits_where_float32_sums_are_exact(implementation, codec_name, d, dtype, n, rng):
    """Whole numbers: no order of summing rounds, so codes and scales are the host codec's to the bit."""
    name, device = implementation
    if device == "cuda" and n == 600:
        n = 3000  # more than have a CTA each
    codec = Codec.named(codec_name, d)
    rows = rng.integers(-200, 201, (n, d)) * 2.0 ** rng.integers(-3, 4, (n, 1))
    hidden = torch.from_numpy(rows.astype(np.float32)).to(dtype).to(device)
    dest = rng.permutation(n)
    stage = poisoned_stage(codec, n, n, device)
    encode_rows(hidden, torch.from_numpy(dest).to(device), stage, math.inf, with_backend=name)
    want = codec.encode(rows.astype(np.float32))
    agree = bits(stage.norm.cpu().numpy()[dest]) == bits(want.norm)
    assert agree.mean() > 0.9
    np.testing.assert_array_equal(stage.codes.cpu().numpy()[dest][agree], want.codes[agree])
    np.testing.assert_array_equal(bits(stage.scales.cpu().numpy()[dest])[agree], bits(want.scales)[agree])


@pytest.mark.parametrize("d", [2047, 2048])
def test_smallest_norms_with_smallest_scales(implementation, d, rng):
    """Here (1 / rms)(1 / scale) of narrow blocks would leave float32: 0 stays 0, and signs stay."""
    name, device = implementation
    codec, n = Codec.named("int8", d), 40
    rows = np.float32(1e-36) * rng.uniform(-1, 1, (n, d)).astype(np.float32) * (rng.random((n, d)) < 0.7)
    rows[:, 0] = 1.1e-30
    hidden = torch.from_numpy(rows).to(device)
    stage = poisoned_stage(codec, n, n, device)
    encode_rows(hidden, torch.arange(n, device=device), stage, math.inf, with_backend=name)
    check_stage(stage, hidden, np.arange(n), math.inf, name=name)
    if codec.block == 1:
        codes = stage.codes.cpu().numpy()
        assert ((np.sign(codes) == np.sign(rows)) | (codes == 0)).all()
        assert (codes[:, 1:] != 0).mean() > 0.1
        with np.errstate(over="ignore"):
            factor = np.float32(1) / (np.float32(1.1e-30) / np.float32(math.sqrt(d)))
            assert np.isinf(factor * np.float32(2**24))


@pytest.mark.parametrize("d", [96, 256, 3584])
@pytest.mark.parametrize(("offset", "gap"), [(0, 8), (8, 24), (1, 0), (3, 5)])
def test_strided_and_unaligned_rows(implementation, codec_name, d, offset, gap, rng):
    name, device = implementation
    codec = make_codec(codec_name, d)
    n = 19
    wide = torch.full((n, d + gap + offset), math.nan, dtype=torch.bfloat16)
    wide[:, offset : offset + d] = torch.from_numpy(awkward_rows(rng, n, d))
    wide = wide.to(device)
    hidden = wide[:, offset : offset + d]
    dest = np.arange(n)[::-1].astype(np.int64)
    stage = poisoned_stage(codec, n, n, device)
    encode_rows(hidden, torch.from_numpy(dest.copy()).to(device), stage, SINK_NORM, with_backend=name)
    check_stage(stage, hidden, dest, name=name)


def test_no_rows(implementation, codec_name):
    name, device = implementation
    codec = make_codec(codec_name, 128)
    empty = torch.empty((0, 128), device=device)
    stage = poisoned_stage(codec, 3, 2, device)
    encode_rows(empty, torch.empty(0, dtype=torch.int64, device=device), stage, SINK_NORM, with_backend=name)
    assert int(stage.exact_count) == 0
    assert on_host(stage).norm.isnan().all()


def test_all_rows_skipped(implementation, codec_name):
    name, device = implementation
    codec = make_codec(codec_name, 256)
    hidden = torch.full((11, 256), math.nan, device=device)
    stage = poisoned_stage(codec, 4, 2, device)
    encode_rows(hidden, torch.full((11,), -1, device=device), stage, SINK_NORM, with_backend=name)
    host = on_host(stage)
    assert int(host.exact_count) == 0
    assert host.norm.isnan().all()
    assert (host.codes == POISON[host.codes.dtype]).all()


@pytest.mark.parametrize("codec_name", ["int8", "int4"])
@pytest.mark.parametrize("d", [96, 256])
def test_a_full_exact_pool_counts_on_and_writes_no_further(implementation, codec_name, d, rng):
    name, device = implementation
    codec = make_codec(codec_name, d)
    stage = poisoned_stage(codec, 20, 5, device)
    hidden = torch.from_numpy(rng.normal(size=(20, d)).astype(np.float32)).to(device)
    dest = np.arange(20)
    for part in (slice(0, 3), slice(3, 20)):  # the second launch starts at a count of 3
        encode_rows(
            hidden[part].contiguous(), torch.from_numpy(dest[part]).to(device), stage, 1e-3, with_backend=name
        )
    check_stage(stage, hidden, dest, sink_norm=1e-3, name=name)
    assert int(stage.exact_count) == 20


@pytest.mark.parametrize("codec_name", ["int8", "int4"])
def test_no_exact_pool_and_no_sink_limit(implementation, codec_name, rng):
    name, device = implementation
    codec = make_codec(codec_name, 128)
    hidden = torch.from_numpy(awkward_rows(rng, 30, 128)).to(device)
    stage = poisoned_stage(codec, 30, 0, device)
    encode_rows(hidden, torch.arange(30, device=device), stage, math.inf, with_backend=name)
    check_stage(stage, hidden, np.arange(30), sink_norm=math.inf, name=name)


@pytest.mark.parametrize("d", WIDTHS)
def test_decoders_agree(implementation, codec_name, d, rng):
    name, device = implementation
    codec = make_codec(codec_name, d)
    encoded = codec.encode(awkward_rows(rng, 21, d))
    codes = encoded.codes.view(np.int16) if codec.name == "bf16" else encoded.codes
    tensors = [torch.from_numpy(a).to(device) for a in (codes, encoded.scales, encoded.norm)]
    want = codec.decode(encoded)
    got = decode_rows(*tensors, codec, with_backend=name).cpu().numpy()
    np.testing.assert_array_equal(got, want)
    half = decode_rows(*tensors, codec, torch.bfloat16, with_backend=name).cpu()
    np.testing.assert_array_equal(half.float().numpy(), bf16_values(bf16_bits(want)))


@pytest.mark.parametrize(("codec_name", "mean", "worst"), [("int8", 0.008, 0.02), ("int4", 0.11, 0.25)])
@pytest.mark.parametrize("d", [48, 96, 256, 3584])
def test_round_trip_error(implementation, codec_name, mean, worst, d, rng):
    """Relative L2 error through the float64 decoder, and the fast decoder within float32 of that."""
    name, device = implementation
    codec = make_codec(codec_name, d)
    n = 64
    rows = rng.normal(size=(n, d)).astype(np.float32)
    rows[:, rng.integers(d, size=2)] *= np.float32(20.0)
    stage = RowStage.allocate(codec, n, 1, device)
    encode_rows(
        torch.from_numpy(rows).to(device), torch.arange(n, device=device), stage, math.inf, with_backend=name
    )
    host = on_host(stage)
    encoded = EncodedRows(host.codes.numpy(), host.scales.numpy(), host.norm.numpy())
    exact = decode_reference(codec, encoded)
    size = np.linalg.norm(rows, axis=1)
    error = np.linalg.norm(exact - rows, axis=1) / size
    assert error.mean() < mean
    assert error.max() < worst
    got = decode_rows(stage.codes, stage.scales, stage.norm, codec, with_backend=name).cpu().numpy()
    assert (np.linalg.norm(got - exact, axis=1) / size).max() < 2e-6


def test_backends_are_chosen_by_name():
    assert backend("cpu") == "numba"
    assert backend("cpu", "torch") == "torch"
    with pytest.raises(RequestError, match="'fast' is unknown"):
        backend("cpu", "fast")
    with pytest.raises(RequestError, match="'cuda'"):
        backend("cpu", "cuda")
    with pytest.raises(RequestError, match="'numba' cannot work on device 'cuda'"):
        backend("cuda", "numba")


def test_arguments_that_do_not_fit():
    stage = RowStage.allocate(Codec.named("int8", 8), 4, 1, "cpu")
    dest = torch.arange(2)
    for hidden, places, words in [
        (torch.zeros(2, 9), dest, "hidden: shape"),
        (torch.zeros(2, 8, dtype=torch.float64), dest, "hidden: dtype"),
        (torch.zeros(8, 2).T, dest, "channels of a row"),
        (torch.zeros(2, 8), torch.arange(3), "dest: shape"),
        (torch.zeros(2, 8), dest.int(), "dest: is not contiguous int64"),
    ]:
        with pytest.raises(ValueError, match=words):
            encode_rows(hidden, places, stage, 1.0)
    with pytest.raises(ValueError, match="out_dtype"):
        decode_rows(stage.codes, stage.scales, stage.norm, stage.codec, torch.float16)
    with pytest.raises(ValueError, match="scales: shape"):
        decode_rows(stage.codes, stage.scales[:2], stage.norm, stage.codec)
