"""The gated delta rule: its kernels against its references, these against transformers and against one another."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from interpreted import DEVICE, run_in_the_interpreter, runs_kernels, starts_the_interpreter

from nla_engine.ops import delta
from nla_engine.ops.delta import DeltaShape

DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
SHAPES = [
    DeltaShape(2, 4, 16, 16, 4),
    DeltaShape(1, 3, 24, 40, 3),
    DeltaShape(2, 2, 8, 64, 2, 2.0),
    DeltaShape(4, 12, 128, 128, 4),
]
LIMIT = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def randn(rng: np.random.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).to(DEVICE, dtype)


def same(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.isfinite().all()
    assert (found.double() - wanted.double()).norm() <= LIMIT[dtype] * wanted.double().norm() + 1e-6


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels", "taps"), [(5, 4), (512, 4), (700, 3), (1100, 2)])
def test_a_step_of_the_convolution(rng, dtype, channels: int, taps: int) -> None:
    """Before the first token there is nothing, whatever an earlier sequence left."""
    slot = torch.tensor([3, 0, 5, 1], device=DEVICE)
    position = torch.tensor([0, 1, 2, 77], device=DEVICE)
    row, weight = randn(rng, 4, channels, dtype=dtype), randn(rng, channels, taps, dtype=dtype)
    kept = randn(rng, 6, taps - 1, channels, dtype=dtype)
    for at, place in zip(slot.tolist(), position.tolist(), strict=True):
        for back in range(place + 1, taps):
            kept[at, (place - back) % (taps - 1)] = float("nan")
    outcomes = []
    for run in (delta.convolve_step_triton, delta.convolve_step_reference):
        own = kept.clone()
        outcomes.append((run(row, weight, own, slot, position), own))
    same(outcomes[0][0], outcomes[1][0], dtype)
    assert torch.equal(outcomes[0][1].nan_to_num(9.0), outcomes[1][1].nan_to_num(9.0))


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_step_of_the_rule(rng, dtype, shape: DeltaShape) -> None:
    slot = torch.tensor([4, 0, 2], device=DEVICE)
    x, heads = randn(rng, 3, shape.channels, dtype=dtype), shape.value_heads
    both = randn(rng, 3, 2 * heads, dtype=dtype) * 4
    a, b = both.split(heads, 1)
    a_log, dt_bias = randn(rng, heads, dtype=dtype), randn(rng, heads, dtype=dtype)
    states = randn(rng, 5, *shape.state)
    outcomes = []
    for run in (delta.delta_step_triton, delta.delta_step_reference):
        own = states.clone()
        outcomes.append((run(x, a, b, a_log, dt_bias, own, slot, shape), own))
    same(outcomes[0][0], outcomes[1][0], dtype)
    same(outcomes[0][1], outcomes[1][1], torch.float32)
    others = [at for at in range(5) if at not in slot.tolist()]
    assert torch.equal(outcomes[0][1][others], states[others])


@pytest.mark.parametrize("length", [1, 3, 16, 17, 64, 65, 150])
def test_chunks_equal_the_recurrence(rng, length: int) -> None:
    """In float64, with tokens behind the end of a shorter sequence, which change nothing."""
    q, k = (torch.from_numpy(rng.standard_normal((2, length, 3, 8))) for _ in range(2))
    k = k / k.norm(dim=-1, keepdim=True)
    v = torch.from_numpy(rng.standard_normal((2, length, 3, 5)))
    g = -torch.from_numpy(rng.exponential(0.5, (2, length, 3)))
    beta = 2 * torch.from_numpy(rng.random((2, length, 3)))
    state = torch.from_numpy(rng.standard_normal((2, 3, 8, 5)))
    out, new = delta.delta_chunked(q, k, v, g, beta, state)
    wanted, after = delta.delta_reference(q, k, v, g, beta, state)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(new, after)
    padded = [torch.nn.functional.pad(t, (0, 0) * (t.ndim - 2) + (0, 9)) for t in (q, k, v, g, beta)]
    torch.testing.assert_close(delta.delta_chunked(*padded, state)[1], after)


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_the_rule_is_that_of_transformers(rng, shape: DeltaShape) -> None:
    """Convolution, norms, decay and state, over a sequence that is read in three parts and then token by token."""
    from transformers.models.qwen3_5 import modeling_qwen3_5 as own

    length, heads = 23, shape.value_heads
    row, weight = torch.randn(length, shape.channels), torch.randn(shape.channels, shape.taps)
    a, b, a_log, dt_bias = (
        torch.randn(length, heads),
        torch.randn(length, heads),
        torch.randn(heads),
        torch.randn(heads),
    )
    x = own.causal_conv1d_fn(row.T[None], weight, None, activation="silu")[0].T
    keys = shape.key_heads * shape.key_size
    q, k, v = x[None].split([keys, keys, heads * shape.value_size], -1)
    each = heads // shape.key_heads
    q, k = (part.unflatten(-1, (-1, shape.key_size)).repeat_interleave(each, 2) for part in (q, k))
    v = v.unflatten(-1, (-1, shape.value_size))
    g = -a_log.exp() * torch.nn.functional.softplus(a + dt_bias)
    wanted, state = own.torch_recurrent_gated_delta_rule(
        q,
        k,
        v,
        g=g[None],
        beta=shape.most * b.sigmoid()[None],
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    kept, states = torch.full((2, shape.taps - 1, shape.channels), 7.0), torch.zeros(2, *shape.state)
    out, slot = [], torch.tensor([1])
    for start, end in ((0, 2), (2, 3), (3, 17)):
        mixed = delta.convolve_run(row[start:end], weight, kept, 1, start)
        given = (*shape.split(mixed), *delta.gates(a[start:end], b[start:end], a_log, dt_bias, shape.most))
        part, states[slot] = delta.delta_chunked(*(each[None] for each in given), states[slot])
        out.append(part[0])
    for at in range(17, length):
        one = slice(at, at + 1)
        mixed = delta.convolve_step(row[one], weight, kept, slot, torch.tensor([at]))
        out.append(delta.delta_step(mixed, a[one], b[one], a_log, dt_bias, states, slot, shape))
    torch.testing.assert_close(torch.cat(out), wanted[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(states[1], state[0], rtol=1e-4, atol=1e-4)


@starts_the_interpreter
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__)
