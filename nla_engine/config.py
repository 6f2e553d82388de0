"""The options of each stage: one frozen dataclass a stage, checked on construction. The command line is made from them.

A field's metadata holds its help text. Knows nothing of how an option is used.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from nla_engine.codec import CODEC_NAMES
from nla_engine.errors import RequestError

#: auto: fused blocks and Triton on a GPU, else reference. fused: fused blocks anywhere. reference: the library's own
#: modules and torch attention, one synchronisation a step.
KERNELS = ("auto", "fused", "reference")
POSITIONS = ("generated", "prompt", "all", "last")
_Options = TypeVar("_Options", bound="Options")


def option(help: str, default: Any = ..., **metadata: Any) -> Any:
    """A dataclass field with a help text for the command line."""
    metadata["help"] = help
    return field(metadata=metadata) if default is ... else field(default=default, metadata=metadata)


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
            flag = "--" + name.replace("_", "-")
            raise RequestError(f"{flag} is {getattr(self, name)!r}: it must be {must}")


@dataclass(frozen=True)
class CaptureOptions(Options):
    """Stage 1. See each field's help."""

    model: str = option("Base model: a local directory or a Hub id.")
    prompts: Path = option(
        "Prompts: .jsonl or .parquet with prompt or messages, or text with a prompt a line."
    )
    layer: tuple[int, ...] = option("Block to capture, counted from 0: its output. Repeat for several.")
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
    dtype: str | None = option("bfloat16 or float32. [default: bfloat16 on a GPU, else float32]", None)
    device: str | None = option("cuda, cuda:N or cpu. [default: cuda if there is one]", None)
    kernels: str = option("auto; or reference: the library's own modules and torch attention.", "auto")
    revision: str | None = option("Revision of a Hub model.", None)
    skip_bad: bool = option("Leave unusable prompt records out, and count them, instead of stopping.", False)
    resume: bool = option("Go on with a store that was interrupted.", False)
    overwrite: bool = option("Replace a store that exists.", False)
    host_memory: float = option("GiB of finished sequences that may wait for an earlier one.", 4.0)
    trust_remote_code: bool = option("Run Python code that a model repository brings along.", False)

    def __post_init__(self) -> None:
        if self.corpus:
            if self.chat:
                raise RequestError("--corpus reads text as it is: leave --chat out")
            object.__setattr__(self, "chat", False)
            object.__setattr__(self, "max_new_tokens", 0)
        if self.positions is None:
            object.__setattr__(self, "positions", "all" if self.corpus else "generated")
        object.__setattr__(self, "layer", tuple(sorted(set(self.layer))))
        self._need(
            len(self.layer) > 0 and min(self.layer) >= 0, "layer", "one or several block numbers from 0 on"
        )
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
        self._need(0 <= self.seed < 1 << 63, "seed", "0 or more")
        self._need(self.kernels in KERNELS, "kernels", f"one of {', '.join(KERNELS)}")
        self._need(self.host_memory > 0, "host_memory", "above 0")
        if self.resume and self.overwrite:
            raise RequestError("--resume and --overwrite exclude each other")


@dataclass(frozen=True)
class RoundtripOptions(Options):
    """Stage 2. See each field's help."""

    store: Path = option("The store that capture wrote.")
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
    dtype: str | None = option("bfloat16 or float32. [default: bfloat16 on a GPU, else float32]", None)
    device: str | None = option("cuda, cuda:N or cpu. [default: cuda if there is one]", None)
    kernels: str = option("auto; or reference: the library's own modules and torch attention.", "auto")
    resume: bool = option("Go on with a round trip that was interrupted.", False)
    overwrite: bool = option("Replace a result that exists.", False)
    trust_remote_code: bool = option("Run Python code that a model repository brings along.", False)

    def __post_init__(self) -> None:
        self._need(self.limit is None or self.limit > 0, "limit", "1 or more")
        self._need(self.samples > 0, "samples", "1 or more")
        self._need(math.isfinite(self.temperature) and self.temperature >= 0, "temperature", "0 or more")
        self._need(0 <= self.seed < 1 << 63, "seed", "0 or more")
        self._need(self.max_new_tokens > 0, "max_new_tokens", "1 or more")
        self._need(self.batch_size is None or self.batch_size > 0, "batch_size", "1 or more")
        self._need(self.kernels in KERNELS, "kernels", f"one of {', '.join(KERNELS)}")
        self._need(self.variance is None or 0 < self.variance <= 1, "variance", "above 0 and at most 1")
        if self.samples > 1 and self.temperature == 0:
            raise RequestError(
                "--samples above 1 would write one greedy text several times: give a --temperature"
            )
        if self.resume and self.overwrite:
            raise RequestError("--resume and --overwrite exclude each other")
