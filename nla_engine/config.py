"""The options of each stage: one frozen dataclass a stage, checked on construction. The command line is made from them.

A field's metadata holds its help text. Knows nothing of how an option is used.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from nla_engine.codec.rows import CODEC_NAMES
from nla_engine.errors import RequestError

#: auto: fused blocks and Triton on a GPU, else reference. fused: fused blocks anywhere. reference: the library's own
#: modules and torch attention, one synchronisation a step.
KERNELS = ("auto", "fused", "reference")
_KERNELS_HELP = (
    "auto; fused: the engine's blocks on a CPU, too; reference: the library's modules, torch attention."
)
#: Products of AV and AR: in the dtype of the weights, or quantised row by row to e4m3.
PRECISIONS = ("full", "fp8")
#: Where AV and AR live: together on the GPU, or one at a time.
RESIDENCIES = ("auto", "both", "turns")
POSITIONS = ("generated", "prompt", "all", "last")
_Options = TypeVar("_Options", bound="Options")


def option(help: str, default: Any = ..., **metadata: Any) -> Any:
    """A dataclass field with a help text for the command line."""
    metadata["help"] = help
    return field(metadata=metadata) if default is ... else field(default=default, metadata=metadata)


def flag(name: str) -> str:
    """A field as it is written on the command line."""
    return "--" + name.replace("_", "-")


def check_local(*paths: Path) -> None:
    """RequestError if one of them is a URL: a Path has lost a slash of it, and a directory `s3:` would be made."""
    for path in paths:
        if re.match(r"[a-z0-9]+:/", str(path)):
            url = str(path).replace(":/", "://", 1)
            raise RequestError(f"{url}: this has to be on a local disk, not on an object store")


@dataclass(frozen=True)
class Options:
    """Base: construction from a mapping that refuses unknown keys, and a JSON-able form."""

    @classmethod
    def from_dict(cls: type[_Options], data: dict[str, Any]) -> _Options:
        unknown = sorted(set(data) - {f.name for f in fields(cls)})
        if unknown:
            raise RequestError(
                f"unknown option {', '.join(unknown)}; known: {', '.join(f.name for f in fields(cls))}"
            )
        return cls(**data)

    def to_dict(self) -> dict[str, Any]:
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}

    def _need(self, holds: bool, name: str, must: str) -> None:
        if not holds:
            value = getattr(self, name)
            given = ",".join(map(str, value)) if isinstance(value, tuple) else repr(value)
            raise RequestError(f"{flag(name)} is {given}: it must be {must}")


@dataclass(frozen=True)
class CaptureOptions(Options):
    """Stage 1. See each field's help."""

    model: str = option("Base model: a local directory or a Hub id.")
    prompts: Path = option(
        "Prompts: .jsonl, .parquet, .csv or .tsv with prompt or messages, or .txt with a prompt a line."
    )
    layer: tuple[int, ...] = option(
        "Block to capture, counted from 0: its output. Several joined by commas, or repeated."
    )
    out: str = option("The Zarr store to write: a directory, or s3://bucket/run.zarr.")
    max_new_tokens: int = option("Most tokens to generate for a prompt; 0 only reads it.", 128)
    positions: str | None = option(
        "Rows to keep: generated, prompt, all, last (the prompt's last token), or several joined by commas. "
        "[default: generated; all with --corpus]",
        None,
    )
    codec: str = option("How rows are stored: int8, int4 or bf16.", "int8")
    batch_size: int | None = option("Sequences run at once. [default: from the memory that is free]", None)
    temperature: float = option("0 is greedy; above, the softmax is sampled at this temperature.", 0.0)
    seed: int = option("Seed of the sampling.", 0)
    chat: bool | None = option(
        "Render prompts through the chat template, or not. [default: if there is one]", None
    )
    corpus: bool = option(
        "Text that exists already: read raw, generate nothing, stop after the deepest layer.", False
    )
    dtype: str | None = option(
        "bfloat16 or float32. [default: bfloat16 on a GPU that computes in it, else float32]", None
    )
    device: str | None = option("cuda, cuda:N or cpu. [default: cuda if there is one]", None)
    kernels: str = option(_KERNELS_HELP, "auto")
    revision: str | None = option("Revision of a Hub model.", None)
    skip_bad: bool = option("Leave unusable prompt records out, and count them, instead of stopping.", False)
    resume: bool = option("Go on with a store that was interrupted.", False)
    overwrite: bool = option("Replace a store that exists.", False)
    dry_run: bool = option(
        "Write nothing: print rows, bytes and time expected, measured on the first prompts.", False
    )
    host_memory: float = option("GiB of host memory for rows of sequences that have ended.", 4.0)
    trust_remote_code: bool = option("Run Python code that a model repository brings along.", False)

    def __post_init__(self) -> None:
        if self.corpus:
            if self.chat:
                raise RequestError("--corpus reads text as it is: leave --chat out")
            if self.temperature or self.max_new_tokens not in (0, type(self).max_new_tokens):
                raise RequestError("--corpus generates nothing: leave --max-new-tokens and --temperature out")
            object.__setattr__(self, "chat", False)
            object.__setattr__(self, "max_new_tokens", 0)
        if self.positions is None:
            object.__setattr__(self, "positions", "all" if self.corpus else "generated")
        object.__setattr__(self, "layer", tuple(sorted(set(self.layer))))
        self._need(
            len(self.layer) > 0 and min(self.layer) >= 0, "layer", "one or several block numbers from 0 on"
        )
        self._need(bool(self.out), "out", "the name of a store")
        self._need(self.max_new_tokens >= 0, "max_new_tokens", "0 or more")
        names = str(self.positions).split(",")
        self._need(
            all(n in POSITIONS for n in names), "positions", f"of {', '.join(POSITIONS)}, joined by commas"
        )
        if self.max_new_tokens == 0 and names == ["generated"]:
            raise RequestError(
                "--positions generated keeps nothing when nothing is generated: use all, prompt or last"
            )
        self._need(self.codec in CODEC_NAMES, "codec", f"one of {', '.join(CODEC_NAMES)}")
        self._need(self.batch_size is None or self.batch_size > 0, "batch_size", "1 or more")
        self._need(math.isfinite(self.temperature) and self.temperature >= 0, "temperature", "0 or more")
        self._need(0 <= self.seed < 1 << 63, "seed", "0 to 2^63 - 1")
        self._need(self.kernels in KERNELS, "kernels", f"one of {', '.join(KERNELS)}")
        self._need(0 < self.host_memory < math.inf, "host_memory", "above 0, and finite")
        if self.resume and self.overwrite:
            raise RequestError("--resume and --overwrite exclude each other")


@dataclass(frozen=True)
class RoundtripOptions(Options):
    """Stage 2. See each field's help."""

    store: str = option("The store that capture wrote: a directory, or s3://bucket/run.zarr.")
    av: str = option("Verbalizer (AV): a local directory or a Hub id.")
    ar: str = option("Reconstructor (AR): a local directory or a Hub id.")
    out: Path = option("The Parquet file to write.")
    layer: int | None = option("Layer of the store to read. [default: the one the AV was trained on]", None)
    where: str | None = option("Which rows, as an expression: \"generated and token matches '[0-9]'\".", None)
    limit: int | None = option("At most this many rows, evenly spread over the selected ones.", None)
    samples: int = option("Explanations a row; the best by cos is marked. Above 1 needs a temperature.", 1)
    temperature: float = option("0 is greedy; above, the softmax is sampled at this temperature.", 0.0)
    seed: int = option("Seed of the sampling and of the controls.", 0)
    max_new_tokens: int = option("Longest explanation, in tokens.", 200)
    variance: float | None = option(
        "Var of fve_nrm, if not that of the store's rows (published training values).", None
    )
    batch_size: int | None = option(
        "Explanations written at once. [default: from the memory that is free]", None
    )
    follow: bool = option("Read a store that is still being written, until its writer has finished.", False)
    residency: str = option(
        "AV and AR on the GPU: both (at once), turns (one at a time), or auto: both if they fit.", "auto"
    )
    precision: str = option(
        "Products of AV and AR: full (in --dtype), or fp8, faster and close to it (docs/roundtrip.md).",
        "full",
    )
    dtype: str | None = option(
        "bfloat16 or float32. [default: bfloat16 on a GPU that computes in it, else float32]", None
    )
    device: str | None = option("cuda, cuda:N or cpu. [default: cuda if there is one]", None)
    kernels: str = option(_KERNELS_HELP, "auto")
    resume: bool = option("Go on with a round trip that was interrupted.", False)
    overwrite: bool = option("Replace a result that exists.", False)
    trust_remote_code: bool = option("Run Python code that a model repository brings along.", False)

    def __post_init__(self) -> None:
        self._need(self.limit is None or self.limit > 0, "limit", "1 or more")
        self._need(self.samples > 0, "samples", "1 or more")
        self._need(math.isfinite(self.temperature) and self.temperature >= 0, "temperature", "0 or more")
        self._need(0 <= self.seed < 1 << 63, "seed", "0 to 2^63 - 1")
        self._need(self.max_new_tokens > 0, "max_new_tokens", "1 or more")
        self._need(self.batch_size is None or self.batch_size > 0, "batch_size", "1 or more")
        self._need(self.kernels in KERNELS, "kernels", f"one of {', '.join(KERNELS)}")
        self._need(self.variance is None or 0 < self.variance <= 1, "variance", "above 0 and at most 1")
        self._need(self.precision in PRECISIONS, "precision", f"one of {', '.join(PRECISIONS)}")
        self._need(self.residency in RESIDENCIES, "residency", f"one of {', '.join(RESIDENCIES)}")
        check_local(self.out)
        if self.precision == "fp8" and self.kernels == "reference":
            raise RequestError("--precision fp8 has no reference kernels: leave one of the two out")
        if self.follow and self.limit is not None:
            raise RequestError(
                "--limit spreads over all rows, and --follow does not know them yet: leave one of the two out"
            )
        if self.samples > 1 and self.temperature == 0:
            raise RequestError(
                "--samples above 1 would write one greedy text several times: give a --temperature"
            )
        if self.resume and self.overwrite:
            raise RequestError("--resume and --overwrite exclude each other")


@dataclass(frozen=True)
class MultiplicationOptions(Options):
    """`study multiplication`. See each field's help."""

    out: Path = option("Directory for the stores, tables, figures and the page.")
    model: str | None = option("Base model: a directory or a Hub id. [default: the bundled one]", None)
    av: str | None = option("Verbalizer (AV) of its activations. [default: the bundled one]", None)
    ar: str | None = option("Reconstructor (AR) of its activations. [default: the bundled one]", None)
    layer: int | None = option("Layer that AV and AR were made for. [default: the bundled models' 5]", None)
    problems: int = option("How many multiplications.", 200)
    first: str = option("Values of the first operand.", "10-99")
    second: str = option("Values of the second operand.", "10-99")
    phrasings: str = option("How to ask, joined by commas.", "what,command,find,formula,much,story")
    split: str | None = option(
        "Operand pairs that the bundled AV and AR never saw (held_out), saw (trained), or any. "
        "[default: held_out; any with other models]",
        None,
    )
    seed: int = option("Seed of the problems, the samples, the controls and the intervals.", 0)
    rows: str = option("Rows to explain: answer (those in and beside it), or every generated one.", "answer")
    max_new_tokens: int = option("Longest reply, in tokens.", 128)
    explanation_tokens: int = option("Longest explanation, in tokens.", 200)
    ablated_problems: int = option("Problems whose explanations are read again clause by clause.", 96)
    samples: int = option("Explanations a row for the agreement of samples; 0 leaves it out.", 4)
    temperature: float = option("Temperature of those samples; every other explanation is greedy.", 0.7)
    sampled_problems: int = option("Problems whose rows are sampled.", 48)
    variance: float | None = option(
        "Var of FVE, if not that of the store's rows (published training values).", None
    )
    batch_size: int | None = option(
        "Sequences run at once, in both stages. [default: from the memory that is free]", None
    )
    dtype: str | None = option(
        "bfloat16 or float32. [default: bfloat16 on a GPU that computes in it, else float32]", None
    )
    device: str | None = option("cuda, cuda:N or cpu. [default: cuda if there is one]", None)
    kernels: str = option(_KERNELS_HELP, "auto")
    resume: bool = option("Go on with a study that was interrupted.", False)
    overwrite: bool = option("Replace a study that exists.", False)
    trust_remote_code: bool = option("Run Python code that a model repository brings along.", False)

    def __post_init__(self) -> None:
        given = [name for name in ("model", "av", "ar", "layer") if getattr(self, name) is not None]
        if given and len(given) < 4:
            raise RequestError(
                "--model, --av, --ar and --layer belong together: give all four, or none for the bundled models"
            )
        self._need(self.layer is None or self.layer >= 0, "layer", "0 or more")
        self._need(self.problems >= 2, "problems", "2 or more")
        self._need(self.split in (None, "held_out", "trained", "any"), "split", "held_out, trained or any")
        if given and self.split not in (None, "any"):
            raise RequestError(
                f"--split {self.split}: which pairs were held out is known of the bundled models alone; leave it out"
            )
        self._need(0 <= self.seed < 1 << 63, "seed", "0 to 2^63 - 1")
        self._need(self.rows in ("answer", "generated"), "rows", "answer or generated")
        self._need(self.max_new_tokens > 0, "max_new_tokens", "1 or more")
        self._need(self.explanation_tokens > 0, "explanation_tokens", "1 or more")
        self._need(self.ablated_problems >= 0, "ablated_problems", "0 or more")
        self._need(self.samples == 0 or self.samples >= 2, "samples", "2 or more, or 0")
        self._need(math.isfinite(self.temperature) and self.temperature > 0, "temperature", "above 0")
        self._need(self.sampled_problems >= 2, "sampled_problems", "2 or more")
        self._need(self.variance is None or 0 < self.variance <= 1, "variance", "above 0 and at most 1")
        self._need(self.batch_size is None or self.batch_size > 0, "batch_size", "1 or more")
        self._need(self.kernels in KERNELS, "kernels", f"one of {', '.join(KERNELS)}")
        if self.resume and self.overwrite:
            raise RequestError("--resume and --overwrite exclude each other")
