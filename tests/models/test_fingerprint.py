"""The fingerprint of weights: the sums on a CPU against those of plain torch, which a GPU takes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nla_engine.models import fingerprint
from nla_engine.models.fingerprint import fingerprint_of


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.int8])
def test_both_ways_give_the_same_sums(rng, dtype: torch.dtype) -> None:
    for size in (1, 65_520, 65_521, 65_522, 200_003):
        bits = torch.from_numpy(rng.normal(0, 40, size)).to(dtype)
        bits = bits.view({2: torch.int16, 4: torch.int32}.get(bits.element_size(), torch.uint8))
        assert fingerprint._on_host(bits.numpy()) == fingerprint._on_device(bits)


def test_a_fingerprint_is_what_it_always_was() -> None:
    """Stores hold it, so it may not change."""
    values = np.arange(150_000, dtype=np.float32)
    weights = {"b": torch.from_numpy(values).reshape(300, 500), "a": torch.from_numpy(values[::7]).bfloat16()}
    assert fingerprint_of(weights) == "ac0d1af5b716b687"


def test_every_bit_place_name_and_type_counts(rng) -> None:
    weight = torch.from_numpy(rng.normal(size=(3, 70_000))).float()
    swapped = weight.clone()
    swapped[1, 5], swapped[2, 9] = weight[2, 9], weight[1, 5]
    changed = weight.clone()
    changed.view(torch.int32)[2, 69_999] ^= 1
    variants = [weight, swapped, changed, weight.reshape(1, -1), weight.bfloat16()]
    prints = [fingerprint_of({"w": each}) for each in variants] + [fingerprint_of({"v": weight})]
    assert len(set(prints)) == len(prints)


def test_parts_are_folded_in_order(rng, monkeypatch) -> None:
    weight = {"w": torch.from_numpy(rng.normal(size=1000)).float()}
    monkeypatch.setattr(fingerprint, "_PART", 64)
    first, second = fingerprint.checksums(weight["w"])
    plain = weighted = 0
    for part in weight["w"].view(torch.int32).split(64):
        values = [int(value) for value in part]
        plain += sum(values)
        weighted = (weighted * 31 + sum(v * (i + 1) for i, v in enumerate(values))) % (1 << 63)
    assert (first, second) == (plain, weighted)
