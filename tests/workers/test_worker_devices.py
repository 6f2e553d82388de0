"""What --gpus and --workers ask for, on machines with and without GPUs."""

import pytest
import torch

from nla_engine.errors import RequestError
from nla_engine.fields import is_gpus
from nla_engine.workers.devices import worker_devices


@pytest.fixture
def gpus(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param > 0)


@pytest.mark.parametrize("gpus", [4], indirect=True)
@pytest.mark.parametrize(
    ("asked", "devices"),
    [
        ("all", ("cuda:0", "cuda:1", "cuda:2", "cuda:3")),
        ("1", ("cuda:0",)),
        ("3", ("cuda:0", "cuda:1", "cuda:2")),
        ("3,0", ("cuda:3", "cuda:0")),
    ],
)
@pytest.mark.usefixtures("gpus")
def test_gpus(asked: str, devices: tuple[str, ...]) -> None:
    assert is_gpus(asked)
    assert worker_devices(asked, 1, None) == devices


@pytest.mark.parametrize("word", ["", "0", "-1", "2.5", "a", "1,", ",1", "0,b", "all,1", "1 2", "99999"])
def test_no_gpus(word: str) -> None:
    assert not is_gpus(word)


@pytest.mark.parametrize(
    ("gpus", "given", "message"),
    [
        (2, ("3", 1, None), "--gpus is 3: torch finds 2"),
        (2, ("0,2", 1, None), "no GPU 2"),
        (2, ("1,1", 1, None), "twice"),
        (2, ("all", 2, None), "exclude each other"),
        (2, ("all", 1, "cuda:0"), "exclude each other"),
        (2, (None, 2, None), "for a CPU"),
        (2, (None, 2, "cuda:1"), "for a CPU"),
        (0, ("all", 1, None), "no CUDA GPU"),
        (0, ("1", 1, None), "no CUDA GPU"),
    ],
    indirect=["gpus"],
)
@pytest.mark.usefixtures("gpus")
def test_refused(given: tuple[str | None, int, str | None], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        worker_devices(*given)


@pytest.mark.parametrize("gpus", [2], indirect=True)
@pytest.mark.parametrize(
    ("given", "message"),
    [({"split": True}, "--tensor-parallel splits"), ({"loaded": True}, "loads its models")],
)
@pytest.mark.usefixtures("gpus")
def test_models_that_workers_cannot_have(given: dict[str, bool], message: str) -> None:
    for asked in (("all", 1, None), ("1", 1, None), (None, 2, "cpu")):
        with pytest.raises(RequestError, match=message):
            worker_devices(*asked, **given)
    assert worker_devices(None, 1, None, **given) == ()


@pytest.mark.parametrize(
    ("gpus", "given", "devices"),
    [
        (0, (None, 1, None), ()),
        (0, (None, 3, None), ("cpu",) * 3),
        (2, (None, 2, "cpu"), ("cpu",) * 2),
        (2, (None, 1, None), ()),
    ],
    indirect=["gpus"],
)
@pytest.mark.usefixtures("gpus")
def test_workers(given: tuple[str | None, int, str | None], devices: tuple[str, ...]) -> None:
    assert worker_devices(*given) == devices
