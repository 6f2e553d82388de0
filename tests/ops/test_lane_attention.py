"""Attention of lanes: the kernel against its reference, and the reference against one softmax over a sequence."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from interpreted import DEVICE, run_in_the_interpreter, runs_kernels, starts_the_interpreter
from kernel_checks import DTYPES, close

from nla_engine.engine.attention import prefill_tiles
from nla_engine.ops import lane_attention as op
from nla_engine.ops.attention import Shape, Slopes, Tiles
from nla_engine.ops.tile_sizes import Cut

#: window, softcap
SHAPES = [(0, 0.0), (5, 0.0), (0, 3.0), (3, 2.0)]


class Lanes:
    """Random lanes of `tokens` each over some sequences, one of which has none, with all that they attend to."""

    def __init__(
        self, rng: np.random.Generator, tokens: int, groups: int, group: int, size: int, dtype: torch.dtype
    ) -> None:
        self.tokens, longest = tokens, 90
        self.sequence = np.sort(rng.choice([0, 1, 1, 3], 13))
        self.first = rng.integers(0, longest, 13)
        self.first[rng.integers(0, 13)] = 0

        def random(*shape: int) -> torch.Tensor:
            return torch.from_numpy(rng.normal(0, 1, shape)).to(DEVICE, dtype)

        total = 13 * tokens
        self.query = random(groups * group, total, size).transpose(0, 1)
        self.key, self.value = random(total, groups, size), random(groups, total, size).transpose(0, 1)
        self.keys = random(4, longest, groups, size).transpose(1, 2)
        self.values = random(4, groups, longest, size)
        for number in range(4):  # what no lane of a sequence sees
            behind = max(
                [int(f) for s, f in zip(self.sequence, self.first, strict=True) if s == number] or [0]
            )
            self.keys[number, :, behind:] = self.values[number, :, behind:] = torch.nan
        at = torch.from_numpy(self.first[:, None] + np.arange(tokens)).to(DEVICE).flatten()
        chosen, counts = np.unique(self.sequence, return_counts=True)
        self.tiles: Tiles = prefill_tiles(
            np.stack([chosen, np.zeros_like(chosen), counts * tokens], 1), group, at
        )

    def attend(self, run, shape: Shape, dtype: torch.dtype | None = None) -> torch.Tensor:
        given = (self.query, self.key, self.value, self.keys, self.values)
        return run(*(x if dtype is None else x.to(dtype) for x in given), self.tiles, self.tokens, shape)

    def check(self, shape: Shape, kept: torch.Tensor | slice = slice(None)) -> None:
        """The kernel's result for these tokens."""
        found, plain = (
            self.attend(run, shape)[kept] for run in (op.attend_lanes_triton, op.attend_lanes_reference)
        )
        close(found, plain, self.attend(op.attend_lanes_reference, shape, torch.float64)[kept])


@pytest.mark.parametrize(("window", "softcap"), SHAPES)
def test_the_reference_is_one_softmax(window: int, softcap: float, rng: np.random.Generator) -> None:
    lanes = Lanes(rng, 3, 2, 3, 8, torch.float64)
    found = lanes.attend(op.attend_lanes_reference, Shape(0.3, window, softcap))
    for token in range(len(found)):
        lane, step = divmod(token, 3)
        number, first = int(lanes.sequence[lane]), int(lanes.first[lane])
        for head in range(6):
            own = slice(3 * lane, token + 1)
            keys = torch.cat([lanes.keys[number, head // 3, :first], lanes.key[own, head // 3]])
            values = torch.cat([lanes.values[number, head // 3, :first], lanes.value[own, head // 3]])
            scores = keys @ lanes.query[token, head] * 0.3
            if softcap:
                scores = torch.tanh(scores / softcap) * softcap
            if window:
                scores[: max(first + step + 1 - window, 0)] = -math.inf
            torch.testing.assert_close(found[token, head], scores.softmax(0) @ values)


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("window", "softcap"), SHAPES)
@pytest.mark.parametrize(("tokens", "groups", "group", "size"), [(1, 2, 7, 16), (4, 1, 1, 40), (3, 2, 3, 24)])
def test_the_kernel(
    tokens: int,
    groups: int,
    group: int,
    size: int,
    window: int,
    softcap: float,
    dtype: torch.dtype,
    rng: np.random.Generator,
) -> None:
    lanes = Lanes(rng, tokens, groups, group, size, dtype)
    lane = int(rng.integers(0, 13))
    last = tokens * lane + tokens - 1
    lanes.key[last] = lanes.value[last] = torch.nan  # seen by the last token of this lane alone
    shape = Shape(size**-0.5, window, softcap)
    wrong = lanes.attend(op.attend_lanes_triton, shape).isnan().flatten(1).any(1)
    assert wrong.nonzero().flatten().tolist() == [last]
    lanes.check(shape, ~wrong)


@runs_kernels
@pytest.mark.parametrize("rows", [16, 128])
def test_many_query_heads_for_one_key(
    rows: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tile larger than usual, and the same where several programs share it, each with a part of a token's heads."""
    monkeypatch.setattr(op, "cut_for", lambda *_: Cut(rows, 32, 4, 2))
    Lanes(rng, 2, 1, 71, 16, torch.float32).check(Shape(0.25))


def test_what_the_kernel_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither another width of values nor what it does not compute."""
    query, values = torch.zeros(1, 4, 9, 16), torch.zeros(1, 2, 9, 16)
    assert not op.takes_lanes(query, values, Shape(1.0))  # on a CPU
    monkeypatch.setattr(op, "has_triton", lambda device: True)
    assert op.takes_lanes(query, values, Shape(1.0, 8, 3.0))
    assert not op.takes_lanes(query, values[..., :8], Shape(1.0))
    assert not op.takes_lanes(query, values.half(), Shape(1.0))
    assert not op.takes_lanes(*(torch.zeros(1, 2, 9, 512) for _ in range(2)), Shape(1.0))
    for shape in (
        Shape(1.0, sinks=torch.zeros(4)),
        Shape(1.0, slopes=Slopes(torch.zeros(4))),
        Shape(1.0, 8, chunked=True),
    ):
        assert not op.takes_lanes(query, values, shape)


@starts_the_interpreter
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__)
