"""Prompts on their way into a writer: how many of their vectors are on the device at once."""

from __future__ import annotations

import numpy as np
import pytest

from nla_engine.models.injection import Prompt
from nla_engine.roundtrip import writer
from nla_engine.roundtrip.writer import Asked


def test_few_vectors_are_scaled_at_once(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_SCALED_AT_ONCE", 10)
    sizes = [*rng.integers(1, 13, 60).tolist(), 40, 1, 1, 10, 10, 1]
    asked = [Asked(i, Prompt((0,), (0,)), np.zeros((size, 2), np.float32)) for i, size in enumerate(sizes)]
    groups = list(writer._groups(iter(asked)))
    assert [each.id for group in groups for each in group] == list(range(len(sizes)))
    for group, following in zip(groups, [*groups[1:], None], strict=True):
        held = sum(len(each.vectors) for each in group)
        assert held <= 10 or len(group) == 1
        assert following is None or held + len(following[0].vectors) > 10, "no group is smaller than need be"
    assert list(writer._groups(iter([]))) == []
