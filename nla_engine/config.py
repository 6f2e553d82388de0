"""The options of each stage: one frozen dataclass per stage. The command line is made from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nla_engine.codec.rows import CODEC_NAMES
from nla_engine.errors import RequestError
from nla_engine.options import (
    AT_LEAST_0,
    AT_LEAST_1,
    AT_LEAST_2,
    UNICODE,
    Must,
    Options,
    check_local,
    json_values,
    named_values,
    one_of,
    option,
    whole_numbers,
)

#: auto: fused blocks and Triton on a GPU, else reference. fused: fused blocks anywhere. reference: the library's own
#: modules and torch attention, one synchronisation per step.
KERNELS = ("auto", "fused", "reference")
#: Matrix products of AV and AR: in the dtype of the weights, or quantised row by row to e4m3.
PRECISIONS = ("full", "fp8")
#: Where AV and AR live: together on the GPU, or one at a time.
RESIDENCIES = ("auto", "both", "turns")
#: Ways for a vector to enter an AV that can be named.
INJECTIONS = ("replace",)
#: Injection scales in words: raw and none leave a vector as it is, sqrt_d_model is the square root of the width.
SCALES = ("raw", "none", "sqrt_d_model")
POSITIONS = ("generated", "prompt", "all", "last")
#: What becomes of a document with too many tokens.
LONG = ("refuse", "cut", "windows")


def is_scale(value: str) -> bool:
    """Whether a text is an injection scale: a positive number, or a word of SCALES."""
    try:
        return value in SCALES or 0 < float(value) < math.inf
    except ValueError:
        return False


# Options that several stages have: each is written once.


def _temperature() -> Any:
    return option(
        "0: greedy. Above 0: sample from the softmax at this temperature.",
        0.0,
        must=Must(lambda value: math.isfinite(value) and value >= 0, "0 or more"),
    )


def _seed(help: str) -> Any:
    return option(help, 0, must=Must(lambda value: 0 <= value < 1 << 63, "0 to 2^63 - 1"))


def _variance(help: str) -> Any:
    return option(help, None, must=Must(lambda value: 0 < value <= 1, "above 0 and at most 1"))


def _batch_size(help: str) -> Any:
    return option(f"{help} [default: as many as fit in free memory]", None, must=AT_LEAST_1)


def _dtype() -> Any:
    return option("bfloat16 or float32. [default: bfloat16 on a GPU that supports it, else float32]", None)


def _device() -> Any:
    return option("cuda, cuda:N or cpu. [default: cuda if available]", None)


def _kernels() -> Any:
    return option(
        "auto: fused blocks on a GPU, reference on a CPU. fused: fused blocks on a CPU too. reference: the library's "
        "modules and torch attention.",
        "auto",
        must=one_of(KERNELS),
    )


def _resume(what: str) -> Any:
    return option(f"Resume an interrupted {what}.", False, excludes="overwrite")


def _trust_remote_code() -> Any:
    return option("Run Python code from the model's repository.", False)


@dataclass(frozen=True)
class CaptureOptions(Options):
    """Stage 1. See each field's help."""

    model: str = option("Base model: a local directory or a Hub id.", argument=True)
    prompts: Path = option(
        "Prompt file: .jsonl, .parquet, .csv or .tsv with a prompt or messages field, or .txt with one prompt per line."
    )
    layer: tuple[int, ...] = option(
        "Block whose output is captured, counted from 0. Several: join them with commas, or repeat the option.",
        must=Must(
            lambda layers: len(layers) > 0 and min(layers) >= 0, "one or several block numbers from 0 on"
        ),
        typed=list[str],
        parse=whole_numbers,
    )
    out: str = option(
        "The Zarr store to write: a directory, or s3://bucket/run.zarr.",
        must=Must(bool, "the name of a store"),
    )
    max_new_tokens: int = option(
        "Maximum number of tokens to generate per prompt; 0 only reads the prompt.", 128, must=AT_LEAST_0
    )
    positions: str | None = option(
        "Rows to keep: generated, prompt, all, last (the prompt's last token), or several joined by commas. "
        "[default: generated; all with --corpus]",
        None,
        must=Must(
            lambda names: all(name in POSITIONS for name in names.split(",")),
            f"of {', '.join(POSITIONS)}, joined by commas",
        ),
    )
    per_document: int | None = option(
        "Of these rows, keep this many of each document (or prompt), drawn by the seed and the document's number; "
        "all of them if there are fewer.",
        None,
        must=AT_LEAST_1,
    )
    min_position: int = option("Keep no rows of positions below this one.", 0, must=AT_LEAST_0)
    skip_special: bool = option("Keep no rows of special tokens.", False)
    codec: str = option("How rows are stored: int8, int4 or bf16.", "int8", must=one_of(CODEC_NAMES))
    batch_size: int | None = _batch_size("Sequences run at once.")
    temperature: float = _temperature()
    seed: int = _seed("Seed of the sampling and of --per-document.")
    chat: bool | None = option(
        "Render prompts through the chat template, or read them raw. [default: --chat if there is a template]",
        None,
        flags="--chat/--raw",
    )
    text_column: str | None = option(
        "Field of the records that holds the text; with a chat template, the user's message or a conversation. "
        "[default: prompt, text or messages]",
        None,
        must=Must(bool, "the name of a field"),
    )
    system: str | None = option(
        "System message of every conversation that has none of its own.", None, must=UNICODE
    )
    template_option: dict[str, Any] | None = option(
        "Variable of the chat template, as enable_thinking=false. Repeat for several. A record's own "
        "chat_template_kwargs come first.",
        None,
        typed=list[str] | None,
        parse=json_values,
    )
    corpus: bool = option(
        "Read existing text: raw, nothing is generated, the forward pass stops after the deepest layer.",
        False,
    )
    max_tokens: int | None = option(
        "Most tokens of a document, with --corpus. [default: the model's positions]", None, must=AT_LEAST_1
    )
    long: str = option(
        "What becomes of a longer document, with --corpus: refuse, cut (keep its beginning), or windows (split it into "
        "sequences of at most so many tokens).",
        "refuse",
        must=one_of(LONG),
    )
    dtype: str | None = _dtype()
    device: str | None = _device()
    kernels: str = _kernels()
    revision: str | None = option("Revision of a Hub model.", None)
    skip_bad: bool = option("Skip unusable prompt records and count them, instead of stopping.", False)
    resume: bool = _resume("capture")
    overwrite: bool = option("Replace a store that exists.", False)
    dry_run: bool = option(
        "Write nothing. Print the expected rows, bytes and time, measured on the first prompts.", False
    )
    host_memory: float = option(
        "GiB of host memory for the rows of finished sequences.",
        4.0,
        must=Must(lambda value: 0 < value < math.inf, "above 0, and finite"),
    )
    trust_remote_code: bool = _trust_remote_code()

    def __post_init__(self) -> None:
        if self.corpus:
            if self.chat:
                raise RequestError("--corpus reads text as it is: leave --chat out")
            if self.temperature or self.max_new_tokens not in (0, type(self).max_new_tokens):
                raise RequestError("--corpus generates nothing: leave --max-new-tokens and --temperature out")
            object.__setattr__(self, "chat", False)
            object.__setattr__(self, "max_new_tokens", 0)
        elif self.max_tokens is not None or self.long != "refuse":
            raise RequestError("--max-tokens and --long are for documents: give --corpus, or leave them out")
        if self.chat is False and (self.system is not None or self.template_option):
            raise RequestError(
                "--system and --template-option are for a chat template, and text is read as it is here: leave them out"
            )
        if self.positions is None:
            object.__setattr__(self, "positions", "all" if self.corpus else "generated")
        object.__setattr__(self, "layer", tuple(sorted(set(self.layer))))
        super().__post_init__()
        if self.max_new_tokens == 0 and self.positions == "generated":
            raise RequestError(
                "--positions generated keeps nothing when nothing is generated: use all, prompt or last"
            )


@dataclass(frozen=True)
class RoundtripOptions(Options):
    """Stage 2. See each field's help."""

    store: str = option("The store that capture wrote: a directory, or s3://bucket/run.zarr.", argument=True)
    av: str = option("Verbalizer (AV): a local directory or a Hub id.")
    ar: str = option("Reconstructor (AR): a local directory or a Hub id.")
    out: Path = option("The Parquet file to write.")
    layer: int | None = option("Layer of the store to read. [default: the one the AV was trained on]", None)
    where: str | None = option(
        "Rows to explain, as an expression: \"generated and token matches '[0-9]'\".", None
    )
    limit: int | None = option(
        "At most this many rows, evenly spread over the selected ones.", None, must=AT_LEAST_1
    )
    samples: int = option(
        "Explanations per row; the best by cos is marked. More than 1 needs a temperature.",
        1,
        must=AT_LEAST_1,
    )
    temperature: float = _temperature()
    seed: int = _seed("Seed of the sampling and of the controls.")
    max_new_tokens: int = option("Longest explanation, in tokens.", 200, must=AT_LEAST_1)
    variance: float | None = _variance(
        "Var of fve_nrm, such as a published training value. [default: measured on the store's rows]"
    )
    injection_scale: str | None = option(
        "Norm of the injected vectors, in place of the sidecar's: a number, raw (as they are) or sqrt_d_model.",
        None,
        must=Must(is_scale, f"a positive number or one of {', '.join(SCALES)}"),
    )
    injection: str | None = option(
        "How vectors enter the AV where its sidecar does not say: replace (the marker's embedding).",
        None,
        must=one_of(INJECTIONS),
    )
    template_value: tuple[tuple[str, str], ...] = option(
        "Value of a further hole in the sidecars' templates, as depth_pct=57. Repeat for several.",
        (),
        typed=list[str],
        parse=named_values,
    )
    batch_size: int | None = _batch_size("Explanations generated at once.")
    follow: bool = option("Follow a store that is still being written, until its writer has finished.", False)
    residency: str = option(
        "AV and AR on the GPU: both (at once), turns (one at a time), or auto (both if they fit).",
        "auto",
        must=one_of(RESIDENCIES),
    )
    precision: str = option(
        "Matrix products of AV and AR: full (in --dtype), or fp8 (faster, nearly the same scores: docs/roundtrip.md).",
        "full",
        must=one_of(PRECISIONS),
    )
    dtype: str | None = _dtype()
    device: str | None = _device()
    kernels: str = _kernels()
    resume: bool = _resume("round trip")
    overwrite: bool = option("Replace a result that exists.", False)
    trust_remote_code: bool = _trust_remote_code()

    def __post_init__(self) -> None:
        super().__post_init__()
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


@dataclass(frozen=True)
class MultiplicationOptions(Options):
    """`study multiplication`. See each field's help."""

    out: Path = option("Directory for the stores, tables, figures and the page.")
    model: str | None = option("Base model: a directory or a Hub id. [default: the bundled one]", None)
    av: str | None = option("Verbalizer (AV) of its activations. [default: the bundled one]", None)
    ar: str | None = option("Reconstructor (AR) of its activations. [default: the bundled one]", None)
    layer: int | None = option(
        "Layer that AV and AR were made for. [default: the bundled models' 5]", None, must=AT_LEAST_0
    )
    problems: int = option("Number of multiplications.", 200, must=AT_LEAST_2)
    first: str = option("Values of the first operand.", "10-99")
    second: str = option("Values of the second operand.", "10-99")
    phrasings: str = option(
        "Phrasings of the question, joined by commas.", "what,command,find,formula,much,story"
    )
    split: str | None = option(
        "Operand pairs that the bundled AV and AR never saw (held_out), saw (trained), or any. "
        "[default: held_out; any with other models]",
        None,
        must=one_of(("held_out", "trained", "any"), "held_out, trained or any"),
    )
    seed: int = _seed("Seed of the problems, the samples, the controls and the intervals.")
    rows: str = option(
        "Rows to explain: answer (the rows in and next to the answer) or generated (every generated row).",
        "answer",
        must=one_of(("answer", "generated"), "answer or generated"),
    )
    max_new_tokens: int = option("Longest reply, in tokens.", 128, must=AT_LEAST_1)
    explanation_tokens: int = option("Longest explanation, in tokens.", 200, must=AT_LEAST_1)
    ablated_problems: int = option(
        "Number of problems whose explanations are read again clause by clause.", 96, must=AT_LEAST_0
    )
    samples: int = option(
        "Explanations per row, to measure how far samples agree; 0 skips this.",
        4,
        must=Must(lambda value: value == 0 or value >= 2, "2 or more, or 0"),
    )
    temperature: float = option(
        "Temperature of those samples; every other explanation is greedy.",
        0.7,
        must=Must(lambda value: math.isfinite(value) and value > 0, "above 0"),
    )
    sampled_problems: int = option("Number of problems whose rows are sampled.", 48, must=AT_LEAST_2)
    variance: float | None = _variance(
        "Var of FVE, such as a published training value. [default: measured on the store's rows]"
    )
    batch_size: int | None = _batch_size("Sequences run at once, in both stages.")
    dtype: str | None = _dtype()
    device: str | None = _device()
    kernels: str = _kernels()
    resume: bool = _resume("study")
    overwrite: bool = option("Replace a study that exists.", False)
    trust_remote_code: bool = _trust_remote_code()

    def __post_init__(self) -> None:
        given = [name for name in ("model", "av", "ar", "layer") if getattr(self, name) is not None]
        if given and len(given) < 4:
            raise RequestError(
                "--model, --av, --ar and --layer belong together: give all four, or none for the bundled models"
            )
        super().__post_init__()
        if given and self.split not in (None, "any"):
            raise RequestError(
                f"--split {self.split}: which pairs were held out is known only for the bundled models; leave it out"
            )
