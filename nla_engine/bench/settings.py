"""What a benchmark run is asked to do, and the sizes of its work on each kind of device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nla_engine.errors import RequestError

SUITES = (
    "kernels",
    "generate",
    "long",
    "corpus",
    "verbalize",
    "reconstruct",
    "patch",
    "roundtrip",
    "store",
    "join",
    "scaling",
    "parallel",
    "parallel-roundtrip",
    "workers",
    "codec",
    "prompts",
    "real",
    "hooked",
    "tensor-parallel",
)
#: Suites that need the weights and the tokenizer of a real model.
OF_A_MODEL = ("real", "hooked")
#: Suites that are measured if they are named: of several GPUs, or with little to tell where nothing changed.
IF_NAMED = ("tensor-parallel", "parallel-roundtrip", "workers")
BASELINES = ("hf", "none")


@dataclass(frozen=True)
class Sizes:
    """How much work each case does.

    requests, prompt, new: of a generation; ragged: shortest and longest prompt of the job with mixed lengths
    batches, context, steps: of steady decode
    documents, mean, longest: of the corpus, in tokens; vectors, av_new, ar_prompt: of verbalizer and reconstructor
    kernel_rows: rows of one launch; store_rows: rows written; codec_rows: rows put through every codec
    long_requests, long_prompt, long_mean, long_most: of the replies of different lengths: mean and longest, in tokens
    join_rows: rows of parts that are joined; scaling_rows: rows of the stores whose costs are measured
    slots, av_slots: sequences that capture and the AV run at once, at most
    """

    requests: int
    prompt: int
    new: int
    ragged: tuple[int, int]
    batches: tuple[int, ...]
    context: int
    steps: int
    documents: int
    mean: int
    longest: int
    vectors: int
    av_new: int
    ar_prompt: int
    kernel_rows: tuple[int, ...]
    store_rows: int
    join_rows: tuple[int, ...]
    scaling_rows: tuple[int, ...]
    codec_rows: int
    long_requests: int
    long_prompt: int
    long_mean: int
    long_most: int
    slots: int
    av_slots: int


_GPU = Sizes(
    requests=512,
    prompt=64,
    new=128,
    ragged=(16, 2048),
    batches=(1, 8, 64, 256, 512),
    context=250,
    steps=128,
    documents=256,
    mean=741,
    longest=2048,
    vectors=2048,
    av_new=120,
    ar_prompt=140,
    kernel_rows=(65_536, 4096, 256),
    store_rows=65_536,
    join_rows=(100_000, 1_000_000, 10_000_000),
    scaling_rows=(100_000, 1_000_000, 10_000_000),
    codec_rows=16_384,
    long_requests=1024,
    long_prompt=200,
    long_mean=2000,
    long_most=16_384,
    slots=512,
    av_slots=1024,
)
_CPU = Sizes(
    requests=8,
    prompt=16,
    new=8,
    ragged=(4, 64),
    batches=(1, 4),
    context=24,
    steps=8,
    documents=8,
    mean=24,
    longest=64,
    vectors=8,
    av_new=8,
    ar_prompt=140,
    kernel_rows=(1024, 64),
    store_rows=16_384,
    join_rows=(100_000, 1_000_000),
    scaling_rows=(100_000, 1_000_000),
    codec_rows=4096,
    long_requests=8,
    long_prompt=12,
    long_mean=40,
    long_most=120,
    slots=4,
    av_slots=4,
)


@dataclass(frozen=True)
class Settings:
    """The options of the command line, checked. None: a default that depends on the device."""

    suites: tuple[str, ...]
    device: torch.device
    dtype: torch.dtype
    model: str | None = None
    shape: str = "tiny"
    batch_sizes: tuple[int, ...] = ()
    join_rows: tuple[int, ...] = ()
    scaling_rows: tuple[int, ...] = ()
    requests: int | None = None
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    layer: int | None = None
    repeats: int = 3
    baseline: str = "none"
    vllm: str | None = None
    profile: Path | None = None
    json: Path | None = None
    csv: Path | None = None
    plot: Path | None = None
    store: Path | None = None
    rows: Path | None = None
    time_limit: float | None = None
    gpus: int | None = None
    debug: bool = False

    def __post_init__(self) -> None:
        unknown = [name for name in self.suites if name not in SUITES]
        if unknown:
            raise RequestError(f"suite {unknown[0]} is unknown: choose from {', '.join(SUITES)}, or all")
        needy = [name for name in OF_A_MODEL if name in self.suites and self.model is None]
        if needy:
            raise RequestError(f"suite {needy[0]} needs --model: give a checkpoint with a chat template")
        if self.baseline not in BASELINES:
            raise RequestError(f"--baseline {self.baseline} is unknown: choose {' or '.join(BASELINES)}")
        for flag in ("requests", "prompt_tokens", "new_tokens", "repeats", "time_limit", "gpus"):
            value: Any = getattr(self, flag)
            if value is not None and value <= 0:
                raise RequestError(f"--{flag.replace('_', '-')} is {value}: it must be above 0")
        if self.prompt_tokens == 1:
            raise RequestError("--prompt-tokens is 1: it must be 2 or more")
        if any(batch < 1 for batch in self.batch_sizes):
            raise RequestError(f"--batch-size is {min(self.batch_sizes)}: it must be above 0")
        for flag in ("join_rows", "scaling_rows"):
            if any(rows < 1 for rows in getattr(self, flag)):
                least = min(getattr(self, flag))
                raise RequestError(f"--{flag.replace('_', '-')} is {least}: it must be above 0")

    @property
    def sizes(self) -> Sizes:
        """The sizes for this device, changed by the options that were given."""
        base = _GPU if self.device.type == "cuda" else _CPU
        changed: dict[str, Any] = {}
        if self.requests:
            counts = ("requests", "documents", "vectors", "long_requests")
            changed |= dict.fromkeys(counts, self.requests)
        if self.prompt_tokens:
            changed["prompt"] = self.prompt_tokens
        if self.new_tokens:
            changed |= {"new": self.new_tokens, "av_new": self.new_tokens}
        if self.join_rows:
            changed["join_rows"] = self.join_rows
        if self.scaling_rows:
            changed["scaling_rows"] = self.scaling_rows
        if self.batch_sizes:
            changed |= {
                "batches": tuple(sorted(self.batch_sizes)),
                "slots": max(self.batch_sizes),
                "av_slots": max(self.batch_sizes),
            }
        return Sizes(**{**vars(base), **changed})
