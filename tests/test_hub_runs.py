"""Both stages and `verify` on the bundled models as repositories of a Hub, each command in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from commands import Ran, check_refused, shell, written
from stand_in_hub import Hub, serve
from test_hub import BALLAST

from nla_engine.demo import TRIO
from nla_engine.results import read_metadata
from nla_engine.store import CaptureStore

PROMPT = '{"messages": [{"role": "user", "content": "What is %d * %d?"}]}\n'
LAYER = 5


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve() as served:
        for name in ("base", "av", "ar"):
            served.add(f"owner/{name}", TRIO / name)
            served.repositories[f"owner/{name}"].files.update(BALLAST)
        yield served


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A working directory beside an empty home and the Hub's."""
    for name in ("here", "home"):
        (tmp_path / name).mkdir()
    written(tmp_path / "here" / "prompts.jsonl", "".join(PROMPT % (a, a + 3) for a in (12, 34, 56)))
    return tmp_path / "here"


def run(here: Path, hub: Hub, *arguments: object, **environment: str) -> Ran:
    beside = here.parent
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(beside / "hf"), "HOME": str(beside / "home")}
    return shell(*arguments, "--device", "cpu", cwd=here, env=clean | own | environment)


def capture(out: str) -> list[object]:
    return [
        *("capture", "owner/base", "--prompts", "prompts.jsonl", "--layer", LAYER, "--out", out),
        *("--max-new-tokens", 6),
    ]


@pytest.mark.slow
def test_both_stages_and_the_audit_run_on_repositories(hub: Hub, here: Path) -> None:
    ran = run(here, hub, *capture("run.zarr"))
    assert ran.code == 0, ran.err
    base = hub.repositories["owner/base"]
    assert f"owner/base (commit {base.commit[:12]}): 6 files, " in ran.err
    ran = run(
        here, hub, "roundtrip", "run.zarr", "--av", "owner/av", "--ar", "owner/ar", "--out", "x.parquet"
    )
    assert ran.code == 0, ran.err
    needed = {name: {p.name for p in (TRIO / name).iterdir()} for name in ("base", "av", "ar")}
    assert set(hub.fetched()) == {f"owner/{name}:{file}" for name, files in needed.items() for file in files}

    store = CaptureStore.open(here / "run.zarr")
    assert (store.provenance["model"], store.provenance["revision"]) == ("owner/base", base.commit)
    table, made = pq.read_table(here / "x.parquet"), read_metadata(here / "x.parquet")
    assert table.num_rows == store.rows > 0
    for name in ("av", "ar"):
        assert made["models"][name]["revision"] == hub.repositories[f"owner/{name}"].commit
    local = run(here, hub, *capture("local.zarr")[:1], TRIO / "base", *capture("local.zarr")[2:])
    assert local.code == 0, local.err
    assert (CaptureStore.open(here / "local.zarr").layer(LAYER)[:] == store.layer(LAYER)[:]).all()

    hub.add("owner/base", TRIO / "base").commit = "f" * 40  # since then, another commit
    hub.asked.clear()
    ran = run(here, hub, "verify", "run.zarr", "--model", "owner/base")
    assert ran.code == 0 and "sound" in ran.out, ran.err
    assert not [path for _, path in hub.asked if "owner" in path], (
        "the commit that was captured is in the cache"
    )

    ran = run(here, hub, *capture("again.zarr"), HF_ENDPOINT="http://127.0.0.1:9")
    assert ran.code == 0, ran.err
    assert f"taking commit {base.commit[:12]} from the cache" in ran.err

    beside = {p.name for p in here.parent.iterdir()}
    assert beside == {"here", "home", "hf"}
    assert {p.name for p in here.iterdir()} == {
        "prompts.jsonl",
        "run.zarr",
        "local.zarr",
        "again.zarr",
        "x.parquet",
    }
    assert not [p for p in here.parent.joinpath("home").rglob("*hugging*")]


def test_a_refusal_is_one_line_and_leaves_nothing(hub: Hub, here: Path) -> None:
    hub.repositories["owner/base"].gated = True
    check_refused(run(here, hub, *capture("x.zarr")), r"owner/base: is gated: accept its licence at")
    ran = run(here, hub, *capture("x.zarr"), HF_ENDPOINT="http://127.0.0.1:9")
    check_refused(ran, r"owner/base: no such directory; as a Hub id: the Hub cannot be reached", code=1)
    assert [p.name for p in here.iterdir()] == ["prompts.jsonl"]
