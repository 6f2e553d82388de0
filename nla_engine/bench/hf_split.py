"""`generate` of transformers with tp_plan="auto" on random weights, timed by its decode steps, in processes of its own.

DIRECTORY holds a checkpoint and job.json: batch, prompt, new, device. Needs nothing of this package.
"""

from __future__ import annotations

import json
import math
import os
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

_NAMES = {torch.bfloat16: "BF16", torch.float32: "F32"}
#: Spread of the weights.
_SPREAD = 0.02


def write_empty_checkpoint(directory: Path, config: Any, dtype: torch.dtype) -> None:
    """A checkpoint of this configuration whose file has no data: the file system gives zeros for its holes."""
    from transformers import AutoModelForCausalLM

    config.dtype = dtype
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, weight in model.named_parameters():  # a tied head is there once
        start, end = end, end + weight.numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(weight.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    config.architectures = [type(model).__name__]
    config.save_pretrained(directory)


def last_error(text: str) -> str:
    """The last line of a log that names an error."""
    lines = [line.strip() for line in text.splitlines() if "Error" in line]
    return (lines or text.strip().splitlines() or ["nothing said"])[-1]


def run(directory: Path, rates: Path, size: int, seconds: float) -> None:
    """Start `size` processes of this file and wait for them. RuntimeError says why one failed, or that time is up."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    running, logs = [], [directory / f"rank-{rank}.log" for rank in range(size)]
    end = time.monotonic() + seconds
    try:
        for rank, log in enumerate(logs):
            with log.open("wb") as said:
                running.append(
                    subprocess.Popen(
                        [sys.executable, __file__, str(directory), str(rates)],
                        env={**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdout=said,
                        stderr=said,
                    )
                )
        while any(process.poll() is None for process in running):
            if failed := [number for number, process in enumerate(running) if process.poll()]:
                raise RuntimeError(
                    f"transformers' own failed: {last_error(logs[failed[0]].read_text(errors='replace'))}"
                )
            if time.monotonic() > end:
                raise RuntimeError(f"transformers' own was not done after {seconds:.0f} s")
            time.sleep(0.1)
    finally:
        for process in running:
            process.kill()
            process.wait()
    if failed := [number for number, process in enumerate(running) if process.returncode]:
        raise RuntimeError(
            f"transformers' own failed: {last_error(logs[failed[0]].read_text(errors='replace'))}"
        )


@torch.inference_mode()
def main(directory: Path, rates: Path) -> None:
    """Write the new tokens per second of the decode steps, without the first pass."""
    from transformers import AutoConfig, AutoModelForCausalLM

    job = json.loads((directory / "job.json").read_text())
    rank, on_gpu = int(os.environ["LOCAL_RANK"]), job["device"] == "cuda"
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dtype = AutoConfig.from_pretrained(directory).dtype
    model: Any = AutoModelForCausalLM.from_pretrained(directory, tp_plan="auto", dtype=dtype)
    generator = torch.Generator(device).manual_seed(0)
    for name, weight in model.named_parameters():
        local = weight.to_local() if hasattr(weight, "to_local") else weight
        if weight.ndim > 1:
            local.data.normal_(0.0, _SPREAD, generator=generator)
        elif "norm" in name:
            local.data.fill_(0.0 if "gemma" in model.config.model_type else 1.0)
    model.eval()
    model.generation_config.eos_token_id = None
    vocabulary = model.get_input_embeddings().weight.shape[0]
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, min(vocabulary, 32_000), (job["batch"], job["prompt"]), generator=draw).to(device)

    def timed(new: int) -> float:
        if on_gpu:
            torch.cuda.synchronize()
        torch.distributed.barrier()
        start = time.perf_counter()
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )
        if on_gpu:
            torch.cuda.synchronize()
        if out.shape[1] != job["prompt"] + new:
            sys.exit(f"{out.shape[1] - job['prompt']} tokens were generated, not {new}")
        return time.perf_counter() - start

    timed(2)
    steps = job["new"] - 1
    seconds = math.inf
    for _ in range(2):
        seconds = min(seconds, timed(job["new"]) - timed(1))
    if rank == 0:
        rates.write_text(json.dumps({"tokens_per_second": job["batch"] * steps / seconds}))
    torch.distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
