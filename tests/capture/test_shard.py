"""Parts of a run: each job its own, started again at will; together they are the run of one job, row by row."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from commands import Ran, call, capture, check_refused, contents, json_lines
from tiny import save_model

from nla_engine.capture.run import run_capture
from nla_engine.config import CaptureOptions
from nla_engine.errors import NLAError
from nla_engine.shard import Shard
from nla_engine.store import CaptureStore
from nla_engine.store.care.verify import verify

ROOT = Path(__file__).parent.parent.parent
DOC = (ROOT / "docs" / "cluster.md").read_text()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shards")
    save_model(directory / "base")
    rng = np.random.default_rng(0)
    records = [{"prompt": "word " * int(rng.integers(1, 9)) + str(n), "n": n} for n in range(11)]
    json_lines(directory / "prompts.jsonl", records)
    texts = [{"text": "some text " * int(rng.integers(1, 30)) + str(n)} for n in range(7)]
    json_lines(directory / "texts.jsonl", texts)
    return directory


def run(base: Path, out: Path, **changes: object) -> Ran:
    return call(*capture(base, out, **{"dtype": "float32", **changes}))


def same_rows(first: CaptureStore, second: CaptureStore, limit: float) -> None:
    """Sequence by sequence: the same tokens and records, and rows within `limit` (relative L2)."""
    assert all(check.ok for check in verify(second.path)), second.path
    assert (first.sequences, first.rows, second.complete) == (second.sequences, second.rows, True)
    for one, other in zip(first.iter_sequences(), second.iter_sequences(), strict=True):
        assert (one.number, one.record, one.finish) == (other.number, other.record, other.finish)
        assert one.tokens.tolist() == other.tokens.tolist()
        for name in first.arrays("rows"):
            ours, theirs = first.column(name)[one.rows], second.column(name)[other.rows]
            close = np.allclose(ours, theirs, atol=1e-4) if ours.dtype.kind == "f" else (ours == theirs).all()
            assert close or (name == "next_logprob" and np.allclose(ours, theirs, atol=1e-4, equal_nan=True))
        for site in first.sites:
            x, y = first.layer(site)[one.rows], second.layer(site)[other.rows]
            assert (np.linalg.norm(x - y, axis=1) <= limit * np.linalg.norm(x, axis=1)).all()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"replies": 3, "temperature": 1.0, "seed": 5},
        {"corpus": True, "long": "windows", "max_tokens": 40, "per_document": 9, "prompts": "texts.jsonl"},
        {"sites": "resid_post,attn_out", "next_token": 2, "positions": "all"},
    ],
    ids=["plain", "replies", "windows", "sites"],
)
def test_parts_are_the_run_of_one_job(base: Path, tmp_path: Path, changes: dict) -> None:
    changes = {"codec": "bf16", **changes}
    if name := changes.pop("prompts", None):
        changes |= {"prompts": base / name, "max_new_tokens": None}
    assert run(base, tmp_path / "whole.zarr", **changes).code == 0
    for part in (3, 1, 2):
        ran = run(base, tmp_path / "run.zarr", shard=f"{part}/3", **changes)
        assert ran.code == 0, ran.err
    parts = [tmp_path / f"run.{part}-of-3.zarr" for part in (2, 3, 1)]
    stores = [CaptureStore.open(path) for path in parts]
    together = "nla_reply" if "replies" in changes else "nla_window"
    field = "prompt" if "replies" in changes else "document"
    origins = [
        {s.source.get(together, {}).get(field, s.number) for s in each.iter_sequences()} for each in stores
    ]
    assert sum(map(len, origins)) == len(set.union(*origins)), "what belongs together is in one part"
    assert max(map(len, origins)) - min(map(len, origins)) <= 1
    merged = call("merge", *parts, "--out", tmp_path / "run.zarr")
    assert merged.code == 0, merged.err
    whole, joined = CaptureStore.open(tmp_path / "whole.zarr"), CaptureStore.open(tmp_path / "run.zarr")
    same_rows(whole, joined, 0.01)  # two roundings to bfloat16 apart at most
    assert joined.options == whole.options, "a later --resume takes it for the whole run"
    assert joined.sink_norm == whole.sink_norm and joined.codec_error == whole.codec_error


def test_a_finished_part_is_left_as_it_is_and_an_unfinished_one_goes_on(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, part = tmp_path / "run.zarr", tmp_path / "run.2-of-2.zarr"
    options = CaptureOptions(
        model=str(base / "base"), prompts=(base / "prompts.jsonl",), layer=2, out=str(out), shard="2/2",
        max_new_tokens=4, device="cpu", dtype="float32", batch_size=1, host_memory=1e-4,
    )  # fmt: skip

    def stop(done: int, total: int) -> None:
        if done >= 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("nla_engine.capture.run._LOOK_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        run_capture(options, progress=stop)
    held = CaptureStore.open(part)
    assert not held.complete and 0 < held.sequences < 5
    assert run(base, out, shard="1/2").code == 0
    check_refused(call("merge", part, tmp_path / "run.1-of-2.zarr", "--out", out), "part 2/2 is not finished")
    assert run(base, out, shard="2/2", batch_size=3).code == 0
    assert CaptureStore.open(part).complete
    before = contents(part)
    again = run(base, out, shard="2/2")
    assert (again.code, again.out) == (0, "") and again.err.count("\n") == 1, again.err
    assert "part 2/2 is finished: nothing to do" in again.err
    told = run(base, out, shard="2/2", json=True)
    assert told.code == 0 and told.json["sequences"] == 5 and told.json["tokens_generated"] == 0
    assert contents(part) == before
    check_refused(run(base, out, shard="2/2", seed=9), "other options: seed was 0, is now 9")
    other = json_lines(tmp_path / "other.jsonl", [{"prompt": f"else {n}"} for n in range(11)])
    check_refused(run(base, out, shard="2/2", prompts=other), "other options: the content of prompts differs")
    assert call("merge", tmp_path / "run.1-of-2.zarr", part, "--out", out).code == 0
    assert CaptureStore.open(out).numbers.tolist() == list(range(11))


def test_more_parts_than_prompts_and_a_dry_run(base: Path, tmp_path: Path) -> None:
    few = json_lines(tmp_path / "few.jsonl", [{"prompt": "one"}, {"prompt": "two"}])
    estimate = run(base, tmp_path / "run.zarr", prompts=few, shard="2/4", dry_run=True, json=True)
    assert estimate.code == 0 and estimate.json["sequences"] == 1 and not list(tmp_path.glob("*.zarr"))
    for part in range(1, 5):
        ran = run(base, tmp_path / "run.zarr", prompts=few, shard=f"{part}/4", json=True)
        assert ran.code == 0 and ran.json["sequences"] == (part <= 2), ran.err
    assert call("merge", *tmp_path.glob("*.zarr"), "--out", tmp_path / "all.zarr").code == 0
    assert CaptureStore.open(tmp_path / "all.zarr").sequences == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("0/4", "'0/4': the parts of 4 are 1/4 to 4/4"),
        ("5/4", "'5/4': the parts of 4 are 1/4 to 4/4"),
        ("1/0", "'1/0': there is at least one part"),
        *[
            (text, "such as 3/8")
            for text in ("", "3", "a/b", "1/2/3", "-1/4", "1.5/2", " 1/2", "1/" + "9" * 20)
        ],
    ],
)
def test_shards_that_are_none(base: Path, tmp_path: Path, given: str, message: str) -> None:
    check_refused(run(base, tmp_path / "run.zarr", shard=given), re.escape(message))
    assert not list(tmp_path.iterdir())


def test_a_bucket_has_nothing_beside_it() -> None:
    with pytest.raises(NLAError, match="--shard: beside s3://bucket there is no place"):
        CaptureOptions(model="m", prompts=(Path("p"),), layer=1, out="s3://bucket", shard="1/2")
    assert Shard(3, 8).name("s3://bucket/deep/run.zarr") == "s3://bucket/deep/run.3-of-8.zarr"


def test_what_merge_refuses_by_name(base: Path, tmp_path: Path) -> None:
    for part in (1, 2, 3):
        assert run(base, tmp_path / "run.zarr", shard=f"{part}/3").code == 0
    assert run(base, tmp_path / "else.zarr", shard="2/3", seed=1).code == 0
    assert run(base, tmp_path / "else.zarr", shard="1/2").code == 0
    assert run(base, tmp_path / "whole.zarr").code == 0
    texts = json_lines(tmp_path / "p.jsonl", [{"prompt": f"else {n}"} for n in range(11)])
    assert run(base, tmp_path / "texts.zarr", shard="2/3", prompts=texts).code == 0
    a, b, c = (tmp_path / f"run.{part}-of-3.zarr" for part in (1, 2, 3))
    shutil.copytree(b, tmp_path / "copy.zarr")
    assert run(base, tmp_path / "twin.zarr", shard="2/3").code == 0
    out = tmp_path / "out.zarr"
    for given, message in (
        ((a, c), "part 2/3 is missing"),
        ((c,), "parts 1/3, 2/3 are missing"),
        ((a, b, c, tmp_path / "twin.2-of-3.zarr"), "part 2/3 is given twice"),
        ((a, b, c, tmp_path / "copy.zarr"), "is given twice, or as a copy"),
        ((a, tmp_path / "else.2-of-3.zarr", c), r"else.2-of-3.zarr: other parameters .*seed was 0, is now 1"),
        ((a, tmp_path / "texts.2-of-3.zarr", c), "other parameters .*the content of prompts differs"),
        ((a, b, c, tmp_path / "else.1-of-2.zarr"), "is part 1/2, and .*is part 1/3"),
        ((a, b, c, tmp_path / "whole.zarr"), "whole.zarr: is no part of a run"),
    ):
        check_refused(call("merge", *given, "--out", out), message)
        assert not out.exists()
    assert call("merge", c, a, b, "--out", out).code == 0


def test_the_scripts_of_the_page_for_slurm(base: Path, tmp_path: Path) -> None:
    """Their bodies, run as Slurm would, one task twice: what they call is then called here."""
    scripts = re.findall(r"```bash\n(#!/bin/bash\n.*?)```", DOC, re.DOTALL)
    assert len(scripts) == 2 and all("#SBATCH" in script for script in scripts)
    places = {"MODEL": base / "base", "PROMPTS": base / "prompts.jsonl", "OUT": tmp_path / "run.zarr"}
    given = {**{key: str(value) for key, value in places.items()}, "LAYER": "2"}
    given |= {"CAPTURE": "--max-new-tokens 4 --device cpu", "SLURM_ARRAY_TASK_COUNT": "3"}
    asked, command = tmp_path / "asked", tmp_path / "bin" / "nla-engine"
    command.parent.mkdir()
    command.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" > {asked}\n")
    command.chmod(0o755)
    path = f"{command.parent}:{os.environ['PATH']}"
    for script, task in (
        (scripts[0], "3"),
        (scripts[0], "1"),
        (scripts[0], "2"),
        (scripts[0], "1"),
        (scripts[1], ""),
    ):
        subprocess.run(
            ["bash", "-c", script], env={**given, "PATH": path, "SLURM_ARRAY_TASK_ID": task}, check=True
        )
        ran = call(*asked.read_text().splitlines())
        assert ran.code == 0, ran.err
    store = CaptureStore.open(tmp_path / "run.zarr")
    assert store.complete and store.sequences == 11
    assert json.loads(next(store.iter_sequences()).record)["n"] == 0
