"""ops/encode: every implementation against the host codec, bit for bit, and the codec's definition against float64."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from nla_engine import extension
from nla_engine.codec import (
    Codec,
    EncodedRows,
    bf16_bits,
    bf16_values,
    decode_reference,
    exact_rows,
    hadamard_matrix,
    ordinary_rows,
)
from nla_engine.errors import RequestError
from nla_engine.ops.encode import RowStage, backend, decode_rows, encode_rows

SINK_NORM = 2000.0
WIDTHS = [1, 2, 7, 8, 48, 64, 96, 128, 256, 640, 3584]
INPUTS = [torch.float32, torch.bfloat16, torch.float16]
POISON = {torch.int8: -77, torch.uint8: 199, torch.int16: -12345, torch.int64: -999, torch.int32: 0}

gpu = pytest.mark.gpu
IMPLEMENTATIONS = [
    pytest.param(("numba", "cpu"), id="numba"),
    pytest.param(("torch", "cpu"), id="torch"),
    pytest.param(("torch", "cuda"), id="torch-cuda", marks=gpu),
    pytest.param(("cuda", "cuda"), id="cuda", marks=gpu),
]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request) -> tuple[str, str]:
    name, device = request.param
    if name == "cuda" and not extension.has_cuda():
        pytest.skip(extension.why_missing())
    return name, device


@pytest.fixture(params=["int8", "int4", "bf16"])
def codec_name(request) -> str:
    return request.param


def make_codec(name: str, d: int) -> Codec:
    if name == "int4" and d % 2:
        pytest.skip("int4 packs two channels a byte")
    return Codec.named(name, d)


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
    """bfloat16 bits with every NaN the same: the payload of a float16 NaN is the processor's own affair."""
    return np.where((exact & 0x7FFF) > 0x7F80, 0x7FC0, exact)


def same_norm(got: np.ndarray, want: np.ndarray) -> None:
    """At most one unit in the last place apart: the order of a float64 sum is free."""
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    finite = ~np.isnan(want)
    apart = np.abs(bits(got)[finite].astype(np.int64) - bits(want)[finite].astype(np.int64))
    assert apart.max(initial=0) <= 1


def sums_on_tensor_cores(name: str, codec: Codec, hidden: torch.Tensor) -> bool:
    """Whether the rotation may round in an order of its own (see nla_engine/codec.py)."""
    return name == "cuda" and codec.name == "int8" and codec.block == 128 and hidden.dtype != torch.float32


def check_definition(codec: Codec, rows: np.ndarray, norm: np.ndarray, codes: np.ndarray, scales: np.ndarray):
    """int8: scale is the float16 nearest to largest / 127, code the integer nearest to y / scale, y from float64."""
    ordinary = ordinary_rows(norm)
    assert not codes[~ordinary].any()
    assert not scales[~ordinary].any()
    rows, scales = rows[ordinary].astype(np.float64), scales[ordinary]
    rms = norm[ordinary].astype(np.float64) / math.sqrt(codec.d_model)
    blocks = rows.reshape(len(rows), codec.scale_width, codec.block)
    y = blocks @ hadamard_matrix(codec.block) / rms[:, None, None]
    exact = np.abs(y).max(axis=2) / 127
    wide = scales.astype(np.float64)
    room = np.spacing(scales).astype(np.float64) / 2
    assert (np.abs(wide - exact) <= room * 1.001 + exact * 1e-6).all()
    code = codes[ordinary].reshape(y.shape).astype(np.float64)
    apart = np.abs(code * wide[:, :, None] - y)
    cut = (np.abs(code) == 127) & (np.abs(y) > 127 * wide[:, :, None])
    assert (cut | (apart <= (0.5 + 2**-11) * wide[:, :, None]) | (wide == 0)[:, :, None]).all()
    assert not code[wide == 0].any()


def check_stage(
    stage: RowStage, hidden: torch.Tensor, dest: np.ndarray, sink_norm: float = SINK_NORM, *, name: str
) -> None:
    """What `stage`, poisoned before, must hold after `hidden` went to `dest` by the implementation `name`."""
    codec, stage = stage.codec, on_host(stage)
    chosen = dest >= 0
    rows = hidden.cpu().float().numpy()[chosen]
    want, places = codec.encode(rows), dest[chosen]

    same_norm(stage.norm.numpy()[places], want.norm)
    agree = bits(stage.norm.numpy()[places]) == bits(
        want.norm
    )  # another norm is another scale: compare where equal
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
def test_int8_bits_where_float32_sums_are_exact(implementation, d, dtype, n, rng):
    """Whole numbers: no order of summing rounds, so codes and scales are the host codec's to the bit."""
    name, device = implementation
    codec = Codec.named("int8", d)
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


@gpu
@pytest.mark.skipif(not extension.has_cuda(), reason="the extension has no CUDA part")
@pytest.mark.parametrize("codec_name", ["int8", "int4"])
def test_inside_a_cuda_graph_and_on_many_rows(codec_name, rng):
    """More rows than the device holds CTAs; replays see new rows, new places and a count that goes on."""
    n, d = 20_000, 3584
    codec = Codec.named(codec_name, d)
    hidden = torch.randn(n, d, device="cuda", dtype=torch.bfloat16)
    dest = torch.arange(n, device="cuda")
    stage = poisoned_stage(codec, n, 64, "cuda")
    encode_rows(hidden, dest, stage, SINK_NORM, with_backend="cuda")  # warm up
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        encode_rows(hidden, dest, stage, SINK_NORM, with_backend="cuda")
    hidden.copy_(torch.randn(n, d, device="cuda") * 3)
    hidden[17] *= 1000
    dest.copy_(torch.randperm(n, device="cuda"))
    dest[5:9] = -1
    for tensor in stage.tensors:
        tensor.fill_(math.nan if tensor.is_floating_point() else POISON[tensor.dtype])
    graph.replay()
    want = poisoned_stage(codec, n, 64, "cuda")
    encode_rows(hidden, dest, want, SINK_NORM, with_backend="torch")
    same_norm(stage.norm[dest[9:]].cpu().numpy(), want.norm[dest[9:]].cpu().numpy())
    agree = (stage.norm == want.norm) | want.norm.isnan()
    assert agree.float().mean() > 0.999
    same = (stage.codes[agree] == want.codes[agree]).all(1)
    # int8 sums on tensor cores: a code beside a tie may be one off, in few rows.
    assert same.all() if codec_name == "int4" else same.float().mean() > 0.9
    assert (stage.codes[agree].int() - want.codes[agree].int()).abs().max() <= (codec_name == "int8")
    assert int(stage.exact_count) == int(want.exact_count) == 1
    assert torch.equal(stage.exact[0], want.exact[0])
    graph.replay()
    assert int(stage.exact_count) == 2
