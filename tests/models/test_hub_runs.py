"""Both stages and `verify` on the bundled models as repositories of a Hub, each command in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from commands import Ran, call, shell, written
from stand_in_hub import BALLAST, Hub, serve

from nla_engine.demo.run import TRIO
from nla_engine.roundtrip.results import read_metadata
from nla_engine.store import CaptureStore

PROMPT = '{"messages": [{"role": "user", "content": "What is %d * %d?"}]}\n'
LAYER = 5


@pytest.fixture
def trio() -> Iterator[Hub]:
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


def capture(model: object, out: object, prompts: object = "prompts.jsonl") -> list[object]:
    return [
        *("capture", model, "--prompts", prompts, "--layer", LAYER, "--out", out),
        *("--max-new-tokens", 6),
    ]


@pytest.mark.slow
def test_both_stages_and_the_audit_run_on_repositories(trio: Hub, here: Path) -> None:
    ran = run(here, trio, *capture("owner/base", "run.zarr"))
    assert ran.code == 0, ran.err
    base = trio.repositories["owner/base"]
    assert f"owner/base (commit {base.commit[:12]}): 6 files, " in ran.err
    ran = run(
        here, trio, "roundtrip", "run.zarr", "--av", "owner/av", "--ar", "owner/ar", "--out", "x.parquet",
        "--max-new-tokens", 12,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    needed = {name: {p.name for p in (TRIO / name).iterdir()} for name in ("base", "av", "ar")}
    assert set(trio.fetched()) == {f"owner/{name}:{file}" for name, files in needed.items() for file in files}

    store = CaptureStore.open(here / "run.zarr")
    assert (store.provenance["model"], store.provenance["revision"]) == ("owner/base", base.commit)
    table, made = pq.read_table(here / "x.parquet"), read_metadata(here / "x.parquet")
    assert table.num_rows == store.rows > 0
    for name in ("av", "ar"):
        assert made[f"{name}_revision"] == trio.repositories[f"owner/{name}"].commit
    local = call(*capture(TRIO / "base", here / "local.zarr", here / "prompts.jsonl"), "--device", "cpu")
    assert local.code == 0, local.err
    assert (CaptureStore.open(here / "local.zarr").layer(LAYER)[:] == store.layer(LAYER)[:]).all()

    # the commit that was captured, not today's: it is in the cache, and nobody is asked for it
    ran = run(here, trio, "verify", "run.zarr", "--model", "owner/base", HF_ENDPOINT="http://127.0.0.1:9")
    assert ran.code == 0 and "sound" in ran.out, ran.err

    beside = {p.name for p in here.parent.iterdir()}
    assert beside == {"here", "home", "hf"}
    assert {p.name for p in here.iterdir()} == {
        "prompts.jsonl",
        "run.zarr",
        "local.zarr",
        "x.parquet",
    }
    assert not list(here.parent.joinpath("home").rglob("*hugging*"))
