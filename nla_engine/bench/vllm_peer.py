"""The same work done by vLLM, in its own interpreter, before this process needs the device's memory.

vLLM captures nothing: its figures are those of generation alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nla_engine.bench import vllm_job
from nla_engine.bench.session import Prepared, Session
from nla_engine.bench.shapes import find_shape
from nla_engine.bench.suites import long, verbalize
from nla_engine.errors import RequestError, first_line

_VERSION = "import importlib.metadata as m; print(m.version('vllm'))"
_VERSION_SECONDS = 60
#: An error as a traceback ends with it.
_NAMED = re.compile(r"(^|\s)[\w.]+(Error|Exception): ")
#: Seconds that killed processes may take to free the device's memory.
_END_SECONDS = 10


def vllm_version(python: str) -> str:
    """The version that this interpreter would import. RequestError if it has no vLLM, or is no interpreter."""
    try:
        found = subprocess.run(
            [python, "-c", _VERSION], capture_output=True, text=True, timeout=_VERSION_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RequestError(f"--vllm {python}: {first_line(error)}") from error
    if found.returncode:
        raise RequestError(f"--vllm {python}: it has no vLLM installed")
    return found.stdout.split()[-1]


def measure_vllm(session: Session, python: str) -> None:
    """One line for each of the suites generate, long and verbalize that runs."""
    sizes, suites, version = session.sizes, session.settings.suites, vllm_version(python)
    if "generate" in suites:
        slots = min(sizes.slots, sizes.requests)
        session.measure(
            "generate",
            f"vLLM {version} {sizes.requests} x {sizes.prompt}+{sizes.new} B={slots}, no capture",
            "tok/s",
            _done(session, python, slots, sizes.prompt, [sizes.new] * sizes.requests, tokens=True),
            warmups=0,
        )
    if "long" in suites:
        slots, lengths = min(sizes.slots, sizes.long_requests), long.reply_lengths(session)
        session.measure(
            "long",
            f"vLLM {version} {len(lengths)} x {sizes.long_prompt}+{min(lengths)}-{max(lengths)} B={slots}, no capture",
            "tok/s",
            _done(session, python, slots, sizes.long_prompt, lengths, tokens=True),
            warmups=0,
        )
    if "verbalize" in suites:
        slots = min(sizes.av_slots, sizes.vectors)
        before, prompt, new = verbalize.BEFORE, verbalize.PROMPT, sizes.av_new
        session.measure(
            "verbalize",
            f"vLLM {version} token ids {before}+{prompt - before}+{new} B={slots}, prefix cached",
            "vectors/s",
            _done(session, python, slots, prompt, [new] * sizes.vectors, shared=before),
            warmups=0,
        )


@contextmanager
def _done(
    session: Session,
    python: str,
    slots: int,
    prompt: int,
    new: list[int],
    *,
    shared: int = 0,
    tokens: bool = False,
) -> Iterator[Prepared]:
    """One process runs all repeats beforehand: a request of `new` tokens for each entry of the list. The figure is
    requests per second, or new tokens per second."""
    model, vocabulary = _model(session)
    job = {
        "model": model,
        "load_format": "auto" if session.settings.model else "dummy",
        "dtype": str(session.settings.dtype).removeprefix("torch."),
        "slots": slots,
        "max_model_len": prompt + max(new),
        "prefix_caching": shared > 0,
        "repeats": session.settings.repeats,
        "prompt": prompt,
        "shared": shared,
        "new": new,
        "vocabulary": vocabulary,
    }
    seconds = iter(_run(session.directory, python, session.device, job))
    done = sum(new) if tokens else len(new)
    yield Prepared(lambda: done / next(seconds))


def _model(session: Session) -> tuple[str, int]:
    """What vLLM loads (the checkpoint, or a directory with only the shape's config.json), and its vocabulary size."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    given = session.settings.model
    if given is not None:
        return given, AutoConfig.from_pretrained(given).get_text_config().vocab_size
    config = find_shape(session.settings.shape).config()
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.dtype = session.settings.dtype
    directory = session.directory / "vllm-model"
    config.save_pretrained(directory)
    return str(directory), config.vocab_size


def _run(directory: Path, python: str, device: torch.device, job: dict[str, Any]) -> list[float]:
    """The seconds of each repeat of a job. RuntimeError with what vLLM wrote of the cause if it fails."""
    job_file, result, log = (directory / f"vllm-{name}" for name in ("job.json", "seconds.json", "log"))
    job_file.write_text(json.dumps(job), encoding="utf-8")
    result.unlink(missing_ok=True)
    # The job's directory holds our modules, whose names must not hide installed ones.
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "CUDA_VISIBLE_DEVICES": _visible(device)}
    with log.open("w") as output:
        process = subprocess.Popen(
            [python, vllm_job.__file__, str(job_file), str(result)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            code = process.wait()
        finally:  # processes that it started end with it
            _end(process)
    if code or not result.exists():
        raise RuntimeError(f"vLLM ended with {code}: {_cause(log.read_text(errors='replace'))}")
    return list(json.loads(result.read_text(encoding="utf-8")))


def _cause(log: str) -> str:
    """The last line that names an error, but for the one that says that another process of vLLM had one; else the last
    line."""
    lines = log.strip().splitlines() or ["it printed nothing"]
    named = [line for line in lines if _NAMED.search(line) and "See root cause above" not in line]
    return (named or lines)[-1].strip()


def _visible(device: torch.device) -> str:
    """CUDA_VISIBLE_DEVICES for a process that may see this device only; empty for a CPU."""
    if device.type != "cuda":
        return ""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",")[device.index] if given else str(device.index)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and those that it started, and wait until they are gone."""
    deadline = time.monotonic() + _END_SECONDS
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            time.sleep(0.05)
