"""Why the ranks of a group leave their sums to NCCL."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nla_engine.engine import peers


def group(size: int) -> Any:
    devices = tuple(torch.device("cuda", number) for number in range(size))
    return SimpleNamespace(rank=0, size=size, device=devices[0], devices=devices)


def test_what_keeps_ranks_from_each_others_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    reached: list[tuple[int, int]] = []

    def reach(here: int, other: int) -> bool:
        reached.append((here, other))
        return other < 3

    monkeypatch.setenv(peers.SWITCH, "1")
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", reach)
    monkeypatch.setattr(peers, "cuda_fault", lambda device: "")
    assert peers._unreachable(group(3)) == ""
    assert reached == [(0, 1), (0, 2)]
    assert peers._unreachable(group(4)) == "cuda:0 cannot access cuda:3"
    assert "8 GPUs at most" in peers._unreachable(group(9))
    monkeypatch.setattr(peers, "cuda_fault", lambda device: "nvcc was missing")
    assert "CUDA part" in peers._unreachable(group(2))
    monkeypatch.delenv(peers.SWITCH)
    assert peers._unreachable(group(2)) == "NLA_PEER_SUMS is not 1"
