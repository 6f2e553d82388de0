"""Places, devices and dtypes of models: what is taken, and a clear error for what is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nla_engine.errors import CheckpointError, NLAError, RequestError
from nla_engine.models import load as models
from nla_engine.models.load import load_model, pick_device, pick_dtype
from nla_engine.ops.cards import Card

CPU: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}


def test_places_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        load_model(str(tmp_path / "nothing"), **CPU)
    with pytest.raises(RequestError, match="is a directory, and has no revisions: leave --revision out"):
        load_model(str(tmp_path), revision="main", **CPU)
    with pytest.raises(CheckpointError, match="has no config.json: give the directory of one checkpoint"):
        load_model(str(tmp_path), **CPU)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="it holds no weights"):
        load_model(str(tmp_path), **CPU)


def test_a_gpu_is_picked_by_number_and_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    current = [1]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(models, "card_of", hopper)
    assert [pick_device(name) for name in (None, "cuda")] == [torch.device("cuda", 1)] * 2
    assert pick_device("cuda:0") == torch.device("cuda", 0) and current[-1] == 0
    assert pick_device("cpu:0") == pick_device("cpu") == torch.device("cpu") and current[-1] == 0
    with pytest.raises(RequestError, match="'cuda:2' does not exist: torch finds 2 GPUs"):
        pick_device("cuda:2")


def hopper(device: torch.device) -> Card:
    return Card(device.index or 0, "stand-in", (9, 0), 232_448)


def test_devices_and_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "card_of", hopper)
    assert pick_dtype(None, torch.device("cpu")) == torch.float32
    assert pick_dtype(None, torch.device("cuda")) == torch.bfloat16
    for call in (
        lambda: pick_dtype("int8", CPU["device"]),
        lambda: pick_device("abacus"),
        lambda: pick_device("meta"),
    ):
        with pytest.raises(NLAError, match="not"):
            call()
