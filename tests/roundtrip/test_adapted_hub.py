"""Adapters in folders of a Hub repository: what is fetched, which commits are recorded, what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from commands import LAYER, call, check_refused, roundtrip
from safetensors.torch import load_file
from stand_in_hub import Hub, offline
from tiny import save_ar

from nla_engine.errors import CheckpointError
from nla_engine.models.hub import commit_of, find_directory
from nla_engine.models.source import find_source
from nla_engine.roundtrip.results import read_metadata


def test_a_pickled_head_on_the_hub_is_named(hub: Hub, adapted: Path, tmp_path: Path) -> None:
    save_ar(tmp_path / "ar", LAYER)
    torch.save(load_file(tmp_path / "ar" / "value_head.safetensors"), tmp_path / "ar" / "value_head.pt")
    (tmp_path / "ar" / "value_head.safetensors").unlink()
    hub.add("owner/ar", tmp_path / "ar")
    ran = call(*roundtrip(adapted, tmp_path / "x.parquet", ar="owner/ar"))
    assert ran.code == 2 and re.search(
        r"value_head.pt in owner/ar is pickled.*: fetch owner/ar into a directory .*convert_head value_head.pt",
        ran.err,
    )
    assert not any(path.endswith(".pt") for path in hub.fetched())


@pytest.fixture
def shared(hub: Hub, adapted: Path) -> Hub:
    """One repository with AV and AR in folders and files beside, and their base."""
    hub.add("owner/base", adapted / "base")
    files = {"README.md": b"# A pair", "old/model.safetensors": b"x"}
    for name in ("av", "ar"):
        for path in (adapted / name).iterdir():
            files[f"{name}/{path.name}"] = path.read_bytes()
    held = json.loads(files["av/adapter_config.json"]) | {"base_model_name_or_path": "owner/base"}
    files["av/adapter_config.json"] = json.dumps(held).encode()
    hub.add("owner/pair", files)
    return hub


def test_a_folder_of_a_repository_is_fetched_alone_and_its_base_with_it(
    shared: Hub, adapted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = find_source("owner/pair/av")
    assert set(shared.fetched()) == {
        *(
            f"owner/pair:av/{name}"
            for name in ("adapter_config.json", "adapter_model.safetensors", "nla_meta.yaml")
        ),
        *(f"owner/base:{path.name}" for path in (adapted / "base").iterdir()),
    }
    assert source.revision == shared.repositories["owner/pair"].commit
    assert source.origin()["base_revision"] == shared.repositories["owner/base"].commit
    out = tmp_path / "x.parquet"
    command = roundtrip(adapted, out, av="owner/pair/av", ar="owner/pair/ar", ar_base="owner/base")
    local = roundtrip(adapted, tmp_path / "y.parquet", ar_base=adapted / "base")
    for ran in (call(*command), call(*local)):
        assert ran.code == 0, ran.err
    found, wanted = (pq.read_table(tmp_path / f"{name}.parquet")["explanation"] for name in "xy")
    assert found == wanted
    metadata = read_metadata(out)
    assert metadata["ar_revision"] == source.revision and metadata["ar_base_revision"] == commit_of(
        source.weights
    )
    offline(shared, monkeypatch)
    assert find_source("owner/pair/av") == source


def test_the_revision_of_the_base_is_respected(shared: Hub) -> None:
    files = shared.repositories["owner/pair"].files
    held = json.loads(files["av/adapter_config.json"])
    files["av/adapter_config.json"] = json.dumps(held | {"revision": "v9"}).encode()
    ran = call("roundtrip", "x", "--av", "owner/pair/av")
    assert ran.code == 2
    with pytest.raises(
        CheckpointError, match="owner/base: has no revision 'v9'.*pass --base if you have it elsewhere"
    ):
        find_source("owner/pair/av")


def test_folders_that_are_none_or_have_no_model_are_named(
    shared: Hub, adapted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(name: str, message: str) -> None:
        check_refused(
            call(*roundtrip(adapted, tmp_path / "x.parquet", av=name, ar_base=adapted / "base")), message
        )

    refused("owner/pair/actor", "owner/pair has no folder actor: it has ar, av, old")
    refused(
        "owner/pair", "has no config.json itself, its folders have: give one of them, such as owner/pair/ar"
    )
    refused("owner/pair/old", "owner/pair/old: this repository has no config.json")
    refused("owner/none/av", "owner/none/av: no such directory|owner/none: no such directory")
    find_directory("owner/pair/av")
    offline(shared, monkeypatch)
    ran = call(*roundtrip(adapted, tmp_path / "x.parquet", av="owner/pair/av", ar_base=adapted / "base"))
    notice, error = ran.err.splitlines()
    assert ran.code == 2 and notice.startswith("owner/pair/av: the Hub cannot be reached")
    assert error.startswith(
        "error: owner/pair/av: is an adapter, and the base that adapter_config.json names cannot"
    )
    assert ": owner/base: no such directory" in error and "; pass --av-base if you have it elsewhere" in error
    assert not (tmp_path / "x.parquet").exists()
