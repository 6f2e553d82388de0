"""The order of chosen experts and the weighted sum of their rows: kernels against references and against counting, in
the interpreter on a CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from interpreted import DEVICE, run_in_the_interpreter, runs_kernels, starts_the_interpreter
from kernel_checks import DTYPES, close, randn

from nla_engine.ops import expert_order as module


def drawn(rng: np.random.Generator, tokens: int, top: int, experts: int, kind: str) -> torch.Tensor:
    """Chosen experts [T, k]: any; the first ones only, so that the others have no tokens; or one expert in all rows."""
    among = {"any": experts, "few": top, "all": experts}[kind]
    chosen = np.stack([rng.permutation(among)[:top] for _ in range(tokens)])
    if kind == "all":
        chosen[:, 0] = experts - 1
    return torch.from_numpy(chosen).to(DEVICE)


ORDERS = [
    (1, 1, 1, "any"),
    (1, 4, 32, "any"),
    (37, 2, 5, "few"),
    (300, 1, 7, "any"),
    (300, 8, 128, "any"),
    (64, 8, 8, "any"),
    (130, 4, 32, "all"),
    (600, 2, 3, "any"),
]


def check(order: module.ExpertOrder, chosen: torch.Tensor, experts: int, height: int) -> None:
    """By what it must be, without sorting."""
    flat, place, ends = chosen.flatten().tolist(), order.place.flatten().tolist(), [0, *order.ends.tolist()]
    assert sorted(place) == list(range(len(flat)))
    top = chosen.shape[1]
    for expert in range(experts):
        mine = [i for i, each in enumerate(flat) if each == expert]
        begin, end = ends[expert], ends[expert + 1]
        assert [place[i] for i in mine] == list(range(begin, end))
        assert order.token[begin:end].tolist() == [i // top for i in mine]
        rows = order.tile_row[order.tile_expert == expert].tolist()
        assert rows == list(range(begin, end, height))
    assert order.height == height


@pytest.mark.parametrize("height", [16, 64])
@pytest.mark.parametrize(("tokens", "top", "experts", "kind"), ORDERS)
def test_the_reference(rng, tokens: int, top: int, experts: int, kind: str, height: int) -> None:
    chosen = drawn(rng, tokens, top, experts, kind)
    check(module.order_by_expert_reference(chosen, experts, height), chosen, experts, height)


@runs_kernels
@pytest.mark.parametrize("height", [16, 64])
@pytest.mark.parametrize(("tokens", "top", "experts", "kind"), ORDERS)
def test_the_kernel(monkeypatch, rng, tokens: int, top: int, experts: int, kind: str, height: int) -> None:
    chosen = drawn(rng, tokens, top, experts, kind)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **how: empty(*size, **how).fill_(-77))
    found = module.order_by_expert_triton(chosen, experts, height)
    reference = module.order_by_expert_reference(chosen, experts, height)
    for name in ("token", "place", "ends", "tile_expert", "tile_row"):
        assert torch.equal(getattr(found, name), getattr(reference, name)), name
        assert getattr(found, name).dtype == getattr(reference, name).dtype == torch.int32


@pytest.mark.parametrize(
    "wrong",
    [torch.zeros(4, dtype=torch.int64), torch.zeros(4, 2, dtype=torch.int32), torch.zeros(2, 4).long().T],
)
def test_other_experts_are_refused(wrong: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="contiguous int64"):
        module.order_by_expert_triton(wrong, 4, 16)


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(("tokens", "top", "d"), [(1, 1, 1), (3, 8, 77), (37, 4, 2880), (5, 6, 1024)])
def test_weighted_sum(rng, dtype, wide: bool, tokens: int, top: int, d: int) -> None:
    rows = randn(rng, tokens * top, d, dtype=dtype)
    weights = randn(rng, tokens, top, dtype=torch.float32 if wide else dtype)
    place = torch.from_numpy(rng.permutation(tokens * top).astype(np.int32)).view(tokens, top).to(DEVICE)
    truth = torch.einsum("tkd,tk->td", rows[place.long()].double(), weights.double())
    close(
        module.weighted_sum_triton(rows, place, weights),
        module.weighted_sum_reference(rows, place, weights),
        truth,
    )


@starts_the_interpreter
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__)
