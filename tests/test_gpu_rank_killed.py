"""A run over two GPUs of which one process is killed: it ends with the cause, though a collective never does."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from stuck_ranks import only_sum, sleep_and_sum, sleep_and_sum_by_peers, stop_and_sum
from tiny import save_model, write_prompts

from nla_engine.capture.run import run_capture
from nla_engine.config import CaptureOptions
from nla_engine.engine import leader
from nla_engine.engine.leader import Leader, open_ranks
from nla_engine.engine.peers import SWITCH
from nla_engine.engine.split_load import load_split
from nla_engine.errors import EngineError
from nla_engine.models.source import find_source

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
LAYER = 2
#: For a rank that hangs, and seconds until it is named.
_HANGS = [(stop_and_sum, "rank 1 has not responded for 5 s"), (sleep_and_sum, "rank 1 hangs")]
DEVICES = (torch.device("cuda", 0), torch.device("cuda", 1))


def test_a_rank_that_is_killed_stops_the_run(tmp_path: Path) -> None:
    """The GPU waits for a rank that is gone."""
    base = save_model(tmp_path / "base")
    with open_ranks(DEVICES) as group:
        assert isinstance(group, Leader)
        lm = load_split(group, find_source(str(base)), dtype=torch.bfloat16)
        started: list[float] = []

        def kill(done: int, total: int) -> None:
            if not started:
                os.kill(group._followers[0].process.pid, signal.SIGKILL)
                started.append(time.monotonic())

        options = CaptureOptions(
            model=str(base),
            prompts=(write_prompts(tmp_path / "p.jsonl", 64),),
            layer=(LAYER,),
            out=str(tmp_path / "run.zarr"),
            max_new_tokens=256,
            batch_size=8,
            device="cuda:0",
            tensor_parallel=2,
        )
        with pytest.raises((EngineError, RuntimeError)) as failed:
            run_capture(options, lm=lm, progress=kill)
        assert "killed by signal 9" in str(group.explained(failed.value))
    assert time.monotonic() - started[0] < 200


@pytest.mark.parametrize(("hang", "words"), _HANGS, ids=["stopped", "asleep"])
def test_a_rank_that_hangs_is_named(hang: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU waits for it, and is let go."""
    with open_ranks(DEVICES) as group:
        assert isinstance(group, Leader)
        group.together(only_sum, group)
        monkeypatch.setattr(leader, "HANG_SECONDS", 5)
        begin = time.monotonic()
        with pytest.raises(EngineError, match=words):
            _together(group, hang)
    assert time.monotonic() - begin < 200


def test_a_sum_in_the_memory_of_a_rank_that_hangs_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel of rank 0 waits for a launch of rank 1 that never comes."""
    monkeypatch.setenv(SWITCH, "1")
    with open_ranks(DEVICES) as group:
        assert isinstance(group, Leader)
        if group.peers is None:
            pytest.skip(f"sums by NCCL: {group.without_peers}")
        group.together(only_sum, group)
        monkeypatch.setattr(leader, "HANG_SECONDS", 5)
        with pytest.raises(EngineError, match="rank 1 hangs"):
            _together(group, sleep_and_sum_by_peers)


def _together(group: Leader, hang: Any) -> None:
    """Once the device has been let go, the fault is told by whoever asks next."""
    group.together(hang, group)
    group.check_alive()
