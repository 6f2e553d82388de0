"""A convolution that goes on from kept rows, against torch's over the whole sequence."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nla_engine.ops import short_conv


@pytest.mark.parametrize("taps", [2, 3, 4])
@pytest.mark.parametrize("read", [(1,), (2, 1, 7), (9, 4)])
def test_runs_and_steps_give_the_convolution_of_the_whole(
    taps: int, read: tuple[int, ...], rng: np.random.Generator
) -> None:
    """A slot reads runs of these sizes, another steps beside it; what an earlier sequence left changes nothing."""
    count, channels = sum(read) + 5, 6
    rows = torch.from_numpy(rng.standard_normal((2, count, channels))).float()
    weight = torch.from_numpy(rng.standard_normal((channels, taps))).float()
    padded = torch.nn.functional.pad(rows.transpose(1, 2), (taps - 1, 0))
    whole = torch.nn.functional.conv1d(padded, weight[:, None], groups=channels).transpose(1, 2)
    kept = torch.full((3, taps - 1, channels), torch.nan)
    for slot, own, want in zip((2, 0), rows, whole, strict=True):
        got, at = [], 0
        for size in read:
            got.append(short_conv.run(own[at : at + size], weight, kept, slot, at))
            at += size
        torch.testing.assert_close(torch.cat(got), want[:at])
    for at in range(sum(read), count):
        slots, positions = torch.tensor([2, 0]), torch.tensor([at, at])
        step = short_conv.step(rows[:, at], weight, kept, slots, positions)
        torch.testing.assert_close(step, whole[:, at])
    assert kept[1].isnan().all()
