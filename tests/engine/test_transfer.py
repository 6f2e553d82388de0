"""Copies between host and device, and glances at a busy device: nothing is seen too early or too late."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nla_engine.engine.transfer import Glance, to_device, to_host

CPU = torch.device("cpu")


def test_a_glance_sees_the_values_of_its_moment() -> None:
    values = torch.arange(5)
    glance = Glance(values)
    assert glance.read() == [[0] * 5]
    glance.take()
    values += 10
    assert glance.read() == glance.read() == [[0, 1, 2, 3, 4]]
    glance.take()
    assert glance.read() == [[10, 11, 12, 13, 14]]


@pytest.mark.parametrize("shape", [(0,), (7,), (3, 5)])
def test_there_and_back(shape: tuple[int, ...], rng: np.random.Generator) -> None:
    values = rng.integers(-(2**40), 2**40, shape)
    assert (to_host(to_device(values, CPU)) == values).all()


@pytest.mark.gpu
def test_a_busy_device_is_neither_waited_for_nor_looked_at_too_late(rng: np.random.Generator) -> None:
    """Behind a kernel of about a second: copies to the device are queued, even if the host's array changes; two glances
    see one change each."""
    device = torch.device("cuda")
    values = torch.zeros(1000, dtype=torch.int64, device=device)
    first, second, done = Glance(values), Glance(values), torch.cuda.Event()
    given = [rng.integers(0, 2**40, (4, 20_000)) for _ in range(5)]
    to_device(given[0], device), torch.cuda.synchronize()  # allocates pinned memory and loads kernels
    torch.cuda._sleep(1_500_000_000)
    copies = []
    for values_given in given:
        mine = values_given.copy()
        copies.append(to_device(mine, device))
        mine[:] = -1
    values += 1
    first.take()
    torch.cuda._sleep(1_500_000_000)
    values += 1
    second.take()
    done.record()
    assert not done.query()
    assert first.read() == [[1] * 1000] and not done.query()
    assert second.read() == [[2] * 1000]
    assert all((to_host(copy) == want).all() for copy, want in zip(copies, given, strict=True))
