"""Top-k, top-p and min-p against transformers' own warpers and exact sums; Triton against torch in the interpreter."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from interpreted import DEVICE, run_in_the_interpreter, runs_kernels, starts_the_interpreter
from tiny import tiny_model
from transformers import GenerationConfig
from transformers.generation import LogitsProcessorList

from nla_engine.ops import sampling, truncation
from nla_engine.ops.sampling import Choosing, Sampling, SlotState
from nla_engine.ops.truncation import Truncation

#: Interpreted kernels compute in numpy, which warns of infinities and NaN; here they are meant.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(invalid value|overflow|divide by zero).* encountered:RuntimeWarning"
)
#: top_p, top_k, min_p
CUTS = [
    (0.9, None, None),
    (0.5, None, None),
    (1e-9, None, None),
    (1 - 1e-7, None, None),
    (None, 1, None),
    (None, 7, None),
    (None, 10**6, None),
    (None, None, 0.05),
    (None, None, 1.0),
    (0.8, 20, None),
    (0.97, 5, 0.02),
    (0.6, 300, 0.1),
    (1.0, None, 1e-7),
]
NAN, INF = float("nan"), float("inf")


def rows_of(rng: np.random.Generator, kind: str, vocabulary: int, count: int = 12) -> torch.Tensor:
    """float32 [count, vocabulary]."""
    x = rng.normal(0, 4, (count, vocabulary)).astype(np.float32)
    if kind == "peaked":
        x[:, rng.integers(vocabulary)] += 12
    if kind == "ties":
        x = np.round(x * 2) / 2
    if kind == "bfloat16":
        x = torch.from_numpy(x).bfloat16().float().numpy()
    if kind == "masked":
        x[rng.random(x.shape) < 0.6] = -INF
        x[:, rng.integers(vocabulary)] = 1.5
    if kind == "small":
        x *= 1e-5
        x[:, ::3] *= 0
        x[:, ::5] *= -1
    return torch.from_numpy(x)


def warped(logits: torch.Tensor, temperature: float, cut: Truncation) -> torch.Tensor:
    """bool [n, V]: what transformers' own processors leave, in its own order, with a stable sort."""
    config = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=cut.top_k or 0,
        top_p=1.0 if cut.top_p is None else cut.top_p,
        min_p=cut.min_p,
    )
    processors = tiny_model("qwen2")._get_logits_processor(
        config, input_ids_seq_length=1, device="cpu", logits_processor=LogitsProcessorList()
    )
    sort = torch.sort
    ids = torch.zeros(len(logits), 1, dtype=torch.int64)
    with mock.patch.object(torch, "sort", lambda x, descending: sort(x, descending=descending, stable=True)):
        marked = processors(ids, logits.clone())
    # What was -inf before cannot be seen there, and draws nothing.
    return marked > -INF


def truth(logits: np.ndarray, temperature: float, cut: Truncation) -> tuple[np.ndarray, np.ndarray]:
    """For one row: which tokens stay in float64, and for which rounding in float32 may decide."""
    s = (logits / np.float32(temperature)).astype(np.float32)
    weight = np.exp(s.astype(np.float64) - s.max())
    stays, unclear = np.ones(len(s), bool), np.zeros(len(s), bool)
    if cut.top_k is not None:
        stays &= s >= np.sort(s)[-min(cut.top_k, len(s))]
    order = np.lexsort((np.arange(len(s)), s))
    if cut.top_p is not None and cut.top_p < 1:
        sums = np.cumsum((weight * stays)[order])
        sums /= sums[-1]
        goes = sums <= 1 - cut.top_p
        unclear[order] |= np.abs(sums - (1 - cut.top_p)) <= 2e-6
        goes[-1] = unclear[order[-1]] = False
        stays[order[goes]] = False
    if cut.min_p is not None:
        stays &= weight >= cut.min_p
        unclear |= np.abs(weight - cut.min_p) <= 4e-6 * cut.min_p
        unclear[order[-1]] = False
    return stays, unclear


@pytest.mark.parametrize("kind", ["normal", "peaked", "ties", "bfloat16", "masked", "small"])
def test_what_stays_is_what_transformers_keeps(rng, kind: str) -> None:
    clear = 0
    for vocabulary in (1, 2, 7, 259, 3001):
        logits = rows_of(rng, kind, vocabulary)
        for cut in (Truncation(*each) for each in CUTS):
            temperature = float(rng.choice([0.3, 0.7, 1.0, 1.9]))
            stays = truncation.kept(logits, temperature, cut)
            theirs = warped(logits, temperature, cut)
            for own, their, row in zip(stays.numpy(), theirs.numpy(), logits.numpy(), strict=True):
                exact, unclear = truth(row, temperature, cut)
                possible = row > -INF
                assert not ((own != their) & possible & ~unclear).any(), (vocabulary, cut, temperature)
                assert not ((own != exact) & ~unclear).any(), (vocabulary, cut, temperature)
                assert own[row == row.max()].any()
                clear += not unclear.any()
    assert clear >= 0.7 * 5 * len(CUTS) * 12


def test_a_vocabulary_of_today(rng) -> None:
    """152,064 tokens, and sums of them in float32: the tokens whose place is unclear are few, all others are right."""
    logits = torch.from_numpy(rng.normal(0, 2.5, (1, 152_064)).astype(np.float32)).bfloat16()
    for cut in (Truncation(0.95), Truncation(0.8, 20), Truncation(0.999, None, 0.001)):
        own = truncation.kept(logits, 0.7, cut)[0].numpy()
        exact, unclear = truth(logits[0].float().numpy(), 0.7, cut)
        assert not ((own != exact) & ~unclear).any()
        assert unclear.mean() < 1e-3 and 0 < own.sum() < len(own)
        assert (own == warped(logits.float(), 0.7, cut)[0].numpy())[~unclear].all()


def test_equal_tokens_at_the_edge() -> None:
    """Top-k keeps them all, top-p removes the lower numbers first, min-p keeps all or none."""

    def stays(row: list[float], *cut: float | None) -> list[int]:
        return truncation.kept(torch.tensor([row]), 1.0, Truncation(*cut))[0].nonzero()[:, 0].tolist()

    equal = [3.0] * 8
    assert stays(equal, None, 2, None) == list(range(8))
    assert stays(equal, 0.5) == [4, 5, 6, 7] and stays(equal, 0.51) == [3, 4, 5, 6, 7]
    assert stays(equal, 1e-12) == [7] and stays(equal, 1 - 1e-12) == list(range(8))
    assert stays([0.0, 9.0, -0.0, 9.0, 1.0], 0.4) == [3] and stays([0.0, 9.0, -0.0, 9.0, 1.0], 0.6) == [1, 3]
    assert stays([1.0, 2.0, 2.0, 2.0, 0.0], None, 2, None) == [1, 2, 3]
    assert stays([1.0, 2.0, 2.0, 2.0, 0.0], 0.5, 2, None) == [2, 3]
    assert stays([0.0, -0.0, -1.0], None, 1, None) == [0, 1]
    assert stays([0.0, 0.0, -1.0], None, None, 1.0) == [0, 1]


def test_rows_without_a_distribution_are_left_alone_and_infinity_is_the_largest() -> None:
    cut = Truncation(0.5, 2, 0.5)
    rows = [[NAN, 1.0, 2.0, 3.0], [-INF] * 4, [INF, 1.0, 2.0, 3.0], [3e38, -3e38, 2.9e38, 1.0]]
    for temperature in (5e-324, 1e-30, 0.1, 1.0, 1e39):
        stays = truncation.kept(torch.tensor(rows), temperature, cut).tolist()
        assert stays[0] == stays[1] == [True] * 4
        assert stays[2] == [True, False, False, False]
        if temperature < 1e30:
            assert stays[3] == [True, False, False, False]


@pytest.mark.parametrize("cut", [(0.7, None, None), (None, 4, None), (None, None, 0.2), (0.9, 5, 0.05)])
def test_frequencies_are_those_of_the_softmax_of_what_stays(rng, cut: tuple) -> None:
    how = Truncation(*cut)
    logits = torch.tensor([1.0, 0.9, 0.5, -1.0, 0.5, -INF, 2.0])
    number = torch.arange(20_000)
    for temperature in (0.3, 1.0, 4.0):
        drawn = sampling.choose(logits.expand(len(number), -1), number, number, Sampling(temperature, 5, how))
        stays = warped(logits[None], temperature, how)[0]
        wanted = torch.softmax((logits.double() / temperature).masked_fill(~stays, -INF), -1)
        seen = drawn.bincount(minlength=7) / len(number)
        assert ((seen - wanted).abs() <= 5 * (wanted * (1 - wanted) / len(number)).sqrt()).all(), temperature


def test_what_changes_nothing_is_not_used() -> None:
    for unused in (Truncation(), Truncation(1.0, 50, 0.0), Truncation(None, 51, None)):
        assert not unused.cuts(50)
    for used in (Truncation(0.99), Truncation(None, 49), Truncation(None, None, 1e-9)):
        assert used.cuts(50)


# ---- kernels ----


@triton.jit
def _kth_kernel(rows, out, vocabulary, step, BLOCK: tl.constexpr):
    row, k = tl.program_id(0), tl.program_id(1) * 6
    at = rows + row * vocabulary
    top = truncation._largest(at, vocabulary, BLOCK)
    found = truncation._kth_largest(at, vocabulary, k + 1, top, step, BLOCK)
    tl.store(out + row * tl.num_programs(1) + tl.program_id(1), truncation._value(found))


@triton.jit
def _removed_kernel(rows, least, out, vocabulary, divisor, removed, units, BLOCK: tl.constexpr):
    row, token = tl.program_id(0), tl.program_id(1)
    at = rows + row * vocabulary
    most = truncation._scaled(truncation._value(truncation._largest(at, vocabulary, BLOCK)), divisor)
    s = truncation._scaled(tl.load(at + token), divisor)
    edge = tl.load(least + row)
    goes = truncation._top_p_removes(at, vocabulary, s, token, edge, most, divisor, removed, units, BLOCK) | (
        s < edge
    )
    tl.store(out + row * vocabulary + token, goes.to(tl.uint8))


@runs_kernels
def test_the_search_finds_the_kth_largest_logit(rng) -> None:
    """Over rows that a search by halves could go astray in: gaps of many sizes, equal and infinite values, zeros."""
    size = 23
    rows = [rows_of(rng, kind, size, 1)[0] for kind in ("normal", "ties", "masked", "small")]
    rows += [torch.tensor([1.0] * size), torch.tensor([INF] * 3 + [-INF] * 9 + [3e38, -3e38] * 5 + [0.0])]
    rows += [
        torch.logspace(-44, 38, size),
        -torch.logspace(-44, 38, size),
        torch.zeros(size).copysign(rows[0]),
    ]
    rows += [torch.cat([torch.logspace(-44, -30, 11), -torch.logspace(-44, -30, 11), torch.tensor([5.0])])]
    x = torch.stack(rows).to(DEVICE)
    out = torch.full_like(x[:, :4].contiguous(), NAN)
    _kth_kernel[x.shape[0], 4](x, out, size, 0.7, BLOCK=8)
    expected = x.sort(-1, descending=True).values[:, ::6]
    assert torch.equal(out, expected)


@runs_kernels
@pytest.mark.parametrize("top_p", [0.9, 0.4, 1 - 1e-7])
def test_the_kernel_removes_what_the_reference_removes(rng, top_p: float) -> None:
    for kind, top_k in (("normal", 9), ("ties", None), ("masked", None)):
        x = rows_of(rng, kind, 21, 1).to(DEVICE)
        cut = Truncation(top_p, top_k)
        least = torch.full((1,), -INF)
        if top_k is not None:
            least = (x.cpu() / 0.7).topk(top_k).values[:, -1].contiguous()
        out = torch.zeros(x.shape, dtype=torch.uint8, device=DEVICE)
        _removed_kernel[1, 21](x, least.to(DEVICE), out, 21, 0.7, cut.removed, truncation._units(21), BLOCK=8)
        for row, goes, stays in zip(x.cpu(), out.cpu(), truncation.kept(x.cpu(), 0.7, cut), strict=True):
            _, unclear = truth(row.numpy(), 0.7, cut)
            assert ((goes == 0) == stays)[torch.from_numpy(~unclear)].all()


@runs_kernels
def test_a_sum_that_is_exactly_the_edge_goes() -> None:
    """Weights of 1, which nothing rounds: half, and a quarter, of eight tokens."""
    equal = torch.ones(1, 8, device=DEVICE)
    least = torch.full((1,), -INF, device=DEVICE)
    for top_p, first in ((0.5, 4), (0.75, 2), (0.7, 2), (0.8, 1), (1e-9, 7)):
        out = torch.zeros(equal.shape, dtype=torch.uint8, device=DEVICE)
        _removed_kernel[1, 8](
            equal, least, out, 8, 1.0, Truncation(top_p).removed, truncation._units(8), BLOCK=4
        )
        assert out[0].tolist() == [1] * first + [0] * (8 - first)
        stays = truncation.kept(equal, 1.0, Truncation(top_p))
        assert torch.equal(out == 0, stays)


def drawn(logits: torch.Tensor, how: Sampling, lanes: list[int] | None = None) -> torch.Tensor:
    """The tokens that the kernels choose for these rows, sequence i at position i of slot i, in these lanes."""
    slots = len(logits)
    state = SlotState.allocate(slots, 1, logits.device)
    state.active.fill_(True)
    state.limit.fill_(2)
    state.sequence.copy_(torch.arange(slots + 1))
    state.position.copy_(torch.arange(slots + 1))
    table = torch.zeros(1, logits.shape[1], dtype=torch.uint8, device=logits.device)
    at = torch.tensor(list(range(slots)) if lanes is None else lanes, device=logits.device)
    sampling.advance_triton(logits[at], at, state, Choosing(how, table, 1, False))
    return state.token[:slots]


@runs_kernels
@pytest.mark.parametrize("cut", [CUTS[0], CUTS[2], CUTS[4], CUTS[5], CUTS[7], CUTS[9], CUTS[10]])
@pytest.mark.parametrize(("kind", "vocabulary"), [("normal", 1), ("ties", 259), ("bfloat16", 9001)])
def test_a_draw_is_that_of_the_reference(rng, kind: str, vocabulary: int, cut: tuple) -> None:
    logits = rows_of(rng, kind, vocabulary, 4).to(DEVICE, torch.bfloat16 if kind == "bfloat16" else None)
    how = Sampling(1.7, int(rng.integers(1 << 62)), Truncation(*cut))
    number = torch.arange(4, device=DEVICE)
    seen, expected = drawn(logits, how), sampling.choose(logits, number, number + 1, how)
    stays = truncation.kept(logits, 1.7, how.truncation)
    for row, token, wanted in zip(range(4), seen.tolist(), expected.tolist(), strict=True):
        _, unclear = truth(logits[row].float().cpu().numpy(), 1.7, how.truncation)
        assert stays[row, token] or unclear[token]
        assert token == wanted or unclear.any(), (row, token, wanted)


@runs_kernels
@pytest.mark.parametrize("temperature", [5e-324, 0.05, 1e308])
def test_rows_of_every_kind_at_any_temperature(rng, temperature: float) -> None:
    rows = [[NAN, 1.0, 2.0, 3.0], [-INF] * 4, [INF, 1.0, INF, 3.0], [3e38, -3e38, 2.9e38, 1.0]]
    rows += [[0.0, -0.0, 0.0, -INF], [1e-45, 0.0, 1e-45, -1e-45], [-3e38, -2e38, -3e38, -INF]]
    logits = torch.tensor(rows, device=DEVICE)
    number = torch.arange(len(rows), device=DEVICE)
    for cut in (Truncation(0.6), Truncation(0.3), Truncation(None, 2), Truncation(0.6, 3, 0.5)):
        how = Sampling(temperature, 3, cut)
        assert torch.equal(drawn(logits, how), sampling.choose(logits, number, number + 1, how)), cut


@runs_kernels
def test_the_first_of_equal_scores_is_drawn_again() -> None:
    """Infinite logits have equal scores. The first goes by top-p; of those left, one block has the first."""
    logits = torch.zeros(1, 5001, device=DEVICE)
    logits[0, [10, 20, 4116]] = INF
    how, number = Sampling(1.0, 3, Truncation(0.5)), torch.arange(1, device=DEVICE)
    assert drawn(logits, how).tolist() == [20]
    assert sampling.choose(logits, number, number + 1, how).tolist() == [20]


@runs_kernels
def test_neither_the_lane_nor_the_others_change_a_draw(rng) -> None:
    logits = rows_of(rng, "ties", 301, 5).to(DEVICE)
    how = Sampling(2.0, 7, Truncation(0.5, 60))
    together = drawn(logits, how)
    assert torch.equal(drawn(logits, how, rng.permutation(5).tolist()), together)
    for slot in (1, 4):
        assert drawn(logits, how, [slot])[slot] == together[slot]


@starts_the_interpreter
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__)
