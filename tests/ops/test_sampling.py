"""The end of a step: Triton against torch, in the interpreter on a CPU, for lanes of every kind at once."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from interpreted import DEVICE, run_in_the_interpreter, runs_kernels, starts_the_interpreter

from nla_engine.ops import gumbel, sampling
from nla_engine.ops.sampling import Choosing, Sampling, SlotState
from nla_engine.ops.truncation import Truncation

DTYPES = [torch.float32, torch.bfloat16]
MOST = 5


def filled(rng: np.random.Generator, slots: int, vocabulary: int) -> tuple[SlotState, torch.Tensor]:
    """A state with slots of every kind (the spare one at rest), and a stop table of four states."""
    state = SlotState.allocate(slots, MOST, torch.device(DEVICE))
    draws = {
        "token": rng.integers(0, vocabulary, slots + 1),
        "position": rng.integers(0, 1 << 20, slots + 1),
        "sequence": rng.integers(0, 1 << 40, slots + 1),
        "active": rng.random(slots + 1) < 0.7,
        "closing": rng.random(slots + 1) < 0.2,
        "stop_state": rng.integers(0, 2, slots + 1),
        "count": rng.integers(0, MOST, slots + 1),
        "limit": rng.integers(1, MOST + 1, slots + 1),
        "generated": rng.integers(0, vocabulary, (slots + 1, MOST)),
    }
    draws["active"][-1] = False
    for name, values in draws.items():
        getattr(state, name).copy_(torch.from_numpy(values))
    table = torch.from_numpy(rng.integers(0, 4, (4, vocabulary)).astype(np.uint8)).to(DEVICE)
    return state, table


def copied(state: SlotState) -> SlotState:
    return SlotState(*(getattr(state, field.name).clone() for field in dataclasses.fields(state)))


def same(a: SlotState, b: SlotState) -> None:
    for field in dataclasses.fields(a):
        assert torch.equal(getattr(a, field.name), getattr(b, field.name)), field.name


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lanes", "vocabulary"), [(1, 1), (33, 259), (3, 4096), (4, 10_001)])
@pytest.mark.parametrize("read_last", [False, True])
@pytest.mark.parametrize(
    ("temperature", "truncation"),
    [(0.0, Truncation()), (0.7, Truncation()), (0.7, Truncation(None, 40, 0.3))],
    ids=["greedy", "sampled", "truncated"],
)
def test_both_ways_move_every_lane_alike(
    rng,
    dtype: torch.dtype,
    lanes: int,
    vocabulary: int,
    read_last: bool,
    temperature: float,
    truncation: Truncation,
) -> None:
    slots = lanes + 4
    state, table = filled(rng, slots, vocabulary)
    at = rng.permutation(slots)[:lanes]
    at[rng.random(lanes) < 0.2] = slots  # unused lanes, all at the spare slot
    where = torch.from_numpy(at).to(DEVICE)
    logits = torch.from_numpy(rng.integers(-8, 8, (lanes, 2 * vocabulary)).astype(np.float32) / 4)
    logits = logits.to(DEVICE, dtype)[:, :vocabulary]  # many ties; rows further apart than they are long
    how = Choosing(Sampling(temperature, int(rng.integers(1 << 62)), truncation), table, 2, read_last)
    fast, slow = copied(state), copied(state)
    sampling.advance_triton(logits, where, fast, how)
    sampling.advance_reference(logits, where, slow, how)
    same(fast, slow)
    untouched = torch.ones(slots + 1, dtype=torch.bool, device=DEVICE)
    untouched[where] = False
    untouched[slots] = True
    for field in dataclasses.fields(state):
        assert torch.equal(getattr(fast, field.name)[untouched], getattr(state, field.name)[untouched])


def test_strided_lanes_and_logits_are_refused(rng) -> None:
    """Kernels read them by number: a strided tensor would be read at other places without a word."""
    state, table = filled(rng, 8, 16)
    how = Choosing(Sampling(), table, 2, False)
    lanes, logits = torch.arange(8, device=DEVICE)[::2], torch.zeros(4, 32, device=DEVICE)
    for bad in ((logits[:, :16], lanes), (logits[:, ::2], lanes.contiguous())):
        with pytest.raises(ValueError, match="contiguous"):
            sampling.advance_triton(*bad, state, how)


def one_each(logits: torch.Tensor, temperature: float = 0.0, seed: int = 0) -> torch.Tensor:
    """The tokens that the kernels choose for these rows, sequence i at position i of its own slot."""
    lanes = len(logits)
    state = SlotState.allocate(lanes, 1, logits.device)
    state.active.fill_(True)
    state.limit.fill_(2)
    state.sequence.copy_(torch.arange(lanes + 1))
    state.position.copy_(torch.arange(lanes + 1))
    table = torch.zeros(1, logits.shape[1], dtype=torch.uint8, device=logits.device)
    how = Choosing(Sampling(temperature, seed), table, 1, False)
    sampling.advance_triton(logits, torch.arange(lanes, device=logits.device), state, how)
    return state.token[:lanes]


@runs_kernels
def test_the_greedy_choice_is_argmax_of_torch_where_it_is_unclear(rng) -> None:
    nan, inf = float("nan"), float("inf")
    rows = [
        [-inf] * 4,
        [0.0, -0.0, 0.0, -1.0],
        [-0.0, 0.0, -1.0, 0.0],
        [1.0, nan, inf, nan],
        [inf, -nan, inf, 3],
    ]
    rows += [[-1.0, -2.0, -1.0, -3.0], [-inf, -inf, -3e38, -3e38], [nan] * 4, [1e-45, 0.0, -1e-45, 1e-45]]
    few = torch.tensor(rows, device=DEVICE)
    assert one_each(few).tolist() == few.argmax(-1).tolist()
    wide = torch.from_numpy(rng.integers(-3, 3, (6, 40_003)).astype(np.float32)).to(DEVICE)
    assert one_each(wide).tolist() == wide.argmax(-1).tolist()
    wide[2, 30_000] = wide[2, 39_000] = wide[4, 4095] = nan
    assert one_each(wide)[2] == 30_000
    assert one_each(wide)[4] == 4095


@runs_kernels
@pytest.mark.parametrize("seed", [0, 1, 0xFFFFFFFF, (1 << 63) - 1])
def test_a_draw_is_that_of_the_reference(rng, seed: int) -> None:
    """The same hash decides: over flat logits nothing else does, and a wrong bit would move nearly every draw."""
    flat = torch.zeros(40, 9001, device=DEVICE)
    number = torch.arange(40, device=DEVICE)
    expected = sampling.choose(flat, number, number + 1, Sampling(1.5, seed))
    assert (one_each(flat, 1.5, seed) == expected).float().mean() >= 0.95  # log may round otherwise
    peaked = torch.full((3, 9001), -1000.0, device=DEVICE)
    peaked[:, 7] = 1000.0
    assert (one_each(peaked, 1.0, seed) == 7).all()


#: Temperatures at the ends of float64, of float32, and of what float32 can divide by.
EXTREMES = [5e-324, 1e-300, 1e-45, 1e-40, 1e-38, 1e-20, 1e20, 1e38, 3.4e38, 1e39, 1e308]


def extremes(rng: np.random.Generator) -> torch.Tensor:
    """Rows of which the first has the largest finite numbers, and the last nothing but one value in front."""
    rows = rng.normal(0, 4, (40, 3001)).astype(np.float32)
    rows[:, 17] = -np.inf
    rows[0, 5], rows[0, 6] = 3e38, -3e38
    rows[1] = -1e4 + rows[1] / 100
    return torch.from_numpy(rows).to(DEVICE)


@pytest.mark.parametrize("temperature", EXTREMES)
def test_a_temperature_towards_nothing_is_greedy_and_towards_infinity_flat(rng, temperature: float) -> None:
    logits, number = extremes(rng), torch.arange(40, device=DEVICE)
    chosen = sampling.choose(logits, number, number, Sampling(temperature, 3))
    if temperature < 1:
        assert torch.equal(chosen, logits.argmax(-1))
    else:
        flat = sampling.choose(torch.zeros_like(logits), number, number, Sampling(1.0, 3))
        assert (chosen == flat).float().mean() > 0.9
        assert not (chosen == 17).any()  # what has no probability has none at any temperature


@runs_kernels
@pytest.mark.parametrize("temperature", [*EXTREMES, 0.3, 1.0, 1.7])
def test_draws_at_any_temperature_are_those_of_the_reference(rng, temperature: float) -> None:
    logits, number = extremes(rng), torch.arange(40, device=DEVICE)
    expected = sampling.choose(logits, number, number + 1, Sampling(temperature, 11))
    assert (one_each(logits, temperature, 11) == expected).float().mean() >= 0.95  # log may round otherwise


def test_frequencies_are_those_of_the_softmax_at_low_and_high_temperatures() -> None:
    logits = torch.tensor([1.0, 0.9, 0.5, -1.0, float("-inf")])
    number = torch.arange(20_000)
    for temperature in (0.05, 0.3, 1.0, 4.0, 1e30):
        drawn = sampling.choose(logits.expand(len(number), -1), number, number, Sampling(temperature, 5))
        wanted = torch.softmax(logits.double() / temperature, -1)
        seen = drawn.bincount(minlength=5) / len(number)
        assert (seen - wanted).abs().max() < 0.015, temperature


def test_hashes_of_integers_and_tensors_are_one() -> None:
    values = [0, 1, 12345, 0xFFFFFFFF, 1 << 40]
    assert gumbel.hash_bits(torch.tensor(values)).tolist() == [gumbel.hash_bits(value) for value in values]


@starts_the_interpreter
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__)
