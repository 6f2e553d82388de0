"""Checkpoints from a Hub: which files are asked for, what is said, what is resumed, where the cache stands in."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from commands import contents
from huggingface_hub import constants, file_download
from rich.console import Console
from stand_in_hub import BALLAST, SMALL, Hub, forget, offline

from nla_engine.cli import progress
from nla_engine.errors import CheckpointError, HubError
from nla_engine.models.hub import commit_of, find_directory
from nla_engine.models.hub.files import choose


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
    with pytest.raises(
        CheckpointError, match=r"config.json names other.safetensors, which the repository lacks"
    ):
        choose("o/n", both, lambda file: config)


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
    with pytest.raises(
        HubError, match=r"^owner/model: the Hub cannot be reached .*the same command continues"
    ):
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


def test_a_bar_may_stand_in_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model is fetched while the bar of the stage waits."""
    terminal = Console(file=io.StringIO(), force_terminal=True, width=100)
    monkeypatch.setattr(progress, "console", terminal)
    with progress.progress_bar("sequences") as outer:
        outer(1, 9)
        with progress.progress_bar("MiB") as inner:
            inner(3, 7)
        outer(2, 9)
    shown = terminal.file.getvalue()  # type: ignore[attr-defined]
    assert shown.index("1 of 9") < shown.index("3 of 7") < shown.index("2 of 9")
