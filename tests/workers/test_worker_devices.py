"""What --gpus and --workers ask for, on machines with and without GPUs."""

import pytest
import torch

from nla_engine.errors import RequestError
from nla_engine.fields import is_gpus
from nla_engine.workers.devices import cores, grouped, worker_devices


@pytest.fixture
def gpus(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many GPUs, and three cores of a CPU."""
    monkeypatch.setattr("nla_engine.workers.devices.cores", lambda: 3)
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
        (0, (None, 4, None), "--workers is 4: this process may use 3 CPU cores"),
        (2, (None, 99, "cpu"), "may use 3 CPU cores, and each worker holds the models: lower it"),
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
@pytest.mark.usefixtures("gpus")
def test_a_loaded_model_cannot_be_that_of_workers() -> None:
    for asked in (("all", 1, None), ("1", 1, None), (None, 2, "cpu")):
        with pytest.raises(RequestError, match="loads its models"):
            worker_devices(*asked, loaded=True)
    assert worker_devices(None, 1, None, loaded=True) == ()


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


def test_cores_are_those_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {2, 5, 7}, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert cores() == 3
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    assert cores() == 4


def test_groups_of_devices() -> None:
    four = tuple(f"cuda:{number}" for number in (0, 2, 3, 1))
    assert grouped(four, 1) == four and grouped((), 2) == ()
    assert grouped(four, 2) == ("cuda:0+cuda:2", "cuda:3+cuda:1")
    assert grouped(("cpu", "cpu"), 3) == ("cpu+cpu+cpu",) * 2
    with pytest.raises(
        RequestError, match="--gpus gives 4 GPUs, and --tensor-parallel 3 does not divide them"
    ):
        grouped(four, 3)
