"""Choosing experts: the kernel against its reference and against sorting, in the interpreter on a CPU."""

from __future__ import annotations

import pytest
import torch
from interpreted import DEVICE, run_in_the_interpreter, runs_kernels, starts_the_interpreter
from kernel_checks import DTYPES, randn

from nla_engine.ops import routing as module
from nla_engine.ops.routing import Routing


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("renormed", [False, True])
@pytest.mark.parametrize(
    ("tokens", "experts", "top"), [(1, 1, 1), (3, 5, 2), (37, 32, 4), (70, 128, 8), (9, 60, 60), (8, 64, 6)]
)
def test_route(
    rng, dtype, renormed: bool, tokens: int, experts: int, top: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = (randn(rng, tokens, experts) * 3).argsort(1).argsort(1).float() / 8  # none are equal
    logits = (logits * 2**-2 + randn(rng, tokens, 1)).to(dtype)
    how = Routing(top, renormed, 2.5, None if renormed else torch.float32)
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *n, **how: empty(self, *n, **how).fill_(77))
    weights, chosen = module.route_triton(logits, how)
    monkeypatch.undo()
    assert weights.dtype == (dtype if renormed else torch.float32) and chosen.dtype == torch.int64
    wide = logits.double()
    assert torch.equal(wide.gather(1, chosen), wide.sort(1, descending=True).values[:, :top])
    assert all(len(set(row)) == top for row in chosen.tolist())
    share = wide.softmax(1).gather(1, chosen)
    truth = 2.5 * (share / share.sum(1, keepdim=True) if renormed else share)
    limit = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[weights.dtype]
    torch.testing.assert_close(weights.double(), truth, rtol=limit, atol=limit)
    own, first = module.route_reference(logits, how)
    torch.testing.assert_close(own.double(), truth.sort(1, descending=True).values, rtol=limit, atol=limit)
    assert own.dtype == weights.dtype and first.shape == chosen.shape


@runs_kernels
def test_equal_logits_and_those_that_are_no_numbers_choose_experts_that_there_are() -> None:
    """Of equal ones the first; where nothing is a number too: no row leads outside of a tensor."""
    logits = torch.tensor(
        [[1.0, 2.0, 2.0, 2.0, 0.0], [float("nan")] * 5, [0.0, float("nan"), -1.0, 0.5, 0.25]]
    )
    weights, chosen = module.route_triton(logits.to(DEVICE), Routing(3, renormed=True))
    assert chosen[0].tolist() == [1, 2, 3] and chosen[2].tolist() == [3, 4, 0]
    torch.testing.assert_close(weights[0].cpu(), torch.full((3,), 1 / 3))
    assert chosen[1].tolist() == [0, 1, 2]


def test_logits_apart_are_refused() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        module.route_triton(torch.zeros(4, 3).T, Routing(2, renormed=True))


@starts_the_interpreter
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__)
