"""One command on one GPU and on all of the machine, the same requests to disk: how much faster several are.

Each run is the command itself, in a process of its own, which reads a checkpoint of random weights from disk. The rate
is that of generating and writing; the detail tells how long the whole command took, and its start. On a CPU two
processes stand in for the GPUs.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
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


def run(session: Session) -> None:
    """One process, then all. On a machine with one GPU there is nothing to compare."""
    on_gpu = session.device.type == "cuda"
    most = torch.cuda.device_count() if on_gpu else 2
    if most < 2:
        session.skipped.append("parallel: needs two GPUs")
        return
    sizes = session.sizes
    count, layer = session.settings.requests or REQUESTS[session.device.type], session.layer
    model = _saved(session)
    one = None
    for processes in sorted({1, 2, most} if most > 2 else {1, most}):
        told: dict[str, Any] = {}
        where = (
            f"{processes} {'GPU' if on_gpu else 'process'}{'' if processes == 1 else 's' if on_gpu else 'es'}"
        )
        line = session.measure(
            "parallel",
            f"{count} requests, {sizes.prompt} prompt and {sizes.new} new tokens, layer {layer} to disk, {where}",
            "tok/s",
            _captured(session, model, processes, count, layer, told),
            against=one,
            warmups=0,
            detail=lambda p50, told=told: _words(told),  # type: ignore[misc]
        )
        one = one or line


def _words(told: dict[str, Any]) -> str:
    phases = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in told["seconds_by_phase"].items())
    return f"the command: {told['seconds']:.1f} s; {phases}"


def _saved(session: Session) -> Path:
    """A checkpoint of the session's model, whose memory is free afterwards."""
    directory = session.directory / "parallel-model"
    lm, _ = session.lm, session.layer
    lm.model.save_pretrained(directory)
    lm.tokenizer.save_pretrained(directory)
    del lm
    session.__dict__.pop("lm", None)
    free_memory(session.device)
    return directory


@contextmanager
def _captured(
    session: Session, model: Path, processes: int, count: int, layer: int, told: dict[str, Any]
) -> Iterator[Prepared]:
    """`nla-engine capture`. Generated tokens per second, of generating and writing. told: the last summary."""
    new, out = session.sizes.new, session.directory / "parallel.zarr"
    prompts = prompt_file(session.directory / "parallel.txt", [session.sizes.prompt] * count)
    command: list[object] = ["capture", model, "--prompts", prompts, "--layer", layer, "--out", out]
    command += ["--max-new-tokens", new, "--raw", "--overwrite", "--json"]
    command += ["--dtype", str(session.settings.dtype).removeprefix("torch.")]
    if session.device.type == "cuda":
        command += ["--gpus", processes]
    else:
        command += ["--device", "cpu", "--workers", processes]

    def once() -> float:
        try:
            done = subprocess.run(
                [sys.executable, "-m", "nla_engine", *map(str, command)], capture_output=True, text=True
            )
        finally:
            shutil.rmtree(out, ignore_errors=True)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        told.clear()
        told.update(json.loads(done.stdout))
        expect("tokens generated", told["tokens_generated"], count * new)
        expect("rows stored", told["rows"], count * new)
        expect("workers that died", told["workers_lost"], 0)
        return count * new / float(told["seconds_by_phase"][GENERATING])

    yield Prepared(once)
