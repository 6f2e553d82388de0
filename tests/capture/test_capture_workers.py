"""A capture in several processes gives what one process gives, row by row, whatever dies. Stores are read by bare zarr.

NLA_KILL_ROUNDS: how often a run with killed workers, and a killed run, is repeated, each time with other prompts.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from commands import call, capture, check_refused
from tiny import save_model, write_records
from worker_faults import HeldWork, Killer

from nla_engine.capture import run as running
from nla_engine.capture.appender import Appender
from nla_engine.capture.run import run_capture
from nla_engine.capture.summary import CaptureSummary
from nla_engine.config import CaptureOptions
from nla_engine.errors import RequestError
from nla_engine.models.load import load_model

Sequence = dict[str, Any]
ROUNDS = range(int(os.environ.get("NLA_KILL_ROUNDS", "1")))

#: But not in the command that is killed: it starts its own.
pytestmark = pytest.mark.usefixtures("forked_workers")


def by_number(path: Path) -> dict[int, Sequence]:
    """Everything that a store of codec bf16 has of each sequence, by its number."""
    group = zarr.open_group(path, mode="r")
    at = {name: array[:] for name, array in group["sequences"].arrays()}
    rows = {name: array[:] for name, array in group["rows"].arrays()}
    sites = {
        name: (part["codes"][:].astype(np.uint32) << 16).view(np.float32)
        for name, part in group.groups()
        if "codes" in part
    }
    told: dict[int, Sequence] = {}
    for i, number in enumerate(at["number"].tolist()):
        mine = slice(at["row_start"][i], at["row_start"][i] + at["row_size"][i])
        source = slice(at["source_start"][i], at["source_start"][i] + at["source_size"][i])
        tokens = slice(at["token_start"][i], at["token_start"][i] + at["token_size"][i])
        exact: Sequence = {
            name: rows[name][mine] for name in ("token_id", "next_token_id", "position", "flags")
        }
        exact |= {"tokens": at["tokens"][tokens], "source": at["source"][source].tobytes()}
        exact |= {"finish": at["finish"][i], "prompt_size": at["prompt_size"][i]}
        near = {name: codes[mine] for name, codes in sites.items()}
        near |= {name: values[mine] for name, values in rows.items() if "logprob" in name}
        assert number not in told and (rows["sequence"][mine] == number).all()
        told[number] = {"exact": exact, "near": near}
    return told


def check_same(one: Path, many: Path) -> int:
    """The same tokens; rows within the rounding of another batch, and of bfloat16. Returns the rows."""
    expected, got = by_number(one), by_number(many)
    assert sorted(got) == sorted(expected) and expected
    for number, sequence in expected.items():
        for name, value in sequence["exact"].items():
            np.testing.assert_array_equal(got[number]["exact"][name], value, f"{number}: {name}")
        assert got[number]["near"].keys() == sequence["near"].keys()
        for name, value in sequence["near"].items():
            np.testing.assert_allclose(got[number]["near"][name], value, 2**-7, 1e-3, err_msg=name)
    return sum(len(sequence["exact"]["position"]) for sequence in expected.values())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("workers") / "base")


def options(directory: Path, base: Path, out: str, **changes: Any) -> CaptureOptions:
    given: dict[str, Any] = {"layer": (0, 2), "codec": "bf16", "max_new_tokens": 24, "device": "cpu"}
    given |= {"model": str(base), "prompts": directory / "p.jsonl", "out": str(directory / out)}
    return CaptureOptions(**{**given, **changes})


def write(directory: Path, rng: np.random.Generator, count: int, most: int = 60) -> None:
    texts = ["".join(map(chr, rng.integers(97, 123, size))) for size in rng.integers(1, most, count)]
    write_records(directory, [{"prompt": text, "n": n} for n, text in enumerate(texts)])


def both(directory: Path, base: Path, workers: int, **changes: Any) -> tuple[CaptureSummary, int, list[str]]:
    """The same capture in one process and in several, compared. Returns the latter's summary, rows and lines."""
    lines: list[str] = []
    run_capture(options(directory, base, "one.zarr", **changes))
    many = options(directory, base, "many.zarr", workers=workers, **changes)
    summary = run_capture(many, announce=lines.append)
    rows = check_same(directory / "one.zarr", directory / "many.zarr")
    assert summary.rows == rows and summary.workers == workers
    assert len(set(lines)) == len(lines), "no line is said twice"
    return summary, rows, lines


@pytest.mark.parametrize("number", ROUNDS)
def test_three_workers_of_which_some_die(
    number: int, tmp_path: Path, base: Path, rng: np.random.Generator, killer: Killer
) -> None:
    """At most two deaths, so that no sequence can be lost three times. So many sequences are handed out in more ranges
    than there are processes that get only one."""
    write(tmp_path, rng, 40)
    deaths = killer.left = int(rng.integers(1, 3))
    summary, rows, lines = both(tmp_path, base, 3, batch_size=4, positions="all")
    assert rows > 40
    assert summary.workers_lost == len(killer.killed) == deaths, lines
    assert sum("killed by SIGKILL" in line for line in lines) == deaths
    again = summary.sequences_again
    assert again > 0 and json.loads(json.dumps(summary.to_dict()))["sequences_again"] == again


def test_fewer_prompts_than_workers(tmp_path: Path, base: Path, rng: np.random.Generator) -> None:
    """The others load no model; resumed, as many run as there are prompts left."""
    write(tmp_path, rng, 3)
    run_capture(options(tmp_path, base, "one.zarr"))
    lines: list[str] = []
    summary = run_capture(options(tmp_path, base, "many.zarr", workers=20), announce=lines.append)
    check_same(tmp_path / "one.zarr", tmp_path / "many.zarr")
    assert summary.workers == 3 and "3 sequences: 3 of 20 workers have work" in lines
    assert (
        zarr.open_group(tmp_path / "many.zarr").attrs["nla_engine"]["provenance"]["device"] == "cpu, cpu, cpu"
    )
    lines.clear()
    again = run_capture(options(tmp_path, base, "many.zarr", workers=3, resume=True), announce=lines.append)
    assert again.workers == 1 and again.rows == summary.rows


def test_sampled_replies_with_all_that_can_be_chosen(
    tmp_path: Path, base: Path, rng: np.random.Generator
) -> None:
    write(tmp_path, rng, 9)
    chosen = {"sites": ("resid_post", "mlp_out"), "next_token": 3, "tokens": "[a-z0-9 ]", "skip_sinks": True}
    sampled = {"temperature": 1.0, "replies": 3, "seed": 5, "per_document": 9, "top_k": 50}
    both(tmp_path, base, 2, positions="prompt,generated", host_memory=0.001, **chosen, **sampled)


@pytest.mark.slow
def test_documents_in_windows(tmp_path: Path, base: Path, rng: np.random.Generator) -> None:
    """Rows are drawn of a document's windows together, which may be with different workers."""
    write(tmp_path, rng, 12, most=200)
    given = {"corpus": True, "max_tokens": 32, "long": "windows", "per_document": 20}
    both(tmp_path, base, 2, max_new_tokens=0, **given)


@pytest.mark.slow
def test_library(tmp_path: Path, base: Path, rng: np.random.Generator) -> None:
    write(tmp_path, rng, 8)
    both(tmp_path, base, 2, kernels="library", max_new_tokens=6)


def test_interrupted_and_resumed_by_others(
    tmp_path: Path, base: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while a worker is in the middle of sequences: what came is committed, what has not ended is kept beside,
    and one process goes on."""
    write(tmp_path, rng, 90)
    append = Appender._append

    def interrupts(self: Appender, *given: Any) -> None:
        append(self, *given)
        end = time.monotonic() + 200
        while not list(tmp_path.glob("held-*")) and time.monotonic() < end:
            time.sleep(0.01)
        signal.raise_signal(signal.SIGINT)

    run_capture(options(tmp_path, base, "one.zarr", positions="all"))
    given = options(tmp_path, base, "many.zarr", positions="all", workers=2, batch_size=3, keep_partial=True)
    with monkeypatch.context() as patch:
        patch.setattr(Appender, "_append", interrupts)
        patch.setattr(running, "CaptureWork", HeldWork)
        with pytest.raises(KeyboardInterrupt):
            run_capture(given)
    there = by_number(tmp_path / "many.zarr")
    assert 0 < len(there) < 90
    partial = by_number(tmp_path / "many.partial.zarr")
    assert partial and not partial.keys() & there.keys()
    expected = by_number(tmp_path / "one.zarr")
    for number, sequence in partial.items():
        tokens = sequence["exact"]["tokens"]
        np.testing.assert_array_equal(tokens, expected[number]["exact"]["tokens"][: len(tokens)])
    run_capture(options(tmp_path, base, "many.zarr", positions="all", resume=True))
    check_same(tmp_path / "one.zarr", tmp_path / "many.zarr")


@pytest.mark.slow
@pytest.mark.parametrize("number", ROUNDS)
def test_killed_and_resumed_by_more(
    number: int, tmp_path: Path, base: Path, rng: np.random.Generator
) -> None:
    """SIGKILL of the run itself at a random time leaves no worker, and a store that more workers finish."""
    write(tmp_path, rng, 60)
    run_capture(options(tmp_path, base, "one.zarr"))
    out = tmp_path / "many.zarr"
    command = capture(
        tmp_path, out, prompts=tmp_path / "p.jsonl", layer="0,2", max_new_tokens=24, codec="bf16"
    )
    command[1] = base
    command += ["--workers", 2, "--batch-size", 2]
    process = subprocess.Popen(
        [sys.executable, "-m", "nla_engine", *map(str, command)], stderr=subprocess.DEVNULL, process_group=0
    )
    end = time.monotonic() + 200
    while not out.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(float(rng.uniform(0, 0.5)))
    process.kill()
    process.wait()
    run_capture(options(tmp_path, base, "many.zarr", workers=3, resume=True))
    check_same(tmp_path / "one.zarr", out)


def test_dry_run(tmp_path: Path, base: Path, rng: np.random.Generator) -> None:
    write(tmp_path, rng, 10)
    ran = call("capture", base, "--prompts", tmp_path / "p.jsonl", "--layer", 1, "--out", tmp_path / "x.zarr",
               "--device", "cpu", "--workers", 2, "--dry-run", "--json")  # fmt: skip
    assert ran.code == 0 and ran.json["sequences"] == 10
    assert "2 are taken to be 2 times as fast" in ran.err
    assert not (tmp_path / "x.zarr").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpus": "all", "device": None}, "--gpus is all: torch finds no CUDA GPU"),
        ({"gpus": "0,2", "device": None}, "torch finds no CUDA GPU"),
        ({"gpus": "2"}, "--gpus and --device cpu exclude each other"),
        ({"gpus": "none"}, "--gpus is 'none': it must be"),
        ({"gpus": "0"}, "--gpus is '0': it must be"),
        ({"gpus": "2", "workers": 2, "device": None}, "--gpus and --workers exclude each other"),
        ({"workers": 0}, "--workers is 0: it must be 1 or more"),
        ({"workers": 65}, "--workers is 65: this process may use 64 CPU cores"),
    ],
    ids=str,
)
def test_refused(
    root: Path, tmp_path: Path, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    check_refused(call(*capture(root, tmp_path / "x.zarr", **changes)), message)
    assert not (tmp_path / "x.zarr").exists()


def test_a_loaded_model_is_refused(tmp_path: Path, base: Path, rng: np.random.Generator) -> None:
    write(tmp_path, rng, 2)
    with pytest.raises(RequestError, match="each process loads its models itself"):
        run_capture(options(tmp_path, base, "x.zarr", workers=2), lm=load_model(base, device="cpu"))


def test_what_a_worker_refuses_stops_the_run(tmp_path: Path, base: Path, rng: np.random.Generator) -> None:
    """Before a store is made, with the error that one process gives."""
    write(tmp_path, rng, 4)
    given = options(tmp_path, base, "x.zarr", workers=2, keep_partial=True, kernels="library")
    with pytest.raises(RequestError, match="--keep-partial"):
        run_capture(given)
    assert not (tmp_path / "x.zarr").exists()


@pytest.mark.real
@pytest.mark.slow
def test_smollm2(tmp_path: Path, smollm2: Path, rng: np.random.Generator) -> None:
    questions = [f"What is {a} times {b}?" for a, b in rng.integers(2, 99, (12, 2))]
    write_records(tmp_path, [{"prompt": text} for text in questions])
    both(tmp_path, smollm2, 2, layer=(20,), max_new_tokens=16, dtype="float32")
