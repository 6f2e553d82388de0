"""Norms, gates, rotations and places: Triton kernels against their references, in the interpreter on a CPU (float32,
float16), on a GPU in bfloat16 too."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from interpreted import DEVICE, run_in_the_interpreter, runs_kernels, starts_the_interpreter
from kernel_checks import DTYPES, close, randn

from nla_engine.ops import gate, norm, places, rotary


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "d"), [(1, 1), (3, 7), (5, 96), (2, 3584)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("add", [False, True])
def test_rms_norm(rng, dtype, rows: int, d: int, offset: float, add: bool) -> None:
    x = (randn(rng, rows, 2 * d) * 30).to(dtype)[:, ::1][:, :d]  # rows further apart than they are long
    weight, residual = randn(rng, d, dtype=dtype), randn(rng, rows, d, dtype=dtype) if add else None
    wide = x.double()
    truth = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (weight.double() + offset)
    truth = truth if residual is None else truth + residual.double()
    reference = norm.rms_norm_reference(x, weight, 1e-6, offset, residual)
    close(norm.rms_norm_triton(x, weight, 1e-6, offset, residual), reference, truth)


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "d"), [(1, 1), (3, 7), (5, 96), (4, 128)])
def test_gated_rms_norm(rng, dtype, rows: int, d: int) -> None:
    x = (randn(rng, rows, 2 * d) * 30).to(dtype)[:, :d]
    weight, gate_ = randn(rng, d, dtype=dtype), (randn(rng, rows, 3 * d) * 4).to(dtype)[:, d : 2 * d]
    wide, open_ = x.double(), gate_.double()
    truth = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    truth = truth * open_ * open_.sigmoid()
    reference = norm.gated_rms_norm_reference(x, gate_, weight, 1e-6)
    close(norm.gated_rms_norm_triton(x, gate_, weight, 1e-6), reference, truth)


@runs_kernels
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # where the gate is 0
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 77), (2, 5000)])
def test_gate(rng, dtype, activation: str, rows: int, width: int) -> None:
    both = randn(rng, rows, 2 * width, dtype=dtype) * 3
    g, u = both.double().chunk(2, -1)
    act = g * g.sigmoid() if activation == "silu" else torch.nn.functional.gelu(g, approximate="tanh")
    close(gate.gate_triton(both, activation), gate.gate_reference(both, activation), act * u)


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "groups", "size"), [(4, 2, 32), (7, 1, 64), (28, 4, 128), (6, 2, 24)])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("halved", [False, True])
def test_rotate_and_store(rng, dtype, heads: int, groups: int, size: int, normed: bool, halved: bool) -> None:
    tokens, slots, block = 6, 4, 3
    row = randn(rng, tokens, (heads + 2 * groups) * size, dtype=dtype)
    angle = randn(rng, tokens, size // 2).repeat(1, 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    whole = cos, sin
    if halved:  # as gpt-oss gives them: one half, whose tokens may be neighbours in memory
        cos, sin = (each[:, : size // 2].T.contiguous().T for each in whole)
    slot = torch.tensor([0, 0, 2, 3, 1, 2], device=DEVICE)
    place = torch.tensor([0, 1, 8, 4, 0, 3], device=DEVICE)
    table = torch.from_numpy(rng.permutation(3 * slots).astype(np.int32).reshape(slots, 3)).to(DEVICE)
    head_norm = None
    if normed:
        head_norm = rotary.HeadNorm(randn(rng, size, dtype=dtype), randn(rng, size, dtype=dtype), 1e-6, 1.0)
    outcomes = []
    for run, angles in (
        (rotary.rotate_and_store_triton, (cos, sin)),
        (rotary.rotate_and_store_reference, (cos, sin)),
        (rotary.rotate_and_store_reference, whole),
    ):
        caches = [
            torch.full((3 * slots, block, groups, size), float("nan"), dtype=dtype, device=DEVICE)
            for _ in range(2)
        ]
        q = run(row, *angles, *caches, table, slot, place, head_norm)
        caches = [cache[table.long()].flatten(1, 2) for cache in caches]
        written = caches[0].isfinite().all(-1).all(-1)
        assert (
            written.nonzero().tolist() == sorted(zip(slot.tolist(), place.tolist(), strict=True))
            or written.sum() == 6
        )
        assert (caches[0].isfinite() == caches[1].isfinite()).all() and int(written.sum()) == tokens
        outcomes.append((q, caches[0][slot, place], caches[1][slot, place]))
    limit = 1e-5 if dtype == torch.float32 else 2e-2 if dtype == torch.bfloat16 else 3e-3
    for actual, reference, other in zip(*outcomes, strict=True):
        assert torch.equal(reference, other)
        assert (actual.float() - reference.float()).norm() <= limit * reference.float().norm()


def test_rotation_is_that_of_transformers(rng) -> None:
    from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

    q, k = torch.randn(1, 4, 5, 16), torch.randn(1, 2, 5, 16)
    angle = torch.randn(1, 5, 8).repeat(1, 1, 2)
    want_q, want_k = apply_rotary_pos_emb(q, k, angle.cos(), angle.sin())
    row = torch.cat([q[0].transpose(0, 1), k[0].transpose(0, 1), k[0].transpose(0, 1)], 1).reshape(5, -1)
    keys, values = torch.zeros(1, 5, 2, 16), torch.zeros(1, 5, 2, 16)
    got = rotary.rotate_and_store_reference(
        row,
        angle.cos()[0],
        angle.sin()[0],
        keys,
        values,
        torch.zeros(1, 1, dtype=torch.int32),
        torch.zeros(5, dtype=torch.int64),
        torch.arange(5),
        None,
    )
    assert torch.allclose(got, want_q[0].transpose(0, 1), atol=1e-6)
    assert torch.allclose(keys[0], want_k[0].transpose(0, 1), atol=1e-6)
    assert torch.equal(values[0], k[0].transpose(0, 1))


@runs_kernels
@pytest.mark.parametrize("tokens", [1, 255, 256, 700])
def test_row_places(rng, tokens: int) -> None:
    """Positions before, inside and behind what a slot keeps, slots that keep nothing among them."""
    slots, room = 9, 40
    first = rng.integers(0, 60, slots)
    end = first + rng.integers(0, 2 * room, slots)  # some rows take the places of earlier ones
    slot, position = rng.integers(0, slots, tokens), rng.integers(0, 110, tokens)
    columns = [torch.from_numpy(column).to(DEVICE) for column in (slot, position, first, end)]
    want = [
        s * room + (p - first[s]) % room if first[s] <= p < end[s] else -1
        for s, p in zip(slot, position, strict=True)
    ]
    assert places.row_places_triton(*columns, room).tolist() == want
    assert places.row_places_reference(*columns, room).tolist() == want
    with pytest.raises(ValueError, match="contiguous int64"):
        places.row_places_triton(columns[0], columns[1].int(), *columns[2:], room)


@starts_the_interpreter
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__)
