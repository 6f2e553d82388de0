"""One command on one GPU and on several of the machine, the same requests to disk: how much faster several are.

Each run is the command itself, in a process of its own, which reads a checkpoint of random weights from disk. The rate
is that of generating and writing, from the first worker's first prompt to the last commit. The detail tells how long
the whole command took, its start, and how long workers stood still. On a CPU two processes stand in for the GPUs.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nla_engine.bench.session import Prepared, Session, expect
from nla_engine.bench.timing import free_memory
from nla_engine.bench.workload import prompt_file
from nla_engine.capture.run import GENERATING

#: Requests per case, unless --requests says how many: 32 times the sequences that a GPU runs at once.
REQUESTS = {"cpu": 8, "cuda": 32 * 512}

#: Runs a case in so many processes; returns its rate, and fills the summary of its command.
Case = Callable[[int, dict[str, Any]], float]


def run(session: Session) -> None:
    """One process, and all. On a machine with one GPU there is nothing to compare."""
    if not counts(session, "parallel"):
        return
    sizes, layer = session.sizes, session.layer
    count = session.settings.requests or REQUESTS[session.device.type]
    model = _saved(session)
    prompts = prompt_file(session.directory / "parallel.txt", [sizes.prompt] * count)
    out = session.directory / "parallel.zarr"

    def captured(processes: int, told: dict[str, Any]) -> float:
        """Generated tokens per second."""
        given = ["capture", model, "--prompts", prompts, "--layer", layer, "--out", out, "--raw"]
        try:
            told |= summary_of(session, [*given, "--max-new-tokens", sizes.new], processes)
        finally:
            shutil.rmtree(out, ignore_errors=True)
        expect("tokens generated", told["tokens_generated"], count * sizes.new)
        expect("rows stored", told["rows"], count * sizes.new)
        return count * sizes.new / float(told["seconds_by_phase"][GENERATING])

    case = f"{count} requests, {sizes.prompt} prompt and {sizes.new} new tokens, layer {layer} to disk"
    measure_each(session, "parallel", case, "tok/s", captured)


def counts(session: Session, suite: str) -> list[int]:
    """How many processes are compared: one, and as many as there are GPUs, or as --gpus says. None of fewer than two,
    which is noted."""
    on_gpu = session.device.type == "cuda"
    most = (session.settings.gpus or torch.cuda.device_count()) if on_gpu else 2
    if most < 2:
        session.skipped.append(f"{suite}: needs two GPUs")
        return []
    return [1, most]


def measure_each(session: Session, suite: str, case: str, unit: str, once: Case) -> None:
    """Measure a case with each number of processes, beside that with one."""
    word = ("GPU", "GPUs") if session.device.type == "cuda" else ("process", "processes")
    one = None
    for processes in counts(session, suite):
        told: dict[str, Any] = {}
        line = session.measure(
            suite,
            f"{case}, {processes} {word[processes > 1]}",
            unit,
            _prepared(once, processes, told),
            against=one,
            warmups=0,
            detail=lambda p50, told=told: _words(told),  # type: ignore[misc]
        )
        one = one or line


@contextmanager
def _prepared(once: Case, processes: int, told: dict[str, Any]) -> Iterator[Prepared]:
    yield Prepared(lambda: once(processes, told))


def summary_of(session: Session, command: Sequence[object], processes: int) -> dict[str, Any]:
    """The summary of a command that ran in so many processes, of which none died."""
    command = [*command, "--overwrite", "--json"]
    command += ["--dtype", str(session.settings.dtype).removeprefix("torch.")]
    on_gpu = session.device.type == "cuda"
    command += ["--gpus", processes] if on_gpu else ["--device", "cpu", "--workers", processes]
    done = subprocess.run(
        [sys.executable, "-m", "nla_engine", *map(str, command)], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    told: dict[str, Any] = json.loads(done.stdout)
    expect("workers that died", told.get("workers_lost", 0), 0)
    return told


def _words(told: dict[str, Any]) -> str:
    phases = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in told["seconds_by_phase"].items())
    waited = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in told.get("workers_waited", {}).items())
    return f"the command: {told['seconds']:.1f} s; {phases}" + (
        f"; workers waited: {waited}" if waited else ""
    )


def _saved(session: Session) -> Path:
    """A checkpoint of the session's model, whose memory is free afterwards."""
    directory = session.directory / "parallel-model"
    lm, _ = session.lm, session.layer
    lm.model.save_pretrained(directory)
    lm.tokenizer.save_pretrained(directory)
    del lm
    give_up_model(session)
    return directory


def give_up_model(session: Session) -> None:
    """Free the memory of the session's model. Who needs it later gets a new one."""
    session.__dict__.pop("lm", None)
    free_memory(session.device)
