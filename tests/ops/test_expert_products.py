"""The products of experts: the kernel against its reference and against float64, in the interpreter on a CPU."""

from __future__ import annotations

import pytest
import torch
from interpreted import run_in_the_interpreter, runs_kernels, starts_the_interpreter
from kernel_checks import DTYPES, close, randn
from test_expert_order import drawn

from nla_engine.ops import expert_products as module
from nla_engine.ops.expert_order import order_by_expert_reference
from nla_engine.ops.expert_products import ExpertGate

GATES = {
    "none": None,
    "silu": ExpertGate("silu"),
    "gelu": ExpertGate("gelu"),
    "clamped": ExpertGate("clamped", 1.702, 2.0),
}


def truth_of(x, w, bias, order, gate) -> torch.Tensor:
    """In float64, one row after the other."""
    act, rows = torch.nn.functional, []
    ends = order.ends.tolist()
    for place, token in enumerate(order.token.tolist()):
        expert = next(e for e, end in enumerate(ends) if place < end)
        row = x[place if gate is None else token].double() @ w[expert].double()
        row = row if bias is None else row + bias[expert].double()
        if gate is not None and gate.kind == "clamped":
            g, u = row[::2].clamp(max=gate.limit), row[1::2].clamp(-gate.limit, gate.limit)
            row = g * (gate.alpha * g).sigmoid() * (u + 1)
        elif gate is not None:
            g, u = row.chunk(2)
            row = (act.silu(g) if gate.kind == "silu" else act.gelu(g, approximate="tanh")) * u
        rows.append(row)
    return torch.stack(rows)


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    ("tokens", "top", "experts", "kind", "k", "n", "height"),
    [
        (1, 1, 1, "any", 64, 16, 16),
        (5, 2, 4, "few", 96, 64, 16),
        (40, 4, 5, "all", 24, 200, 32),
        (70, 2, 3, "any", 128, 130, 64),
        (150, 1, 2, "any", 64, 24, 128),
    ],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_product(
    rng, dtype, gate: str, tokens: int, top: int, experts: int, kind: str, k: int, n: int, height: int,
    transposed: bool,
) -> None:  # fmt: skip
    order = order_by_expert_reference(drawn(rng, tokens, top, experts, kind), experts, height)
    how = GATES[gate]
    x = randn(rng, tokens if how else tokens * top, k, dtype=dtype)
    w = randn(rng, experts, k, n, dtype=dtype) / k**0.5
    w = w if transposed else w.transpose(1, 2).contiguous().transpose(1, 2)
    bias = randn(rng, experts, n, dtype=dtype) if transposed else None
    found = module.expert_product_triton(x, w, bias, order, how)
    reference = module.expert_product_reference(x, w, bias, order, how)
    assert found.shape == reference.shape == (tokens * top, n // (2 if how else 1))
    close(found, reference, truth_of(x, w, bias, order, how))


@runs_kernels
def test_what_is_not_contiguous_is_refused(rng) -> None:
    order = order_by_expert_reference(drawn(rng, 4, 1, 2, "any"), 2, 16)
    x, w = randn(rng, 4, 16), randn(rng, 2, 16, 8)
    for wrong in ((x.T.contiguous().T, w, None), (x, randn(rng, 2, 16, 16)[..., ::2], None)):
        with pytest.raises(ValueError, match="contiguous"):
            module.expert_product_triton(*wrong, order)


@starts_the_interpreter
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__)
