"""Workers that are groups of two processes with one model: the store of one process, and a group that loses one dies
alone."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from commands import call
from test_capture_workers import check_same, options, write
from tiny import save_model
from worker_faults import Killer

from nla_engine.capture.run import run_capture
from nla_engine.workers.process import WorkerProcess


def stat(process: object) -> list[str]:
    """State and parent of a process, and more; of one that has gone none."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def running(process: int) -> bool:
    return stat(process)[:1] not in ([], ["Z"])


def children(process: int) -> list[int]:
    """The processes that a process has started."""
    every = (int(path.name) for path in Path("/proc").glob("[0-9]*"))
    return [each for each in every if stat(each)[1:2] == [str(process)]]


@pytest.mark.slow
def test_a_group_of_which_one_process_dies(tmp_path: Path, rng: np.random.Generator, killer: Killer) -> None:
    """Two workers of two ranks. Rank 1 of one dies while its worker has more to do: another worker does that again."""

    def kill_rank(worker: WorkerProcess) -> None:
        (rank,) = children(worker.pid)
        os.kill(rank, signal.SIGKILL)
        while running(rank):
            time.sleep(0.01)

    killer.left, killer.how = 1, kill_rank
    base = save_model(tmp_path / "base")
    write(tmp_path, rng, 24)
    run_capture(options(tmp_path, base, "one.zarr"))
    lines: list[str] = []
    split = options(tmp_path, base, "split.zarr", workers=2, batch_size=3, tensor_parallel=2)
    summary = run_capture(split, announce=lines.append)
    check_same(tmp_path / "one.zarr", tmp_path / "split.zarr")
    assert killer.killed and summary.workers == 2 and summary.workers_lost == 1, lines
    assert any("on cpu+cpu died" in line and "rank 1 was killed by signal 9" in line for line in lines), lines


def test_what_cannot_be_grouped_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    base = save_model(tmp_path / "base")
    write(tmp_path, rng, 2)
    given = ("capture", base, "--prompts", tmp_path / "p.jsonl", "--layer", 1, "--out", tmp_path / "o.zarr")
    for more, words in (
        (("--tensor-parallel", 2, "--device", "cpu+cpu+cpu"), "--tensor-parallel 2 needs 2"),
        (("--device", "cpu+cpu"), "device 'cpu+cpu' is not one torch knows"),
        (
            ("--tensor-parallel", 3, "--workers", 2, "--device", "cpu"),
            "4 attention heads, and 3 does not divide",
        ),
    ):
        ran = call(*given, "--max-new-tokens", 2, *more)
        assert ran.code == 2 and words in ran.err and ran.err.strip().count("\n") == 0, ran.err
        assert not (tmp_path / "o.zarr").exists()
