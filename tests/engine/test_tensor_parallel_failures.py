"""Tensor parallel: what cannot be split is refused before a process starts, and a rank that fails stops the run."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import save_adapter
from commands import call
from stuck_ranks import only_sum, sleep_and_sum, stop_and_sum
from tiny import byte_tokenizer, language_model, save_ar, save_av, save_model, tiny_model, write_prompts

from nla_engine.capture.run import run_capture
from nla_engine.config import CaptureOptions
from nla_engine.engine import leader
from nla_engine.engine.leader import Leader, group_devices, open_ranks
from nla_engine.engine.pulse import Hangs, Pulse, counts_of, make_pulse
from nla_engine.engine.split import Split
from nla_engine.engine.split_load import load_split
from nla_engine.errors import EngineError, RequestError
from nla_engine.models.source import find_source
from nla_engine.store import CaptureStore

CPU = torch.device("cpu")
LAYER = 2


# ---- what cannot be split is refused before a process starts ----


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(leader.subprocess, "Popen", refuse)


def refused(directory: Path, base: Path, size: int, *more: object) -> str:
    prompts = write_prompts(directory / "p.jsonl", 2)
    out = directory / "run.zarr"
    arguments = ("capture", base, "--prompts", prompts, "--layer", 1, "--out", out, "--max-new-tokens", 2)
    ran = call(*arguments, "--device", "cpu", "--tensor-parallel", size, *more)
    assert ran.code == 2 and ran.err.strip().count("\n") == 0 and not out.exists(), ran.err
    return ran.err


def test_what_cannot_be_split_is_refused(tmp_path: Path, no_process: None) -> None:
    base = save_model(tmp_path / "base")
    assert "4 attention heads, and 3 does not divide" in refused(tmp_path, base, 3)
    assert "must be" in refused(tmp_path, base, 0)
    other = language_model("GPTNeoXConfig").model
    other.save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    assert "GPTNeoXLayer is not a known block" in refused(tmp_path, tmp_path / "other", 2)
    shape = tiny_model("qwen2").config
    shape.num_attention_heads, shape.num_key_value_heads, shape.intermediate_size = 6, 3, 96
    with pytest.raises(RequestError, match="3 key/value heads"):
        Split("x", shape, 0, 2)
    shape.num_attention_heads, shape.intermediate_size = 5, 96
    with pytest.raises(RequestError, match="5 attention heads"):
        Split("x", shape, 0, 2)
    shape.num_attention_heads, shape.num_key_value_heads, shape.intermediate_size = 6, 2, 97
    with pytest.raises(RequestError, match="97 channels"):
        Split("x", shape, 0, 2)


def test_adapters_fp8_and_other_ways_to_run_are_refused(tmp_path: Path, no_process: None) -> None:
    base = save_model(tmp_path / "base")
    save_adapter(tmp_path / "adapter", base)
    assert "is an adapter: merge it" in refused(tmp_path, tmp_path / "adapter", 2)
    assert "--kernels library is not offered" in refused(tmp_path, base, 2, "--kernels", "library")
    store = tmp_path / "store.zarr"
    prompts = write_prompts(tmp_path / "p.jsonl", 2)
    arguments = ("--prompts", prompts, "--layer", LAYER, "--out", store, "--max-new-tokens", 2)
    assert call("capture", base, *arguments, "--device", "cpu").code == 0
    av, ar, out = save_av(tmp_path / "av", LAYER), save_ar(tmp_path / "ar", LAYER), tmp_path / "t.parquet"
    trip = ("roundtrip", store, "--av", av, "--ar", ar, "--out", out, "--device", "cpu", "--tensor-parallel")
    for size, more, words in (
        (2, ("--residency", "turns"), "--residency turns is not offered"),
        (2, ("--precision", "fp8", "--kernels", "fused"), "fp8"),
        (3, (), "4 attention heads, and 3 does not divide"),
    ):
        ran = call(*trip, size, *more)
        assert ran.code == 2 and words in ran.err and ran.err.strip().count("\n") == 0, ran.err
        assert not out.exists()


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert group_devices(torch.device("cuda", 1), 2) == (torch.device("cuda", 1), torch.device("cuda", 2))
    with pytest.raises(RequestError, match="torch finds 2 GPUs from cuda:1 on"):
        group_devices(torch.device("cuda", 1), 3)
    with pytest.raises(RequestError, match="torch finds 3 GPUs: give at most"):
        group_devices(torch.device("cuda", 0), 4)


# ---- failures ----


@pytest.fixture
def options(tmp_path: Path) -> CaptureOptions:
    return CaptureOptions(
        model=str(save_model(tmp_path / "base")),
        prompts=(write_prompts(tmp_path / "p.jsonl", 12),),
        layer=(LAYER,),
        out=str(tmp_path / "run.zarr"),
        max_new_tokens=64,
        batch_size=3,
        tensor_parallel=2,
    )


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The news of a rank that has failed is waited for, however long it takes to come."""
    monkeypatch.setattr(leader, "_NEWS_SECONDS", 200.0)


def test_ranks_that_fall_out_of_step_stop_the_run(options: CaptureOptions) -> None:
    with open_ranks((CPU, CPU)) as group:
        assert isinstance(group, Leader)
        lm = load_split(group, find_source(options.model), dtype=torch.float32)
        group._note.add_(1)  # as if this rank had read another token
        with pytest.raises(EngineError, match="fell out of step"):
            run_capture(options, lm=lm)
    assert CaptureStore.open(options.out).rows == 0


def test_a_rank_that_is_killed_stops_the_run(options: CaptureOptions, patient: None) -> None:
    """The store is left to be resumed, by one process too."""
    started: list[float] = []
    with open_ranks((CPU, CPU)) as group:
        assert isinstance(group, Leader)
        lm = load_split(group, find_source(options.model), dtype=torch.float32)
        process = group._followers[0].process

        def kill(done: int, total: int) -> None:
            if not started:
                os.kill(process.pid, signal.SIGKILL)
                started.append(time.monotonic())

        with pytest.raises((EngineError, RuntimeError)) as failed:
            run_capture(options, lm=lm, progress=kill)
        assert "rank 1 was killed by signal 9" in str(group.explained(failed.value))
    assert time.monotonic() - started[0] < 200, "only a limit of the collective has ended it"
    assert process.poll() == -signal.SIGKILL
    alone = dataclasses.replace(options, tensor_parallel=1, resume=True, device="cpu")
    assert run_capture(alone).sequences == 12


# ---- a rank that hangs ----


def stopped(process: int) -> bool:
    """Whether a process is stopped, as by a debugger, or has ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "TZX"
    except OSError:
        return True


@pytest.mark.parametrize(
    ("hang", "words"),
    [
        (stop_and_sum, "rank 1 has not responded for 3 s"),
        (sleep_and_sum, "rank 1 hangs: the others have waited 3 s"),
    ],
)
def test_a_rank_that_hangs_is_named(
    hang: Any, words: str, monkeypatch: pytest.MonkeyPatch, patient: None
) -> None:
    """Each look comes when the other rank has stopped, or has shown again that its process runs."""
    look = Hangs.look

    def looks(hangs: Hangs, most: int) -> str:
        while process.poll() is None and not (
            stopped(process.pid) if hang is stop_and_sum else hangs._counts[1, 1] != hangs._before[1, 1]
        ):
            time.sleep(0.01)
        return look(hangs, most)

    with open_ranks((CPU, CPU)) as group:
        assert isinstance(group, Leader)
        process = group._followers[0].process
        group.together(only_sum, group)
        monkeypatch.setattr(leader, "HANG_SECONDS", 3)
        monkeypatch.setattr(Hangs, "look", looks)
        begin = time.monotonic()
        with pytest.raises(RuntimeError) as failed:
            group.together(hang, group)
        assert words in str(group.explained(failed.value))
    assert time.monotonic() - begin < 200, "only a limit of the collective has ended it"
    assert process.poll() == -signal.SIGKILL


def test_a_rank_that_works_does_not_hang(tmp_path: Path) -> None:
    """It is behind the others and moves, or has done as much and waits."""
    make_pulse(tmp_path, 3)
    pulses = [Pulse(tmp_path, rank, 3) for rank in range(3)]
    hangs = Hangs(counts_of(tmp_path, 3))
    for pulse in pulses:
        pulse.close()
    for look in range(6):
        for pulse in pulses:
            pulse._own[1] += 1
        pulses[0].beat() if look == 0 else None
        pulses[2].beat() if look == 3 else None
        pulses[1].beat() if look < 3 else None
        assert hangs.look(2) == ("rank 2 hangs: the others have waited 2 s for it" if look in (1, 2) else "")


def test_time_in_which_nobody_began_anything_does_not_count(tmp_path: Path) -> None:
    """After any pause the first rank begins a little earlier than the others hear of it."""
    make_pulse(tmp_path, 2)
    pulses = [Pulse(tmp_path, rank, 2) for rank in range(2)]
    hangs = Hangs(counts_of(tmp_path, 2))
    for pulse in pulses:
        pulse.close()
    said = []
    for look in range(9):
        for pulse in pulses:
            pulse._own[1] += 1
        pulses[0].beat() if look == 5 else None
        said.append(hangs.look(3))
    assert said == [""] * 7 + ["rank 1 hangs: the others have waited 3 s for it"] * 2


_ALONE = """
import sys, time, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
from nla_engine.engine.leader import open_ranks
from stuck_ranks import stop_and_sum
with open_ranks((torch.device("cpu"),) * 2) as ranks:
    print(ranks._folder, ranks._followers[0].process.pid, flush=True)
    while {healthy}:
        time.sleep(0.05)
    ranks.together(stop_and_sum, ranks)
"""


@pytest.mark.parametrize(
    ("sent", "healthy"),
    [
        (signal.SIGINT, True),
        (signal.SIGKILL, False),
        (signal.SIGTERM, False),
        (signal.SIGINT, False),
    ],
    ids=["interrupted", "killed-while-another-hangs", "ended-so", "interrupted-so"],
)
def test_no_process_is_left_when_the_first_ends(sent: signal.Signals, healthy: bool) -> None:
    """Within seconds, though the first waits for the other, which is stopped and hears nothing."""
    program = _ALONE.format(tests=str(Path(__file__).parent.parent), healthy=healthy)
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as run:
        assert run.stdout is not None
        line = run.stdout.readline().split()
        folder, other = Path(os.fsdecode(line[0])), int(line[1])
        while not healthy and not stopped(other):
            time.sleep(0.05)
        if not healthy:
            time.sleep(0.5)  # now the first waits in the sum
        run.send_signal(sent)
        _, said = run.communicate(timeout=200)
        assert run.returncode == -sent, said
    deadline = time.monotonic() + 200
    while Path(f"/proc/{other}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{other}").exists()
    if sent == signal.SIGINT:
        assert not folder.exists()
