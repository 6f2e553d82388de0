"""What a Hub, a network, a disk or a user can do wrong: one line each, with its remedy, and nothing left behind."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import call, check_refused
from huggingface_hub import constants, file_download
from stand_in_hub import SMALL, Hub, Repository, offline

from nla_engine.errors import CheckpointError, HubError, NLAError, RequestError, WriteError
from nla_engine.models.hub import fetch, find_directory

NO_IDS = [
    "",
    "x",
    "./x/y",
    "~nobody/x",
    "/no/x",
    "a/b/",
    "a b/c",
    "a/..",
    "a/b/..",
    "a/b//c",
    "\0",
    "y" * 999,
]


def gated(made: Repository) -> None:
    made.gated = True


def answers(status: int, code: str = "", message: str = "") -> Callable[[Repository], None]:
    def set_fault(made: Repository) -> None:
        made.fault = (status, code, message)

    return set_fault


Case = tuple[Callable[[Repository], None], type[NLAError], str]
FAULTS: dict[str, Case] = {
    "gated": (
        gated,
        CheckpointError,
        r"is gated: accept its licence at http://127\S+/owner/model, and log in",
    ),
    "wrong token": (
        answers(401, message="Invalid credentials in Authorization header"),
        CheckpointError,
        "does not take your token .*log in",
    ),
    "wrong id, as the Hub says it to strangers": (
        answers(401, message="Invalid username or password."),
        CheckpointError,
        "no such model on the Hub: mend the path or the id; if the model is private, log in",
    ),
    "weak token": (answers(403), CheckpointError, "token may not read it"),
    "disabled": (answers(403, message="Access to this resource is disabled."), CheckpointError, "disabled"),
    "too many requests": (answers(429), HubError, "wait a few minutes, or log in"),
    "down": (answers(503), HubError, "the Hub fails for now .503: try again later"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_has_its_remedy(hub: Hub, fault: str) -> None:
    harm, kind, message = FAULTS[fault]
    harm(hub.add("owner/model", SMALL))
    if fault == "wrong token":
        Path(constants.HF_TOKEN_PATH).write_text("hf_expired")
    with pytest.raises(kind, match=rf"^owner/model: .*{message}") as raised:
        find_directory("owner/model")
    assert type(raised.value) is kind and "\n" not in str(raised.value)
    assert hub.fetched() == []


def test_wrong_ids_and_revisions(hub: Hub, tmp_path: Path) -> None:
    hub.add("owner/model", SMALL)
    with pytest.raises(CheckpointError, match=r"^owner/modle: no such directory, and no such model on the"):
        find_directory("owner/modle")
    with pytest.raises(CheckpointError, match=r"^owner/model: has no revision 'v9': give a branch, tag or"):
        find_directory("owner/model", "v9")
    assert not list(tmp_path.glob("cache/*/snapshots/*"))
    Path("models/qwen").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="no such directory; there is models/qwen, and no such model"):
        find_directory("models/qwne")
    with pytest.raises(RequestError, match="has no revisions"):
        find_directory("models/qwen", "v9")
    hub.asked.clear()
    with pytest.raises(CheckpointError, match=r"^models/qwen/av: no such directory \(give a local"):
        find_directory("models/qwen/av")  # a local path, since its beginning is there
    assert not hub.asked


@pytest.mark.parametrize("name", NO_IDS)
def test_what_is_no_id_is_asked_of_nobody(hub: Hub, name: str) -> None:
    with pytest.raises(CheckpointError, match=r"no such directory \(give a local directory or a Hub id"):
        find_directory(name)
    assert not hub.asked


def test_no_network_and_nothing_in_the_cache(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    offline(hub, monkeypatch)
    Path("owner/models").mkdir(parents=True)
    with pytest.raises(
        HubError, match=r"no such directory; there is owner/models; as a Hub id: the Hub cannot be reached \("
    ):
        find_directory("owner/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set, and the cache has no whole snapshot of it"):
        find_directory("owner/model")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"pytorch_model.bin": b"x", "training_args.bin": b"x"}, "pickled, .*: pytorch_model.bin\\)"),
        ({"consolidated.safetensors": b"x"}, "what it has is not read: consolidated.safetensors"),
        ({"model.fp16.safetensors": b"x", "tf_model.h5": b"x"}, "model.fp16.safetensors and 1 more"),
        ({}, "has no model.safetensors, whole or in shards: give"),
        (
            {"model.safetensors.index.json": b'{"weight_map": {"a": "model-1.safetensors"}}'},
            "names model-1.safetensors, which the repository lacks",
        ),
        ({"model.safetensors.index.json": b"{}"}, "has no weight_map"),
        ({"model.safetensors.index.json": b"["}, "cannot be read"),
    ],
)
def test_repositories_without_weights_that_are_read(hub: Hub, files: dict[str, bytes], message: str) -> None:
    hub.add("owner/model", {"config.json": b"{}"} | files)
    with pytest.raises(CheckpointError, match=message):
        find_directory("owner/model")
    assert [file for file in hub.fetched() if not file.endswith(".json")] == []


def test_repositories_that_are_no_checkpoint(hub: Hub) -> None:
    hub.add("owner/quantised", {"model-q4.gguf": b"x", "README.md": b"x"})
    with pytest.raises(CheckpointError, match=r"has no config.json, .*not read: model-q4.gguf"):
        find_directory("owner/quantised")
    assert hub.fetched() == []
    hub.add("owner/adapter", {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"})
    with pytest.raises(CheckpointError, match=r"^owner/adapter: adapter_config.json: peft_type is None"):
        find_directory("owner/adapter")
    assert hub.fetched() == ["owner/adapter:adapter_config.json"]


def test_a_disk_that_is_too_small_is_told_before_the_download(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    hub.add("owner/model", SMALL | {"model.safetensors": bytes(5 << 20)})
    usage = shutil.disk_usage("/")._replace(free=4 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(WriteError, match=r"5.0 MiB to fetch, 4.0 MiB free on the disk of .*set HF_HOME"):
        find_directory("owner/model")
    assert hub.fetched() == ["owner/model:config.json"] and not said


@pytest.mark.parametrize(
    ("number", "message"), [(errno.ENOSPC, "is full: free some"), (errno.EROFS, "cannot be written")]
)
def test_a_disk_that_fails_underway(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, number: int, message: str
) -> None:
    hub.add("owner/model", SMALL)
    get = file_download.http_get

    def fail(url: str, *arguments: object, **options: object) -> None:
        if "model.safetensors" in url:
            raise OSError(number, os.strerror(number))
        get(url, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(file_download, "http_get", fail)
    with pytest.raises(WriteError, match=message):
        find_directory("owner/model")
    monkeypatch.setattr(file_download, "http_get", get)
    assert len(list(find_directory("owner/model").iterdir())) == 3


def test_ctrl_c_ends_every_download(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The library's workers would fetch their files to the end."""
    hub.add("owner/model", SMALL)
    started, ended = threading.Event(), threading.Event()

    def trickle(url: str, file: object, *, tqdm_class: type, **options: object) -> None:
        bar = tqdm_class(total=10)
        started.set()
        try:
            while not ended.wait(0.01):
                bar.update(1)
        except Exception:
            ended.set()
            raise

    def interrupted(futures: object) -> Iterator[object]:
        assert started.wait(200)
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch, "as_completed", interrupted)
    get = file_download.http_get
    monkeypatch.setattr(
        file_download,
        "http_get",
        lambda url, file, **options: (trickle if "model.saf" in url else get)(url, file, **options),
    )
    with pytest.raises(KeyboardInterrupt):
        find_directory("owner/model")
    assert ended.is_set()
    assert not list(tmp_path.rglob("*.incomplete"))


def test_a_refusal_is_one_line_and_leaves_nothing(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.txt").write_text("a\n")
    hub.add("owner/base", SMALL).gated = True
    command = [
        "capture",
        "owner/base",
        "--prompts",
        tmp_path / "x.txt",
        "--layer",
        1,
        "--out",
        "x.zarr",
        "--device",
        "cpu",
    ]
    check_refused(call(*command), r"owner/base: is gated: accept its licence at")
    check_refused(
        call("roundtrip", "x.zarr", "--av", "owner/av", "--ar", "x", "--out", "x.parquet"), "x.zarr"
    )
    offline(hub, monkeypatch)
    check_refused(call(*command), r"owner/base: no such directory; as a Hub id: the Hub cannot be", code=1)
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"config.json": b'{"quantization_config": {"quant_method": "gptq", "bits": 4}}'},
            "quantised .gptq, 4 bits",
        ),
        ({"adapter_config.json": b"{}"}, "has adapter_config.json beside other weights .model.safetensors"),
    ],
)
def test_a_form_that_is_not_run_is_refused_before_its_weights_are_fetched(
    hub: Hub, changed: dict[str, bytes], message: str
) -> None:
    hub.add("owner/model", {**SMALL, **changed})
    with pytest.raises(CheckpointError, match=f"^owner/model: .*{message}"):
        find_directory("owner/model")
    assert not any(path.endswith(".safetensors") for path in hub.fetched())
