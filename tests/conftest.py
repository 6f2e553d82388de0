"""What every test shares: the GPU skip, quiet threads, a seed that a failure shows, a run, a browser."""

import gc
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import huggingface_hub
import pytest
import torch
from adapters import save_adapted
from commands import LAYER, call, capture, roundtrip
from encoded import IMPLEMENTATIONS
from fork_server import Forked, Server
from huggingface_hub import constants
from stand_in_gpu import StandIn, build, install
from stand_in_hub import Hub, serve
from tiny import save_ar, save_av, save_model, write_prompts
from train_models import base_of, shaken
from worker_faults import Killer

from nla_engine.demo import smollm2 as real
from nla_engine.errors import RequestError
from nla_engine.models.hub import fetch, find
from nla_engine.ops.backends import cuda_fault
from nla_engine.train.output import write_sidecars
from nla_engine.train.pair import TrainedAR, TrainedAV
from nla_engine.workers import process

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytest_plugins = ["fresh_seed"]
Open = Callable[..., "Page"]

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit an ignored one
torch.set_num_threads(1)  # tests are many small tensors; threads only get in each other's way

#: A disk in memory, and the bytes that must be free there: stores are synced all the time, and a real disk is slow.
_MEMORY_DISK, _MEMORY_NEEDED = "/dev/shm", 6 << 30
#: What is to be seen on a page must come in so many seconds, on the slowest machine too.
_PAGE_SECONDS = 120


def pytest_configure() -> None:
    """Temporary files of tests, and of what they start, are in memory if there is room. TMPDIR names another place."""
    if "TMPDIR" not in os.environ and os.access(_MEMORY_DISK, os.W_OK):
        available = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
        memory = int(available[1]) << 10 if available else 0
        if min(shutil.disk_usage(_MEMORY_DISK).free, memory) >= _MEMORY_NEEDED:
            os.environ["TMPDIR"] = tempfile.tempdir = _MEMORY_DISK


def pytest_collection_finish() -> None:
    """What is imported stays, so no collection of garbage need look at it: each takes a fifth of a second else."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch sees none")
    for item in items:
        if item.get_closest_marker("gpu"):  # keywords hold the names of directories too
            item.add_marker(skip)


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, av, ar, prompts.jsonl, run.zarr and explained.parquet, the last two made by the commands themselves."""
    root = tmp_path_factory.mktemp("commands")
    save_model(root / "base")
    save_av(root / "av", LAYER)
    save_ar(root / "ar", LAYER)
    write_prompts(root / "prompts.jsonl", 5)
    assert call(*capture(root, root / "run.zarr")).code == 0
    assert call(*roundtrip(root, root / "explained.parquet")).code == 0
    return root


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of SmolLM2-135M-Instruct, made once and kept in the cache directory. Tests of it are marked real."""
    try:
        return real.cached()
    except RequestError as error:
        pytest.skip(str(error))
    except OSError:  # no writable cache
        directory = tmp_path_factory.mktemp("real") / "smollm2"
        real.make(directory)
        return directory


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> StandIn:
    """csrc's encoder and decoder, on the CPU."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    return StandIn(build(tmp_path_factory.mktemp("stand_in_gpu")))


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(
    request: pytest.FixtureRequest, seed: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, str]:
    """The name of an implementation of ops/encode, and its device."""
    name, device, multiprocessors = request.param
    if multiprocessors:
        install(request.getfixturevalue("stand_in"), multiprocessors, monkeypatch, seed)
    elif name == "cuda" and (fault := cuda_fault(torch.device(device))):
        pytest.skip(fault)
    return name, device


@pytest.fixture(scope="session")
def fork_server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def forked_workers(fork_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers of a pool are forked, which takes no seconds, and there are cores for as many as a test asks for."""
    monkeypatch.setattr("nla_engine.workers.devices.cores", lambda: 64)
    popen = SimpleNamespace(**vars(subprocess))
    popen.Popen = partial(Forked, fork_server)
    monkeypatch.setattr(process, "subprocess", popen)


@pytest.fixture
def killer(monkeypatch: pytest.MonkeyPatch) -> Killer:
    """Kills workers of the pools of a test, once it is told how many."""
    killer, send = Killer(), process.WorkerProcess.send

    def sends(worker: process.WorkerProcess, *message: object) -> None:
        killer.sends(worker, *message)
        send(worker, *message)

    monkeypatch.setattr(process.WorkerProcess, "send", sends)
    return killer


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """The distribution's Chromium, without a window."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed (the dev extra)"
    )
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium on the path (apt-get install chromium)")
    playwright.expect.set_options(timeout=_PAGE_SECONDS * 1000)
    arguments = ["--disable-dev-shm-usage"]  # a container's is too small for a large page
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(
            executable_path=found, args=arguments, chromium_sandbox=False, timeout=_PAGE_SECONDS * 1000
        )
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: "Browser") -> Iterator[Open]:
    """open_page(file, "#row=1", size, scheme): the page, shown. Complaints and requests fail the test when it ends."""
    complaints, contexts = [], []

    def open_(
        path: Path, link: str = "", size: tuple[int, int] = (1280, 860), scheme: str = "light"
    ) -> "Page":
        context = browser.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, reduced_motion="reduce"
        )
        context.set_default_timeout(_PAGE_SECONDS * 1000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on("request", lambda request: requested(request.url))
        page.goto(f"{path.as_uri()}{link}")
        page.wait_for_selector("[aria-selected=true]")
        return page

    def requested(url: str) -> None:
        if not url.startswith(("file:", "data:", "about:")):
            complaints.append(f"request: {url}")

    yield open_
    for context in contexts:
        context.close()
    assert not complaints


@pytest.fixture(scope="session")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `save_adapted` writes."""
    return save_adapted(tmp_path_factory.mktemp("adapted"))


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def steps() -> list[tuple[str, int, int]]:
    return []


@pytest.fixture
def hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str], steps: list[tuple[str, int, int]]
) -> Iterator[Hub]:
    """A Hub for this process, with a cache and a working directory of its own."""

    @contextmanager
    def bar(unit: str) -> Iterator[Callable[[int, int], None]]:
        yield lambda done, total: steps.append((unit, done, total))

    monkeypatch.setattr(fetch, "_announce", said.append)
    monkeypatch.setattr(fetch, "_progress", bar)
    monkeypatch.setattr(find, "_commits", {})
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with serve() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        yield served
    huggingface_hub.close_session()


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, prompts.jsonl and rows.zarr, which keeps next tokens: what a pair is trained on."""
    root = tmp_path_factory.mktemp("train")
    save_model(root / "base")
    write_prompts(root / "prompts.jsonl", 16)
    ran = call(*capture(root, root / "rows.zarr", max_new_tokens=6, next_token=3))
    assert ran.code == 0, ran.err
    return root


@pytest.fixture
def av(made: Path, tmp_path: Path) -> TrainedAV:
    """An AV with a LoRA that changes something already."""
    lm = base_of(made)
    write_sidecars(tmp_path / "sidecars", lm.tokenizer, lm.d_model, LAYER, "12", 0)
    trained = TrainedAV(lm, tmp_path / "sidecars" / "av", 4, 1)
    return shaken(trained, 2)


@pytest.fixture
def ar(made: Path, av: TrainedAV, tmp_path: Path) -> TrainedAR:
    """An AR of the same kind."""
    lm = base_of(made, headless=True, blocks=LAYER + 1)
    return shaken(TrainedAR(lm, tmp_path / "sidecars" / "ar", 4, 3), 4)
