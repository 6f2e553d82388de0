"""Checkpoints from a Hub: which files are asked for, what is said, where the cache stands in, each fault's remedy."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import pytest
from commands import contents
from huggingface_hub import constants, file_download
from stand_in_hub import Hub, Repository, serve

from nla_engine import hub as package
from nla_engine.errors import CheckpointError, HubError, NLAError, RequestError, WriteError
from nla_engine.hub import commit_of, find, find_directory
from nla_engine.hub.files import choose

SMALL = {"config.json": b"{}", "tokenizer.json": b"[1]", "model.safetensors": b"weights" * 1000}
NO_IDS = ["", "x", "./x/y", "~nobody/x", "/no/x", "a/b/c", "a/b/", "a b/c", "a/..", "\0", "y" * 999]
#: What repositories carry along, and no one here reads.
BALLAST = {
    "README.md": b"# A model",
    ".gitattributes": b"*",
    "consolidated.safetensors": b"the weights again",
    "consolidated.00.pth": b"again",
    "model.fp16.safetensors": b"again",
    "pytorch_model.bin": b"again",
    "tf_model.h5": b"again",
    "flax_model.msgpack": b"again",
    "model.tflite": b"again",
    "model.gguf": b"again",
    "params.json": b"{}",
    "preprocessor_config.json": b"{}",
    "modeling_own.py": b"print()",
    "onnx/model.onnx": b"again",
    "original/consolidated.00.pth": b"again",
    "original/tokenizer.model": b"again",
    "images/plot.png": b"png",
}


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

    monkeypatch.setattr(package.fetch, "_announce", said.append)
    monkeypatch.setattr(package.fetch, "_progress", bar)
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


def forget(hub: Hub) -> None:
    """As in a new process."""
    find._commits.clear()
    hub.asked.clear()


def offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    forget(hub)


def test_what_is_loaded_is_fetched_and_nothing_else(hub: Hub, tmp_path: Path) -> None:
    beside = [
        "generation_config.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "tokenizer.model",
        "chat_template.jinja",
        "additional_chat_templates/tools.jinja",
        "nla_meta.yaml",
        "value_head.safetensors",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    loaded = SMALL | {file: f"{file}'s own bytes".encode() for file in beside}
    made = hub.add("owner/model", loaded | BALLAST)
    directory = find_directory("owner/model")
    assert hub.fetched() == sorted(f"owner/model:{file}" for file in loaded)
    assert {file: (directory / file).read_bytes() for file in loaded} == loaded
    held = {str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()}
    assert held == set(loaded)
    assert commit_of(directory) == made.commit
    assert not list((tmp_path / "here").iterdir())
    assert {p.name for p in tmp_path.iterdir()} == {"here", "cache"}


def test_shards_are_those_of_the_index(hub: Hub) -> None:
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {"weight_map": {"a": shards[0], "b": shards[1], "c": shards[0]}}
    files = {name: name.encode() for name in (*shards, "model-00001-of-00003.safetensors")}
    hub.add(
        "owner/big",
        {"config.json": b"{}", "model.safetensors.index.json": json.dumps(index).encode()} | files | BALLAST,
    )
    directory = find_directory("owner/big")
    assert sorted(p.name for p in directory.glob("*.safetensors")) == shards
    assert len(hub.fetched()) == len(set(hub.fetched())) == 4


def test_weights_are_chosen_as_transformers_does() -> None:
    both = ["config.json", "model.safetensors", "model.safetensors.index.json"]
    assert choose("o/n", both, lambda file: {}) == both[:2]
    config = {"transformers_weights": "other.safetensors"}
    assert "other.safetensors" in choose("o/n", [*both, "other.safetensors"], lambda file: config)


def test_every_tokenizer_file_that_transformers_names_is_fetched() -> None:
    """Of decoders: transformers' own tables say which files their tokenizers read."""
    from transformers.models.auto import modeling_auto, tokenization_auto

    seen: set[str] = set()
    for model in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        kind = tokenization_auto.TOKENIZER_MAPPING_NAMES.get(model)
        one = tokenization_auto.tokenizer_class_from_name(kind) if isinstance(kind, str) else None
        try:
            files = getattr(one, "vocab_files_names", {}).values()
        except ImportError:
            continue  # a tokenizer of a package that is not installed
        seen |= set(files)
    assert {"tokenizer.json", "merges.txt", "tokenizer.model"} <= seen
    assert seen <= set(choose("o/n", ["config.json", "model.safetensors", *seen], lambda file: {}))


def test_python_files_only_when_they_may_run(hub: Hub) -> None:
    hub.add("owner/model", SMALL | {"modeling_own.py": b"x = 1", "own/part.py": b"y = 2"})
    assert not list(find_directory("owner/model").rglob("*.py"))
    found = find_directory("owner/model", remote_code=True).rglob("*.py")
    assert sorted(p.name for p in found) == ["modeling_own.py", "part.py"]


def test_size_is_said_before_and_progress_adds_up_to_it(
    hub: Hub, said: list[str], steps: list[tuple[str, int, int]]
) -> None:
    made = hub.add("owner/model", SMALL | {"model.safetensors": os.urandom(3 << 20)})
    find_directory("owner/model")
    (line,) = said
    assert (
        line
        == f"owner/model (commit {made.commit[:12]}): 3 files, 3.0 MiB; 3.0 MiB to fetch, 0.0 MiB in the cache"
    )
    assert {(unit, total) for unit, _, total in steps} == {("MiB", 3)}
    done = [done for _, done, _ in steps]
    assert done == sorted(done) and done[-1] == 3


def test_another_commit_brings_only_what_changed(hub: Hub, said: list[str]) -> None:
    hub.add("owner/model", SMALL)
    first = find_directory("owner/model")
    hub.add("owner/model", SMALL | {"tokenizer.json": b"[1, 2]"})
    forget(hub)
    second = find_directory("owner/model")
    assert hub.fetched() == ["owner/model:tokenizer.json"] and first != second
    assert "0.0 MiB to fetch" in said[-1]
    assert (second / "model.safetensors").read_bytes() == SMALL["model.safetensors"]


def test_one_process_reads_one_commit(hub: Hub) -> None:
    """A sidecar and the weights it describes are found one after the other: the repository may change in between."""
    hub.add("owner/av", SMALL)
    first = find_directory("owner/av")
    hub.add("owner/av", SMALL | {"model.safetensors": b"retrained"})
    hub.asked.clear()
    assert find_directory("owner/av") == first and not hub.asked
    forget(hub)
    assert find_directory("owner/av") != first


def test_a_commit_that_is_whole_needs_no_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    made = hub.add("owner/model", SMALL)
    first = find_directory("owner/model")
    forget(hub)
    assert find_directory("owner/model", made.commit) == first and not hub.asked


def test_broken_connections_resume(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    made = hub.add("owner/model", SMALL)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    made.breaks["model.safetensors"] = (3000, 2)
    directory = find_directory("owner/model")
    assert (directory / "model.safetensors").read_bytes() == SMALL["model.safetensors"]
    assert hub.ranges == ["model.safetensors bytes=3000-", "model.safetensors bytes=6000-"]


def test_a_download_that_was_cut_off_goes_on_with_the_files_that_are_there(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    made = hub.add("owner/model", SMALL)
    made.breaks["model.safetensors"] = (0, 99)
    with pytest.raises(HubError, match=r"^owner/model: the Hub cannot be reached .*the same command goes on"):
        find_directory("owner/model")
    made.breaks.clear()
    forget(hub)
    with monkeypatch.context() as there:  # what is there is not taken for the whole
        there.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(HubError, match=r"its snapshot in the cache lacks model.safetensors \(1 of 3"):
            find_directory("owner/model")
    hub.asked.clear()
    directory = find_directory("owner/model")
    assert hub.fetched() == ["owner/model:model.safetensors"]
    assert (directory / "model.safetensors").read_bytes() == SMALL["model.safetensors"]


@pytest.mark.parametrize("how", ["no network", "HF_HUB_OFFLINE", "503", "429"])
def test_the_cache_stands_in_and_it_is_said(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, said: list[str], how: str
) -> None:
    made = hub.add("owner/model", SMALL | BALLAST)
    online = find_directory("owner/model")
    said.clear()
    forget(hub)
    if how == "no network":
        offline(hub, monkeypatch)
    elif how == "HF_HUB_OFFLINE":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        made.fault = (int(how), "", "not now")
    assert find_directory("owner/model") == online
    assert len(said) == 1 and how.removeprefix("no network") in said[0]
    assert said[0].endswith(f"taking commit {made.commit[:12]} from the cache")


@pytest.mark.parametrize("harm", ["missing", "short", "shard", "index", "list"])
def test_a_snapshot_that_is_not_whole_is_never_taken_for_it(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, harm: str, tmp_path: Path
) -> None:
    index = json.dumps({"weight_map": {"a": "model-1.safetensors"}}).encode()
    hub.add(
        "owner/model",
        {
            "config.json": b"{}",
            "chat_template.jinja": b"{{ m }}",
            "model.safetensors.index.json": index,
            "model-1.safetensors": b"xyz",
        },
    )
    directory = find_directory("owner/model")
    files = {"missing": "chat_template.jinja", "short": "model-1.safetensors", "shard": "model-1.safetensors"}
    file = directory / files.get(harm, "model.safetensors.index.json")
    before = file.read_bytes()
    if harm == "short":
        file.resolve().write_bytes(b"x")
    elif harm == "list":
        shutil.rmtree(directory.parent.parent / "trees")
        huggingface_hub._tree_cache._IN_MEMORY_TREE_CACHE.clear()
    else:
        file.resolve().unlink()  # the link of the snapshot leads nowhere
    expected = f"lacks {file.name}" if harm != "list" else rf"if it is, give the directory {directory}$"
    with monkeypatch.context() as there:
        offline(hub, there)
        with pytest.raises(HubError, match=expected):
            find_directory("owner/model")
    forget(hub)
    assert find_directory("owner/model") == directory  # mended as soon as there is a network
    assert file.read_bytes() == before


def test_a_read_only_cache_serves(hub: Hub, tmp_path: Path) -> None:
    hub.add("owner/model", SMALL)
    first = find_directory("owner/model")
    before = contents(tmp_path / "cache")
    for path in [*(tmp_path / "cache").rglob("*"), tmp_path / "cache"]:
        if path.is_dir():
            path.chmod(0o555)
    try:
        forget(hub)
        assert find_directory("owner/model") == first
    finally:
        for path in [tmp_path / "cache", *(tmp_path / "cache").rglob("*")]:
            if path.is_dir():
                path.chmod(0o755)
    assert contents(tmp_path / "cache") == before


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
    assert len(list(find_directory("owner/adapter").iterdir())) == 2


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
            for _ in range(1000):
                bar.update(1)
                ended.wait(0.01)
        except Exception:
            ended.set()
            raise

    def interrupted(futures: object) -> Iterator[object]:
        started.wait(20)
        raise KeyboardInterrupt

    monkeypatch.setattr(package.fetch, "as_completed", interrupted)
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
