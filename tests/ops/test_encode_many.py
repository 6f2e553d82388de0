"""The encoder on more rows than a GPU holds at once, so that every warp takes several."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from encoded import (
    CUDA,
    NUMBA,
    POISON,
    SINK_NORM,
    awkward_rows,
    check_stage,
    poisoned_stage,
    raw_codes,
    same_norm,
)

from nla_engine import extension
from nla_engine.codec.rows import Codec
from nla_engine.ops.encode import encode_rows

#: Of an H200, and what one has in hand at most: warps, bytes of their rows.
_MULTIPROCESSORS, _WARPS, _SHARED_BYTES = 132, 24, 228 << 10


@pytest.mark.gpu
@pytest.mark.skipif(not extension.architectures(), reason="the extension has no CUDA part")
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
    # Sums on tensor cores: in few rows a code beside a tie is one off, or a clip of the same cost is another.
    assert same.float().mean() > 0.9
    scaled_alike = (
        (stage.scales[agree] == want.scales[agree]).repeat_interleave(codec.group, dim=1).cpu().numpy()
    )
    apart = [raw_codes(codec, codes[agree].cpu().numpy()) for codes in (stage.codes, want.codes)]
    assert np.abs(apart[0] - apart[1])[scaled_alike].max() <= 1
    assert int(stage.exact_count) == int(want.exact_count) == 1
    assert torch.equal(stage.exact[0], want.exact[0])
    graph.replay()
    assert int(stage.exact_count) == 2


@pytest.mark.parametrize("implementation", [NUMBA, CUDA[0], CUDA[-1]], indirect=True)
@pytest.mark.parametrize("codec_name", ["int8", "int4", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d", [128, 256, 384, 640, 3584, 3840, 4096, 5376, 7168, 12288, 24576, 24704])
def test_a_warp_takes_row_after_row(implementation, codec_name, dtype, d, rng):
    """Rows that are skipped, kept exactly or broken stand between others, in every turn of a warp."""
    name, device = implementation
    codec = Codec.named(codec_name, d)
    n = 3 * _MULTIPROCESSORS * min(_WARPS, _SHARED_BYTES // (2 * d)) if device == "cuda" else 60
    kinds = awkward_rows(rng, 60, d)
    with np.errstate(over="ignore"):
        rows = torch.from_numpy(kinds).to(dtype)[torch.from_numpy(rng.integers(0, 60, n))]
    wide = torch.full((n, d + 8), math.nan, dtype=dtype, device=device)
    hidden = wide[:, :d]  # not contiguous
    hidden.copy_(rows * torch.from_numpy(rng.choice([0.5, 1.0, 2.0], (n, 1))).to(dtype))
    dest = rng.permutation(n).astype(np.int64)
    dest[rng.random(n) < 0.3] = -1
    stage = poisoned_stage(codec, n, n if d % 512 else 3, device)  # the pool of some is too small
    encode_rows(hidden, torch.from_numpy(dest).to(device), stage, SINK_NORM, with_backend=name)
    check_stage(stage, hidden, dest, name=name)
