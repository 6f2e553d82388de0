"""The options of each stage: one frozen dataclass per stage. The command line is made from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nla_engine import fields
from nla_engine.codec.rows import CODEC_NAMES, SINK_FACTOR
from nla_engine.errors import RequestError
from nla_engine.options import (
    AT_LEAST_0,
    AT_LEAST_1,
    AT_LEAST_2,
    UNICODE,
    Must,
    Options,
    block_numbers,
    check_local,
    check_pattern,
    json_values,
    one_of,
    option,
)

#: auto: fused blocks and Triton on a GPU, else reference. fused: fused blocks anywhere. reference: the library's own
#: modules and torch attention, one synchronisation per step.
KERNELS = ("auto", "fused", "reference")
#: Matrix products of AV and AR: in the dtype of the weights, or quantised row by row to e4m3.
PRECISIONS = ("full", "fp8")
#: Where AV and AR live: together on the GPU, or one at a time.
RESIDENCIES = ("auto", "both", "turns")
POSITIONS = ("generated", "prompt", "all", "last")
#: What becomes of a document with too many tokens.
LONG = ("refuse", "cut", "windows")


def _kernels() -> Any:
    return option(
        "auto: fused blocks on a GPU, reference on a CPU. fused: fused blocks on a CPU too. reference: the library's "
        "modules and torch attention.",
        "auto",
        must=one_of(KERNELS),
    )


def _precision(models: str) -> Any:
    return option(
        f"Matrix products of {models}: full (in --dtype), or fp8 (faster, nearly the same scores: docs/roundtrip.md).",
        "full",
        must=one_of(PRECISIONS),
    )


@dataclass(frozen=True)
class CaptureOptions(Options):
    """Stage 1. See each field's help."""

    model: str = option("Base model, or an adapter of one: a local directory or a Hub id.", argument=True)
    prompts: Path = option(
        "Prompt file: .jsonl, .parquet, .csv or .tsv with a prompt or messages field, or .txt with one prompt per line."
    )
    layer: tuple[int, ...] | str = option(
        "Block whose output is captured, counted from 0; a range, such as 5-20; or all. Several: join them with "
        "commas, or repeat the option.",
        typed=list[str],
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
    tokens: str | None = option(
        "Keep only rows of tokens in whose text this regular expression is found, as token matches '...' of --where.",
        None,
        must=UNICODE,
    )
    every: int = option(
        "Keep only rows of positions that this number divides: every N-th.", 1, must=AT_LEAST_1
    )
    skip_first: bool = option("Keep no row of the first token of a sequence.", False)
    skip_sinks: bool = option(
        f"Keep no rows of attention sinks: norm above {SINK_FACTOR:g} times the median in any of the layers.",
        False,
    )
    codec: str = option("How rows are stored: int8, int4 or bf16.", "int8", must=one_of(CODEC_NAMES))
    batch_size: int | None = fields.batch_size("Sequences run at once.")
    temperature: float = fields.temperature()
    seed: int = fields.seed("Seed of the sampling and of --per-document.")
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
    dtype: str | None = fields.dtype()
    device: str | None = fields.device()
    kernels: str = _kernels()
    revision: str | None = option("Revision of a Hub model.", None)
    base: str | None = fields.base("MODEL")
    skip_bad: bool = option("Skip unusable prompt records and count them, instead of stopping.", False)
    resume: bool = fields.resume("capture")
    overwrite: bool = option("Replace a store that exists.", False)
    dry_run: bool = option(
        "Write nothing. Print the expected rows, bytes and time, measured on the first prompts.", False
    )
    host_memory: float = option(
        "GiB of host memory for the rows of finished sequences.",
        4.0,
        must=Must(lambda value: 0 < value < math.inf, "above 0, and finite"),
    )
    trust_remote_code: bool = fields.trust_remote_code()

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
        object.__setattr__(self, "layer", block_numbers("layer", self.layer))
        super().__post_init__()
        check_pattern("tokens", self.tokens)
        if self.max_new_tokens == 0 and self.positions == "generated":
            raise RequestError(
                "--positions generated keeps nothing when nothing is generated: use all, prompt or last"
            )


@dataclass(frozen=True)
class RoundtripOptions(Options):
    """Stage 2. See each field's help."""

    store: str = fields.store()
    av: str = fields.av()
    ar: str = fields.ar()
    out: Path = fields.table()
    layer: int | None = fields.layer("AV")
    where: str | None = fields.where()
    limit: int | None = fields.limit()
    samples: int = fields.samples("Explanations per row; the best by cos is marked.")
    temperature: float = fields.temperature()
    seed: int = fields.seed("Seed of the sampling and of the controls.")
    max_new_tokens: int = fields.explanation_tokens()
    variance: float | None = fields.store_variance()
    injection_scale: str | None = fields.injection_scale()
    injection: str | None = fields.injection()
    norm_match: bool = fields.norm_match()
    prompt: str | None = fields.prompt("the AV")
    system: str | None = fields.system()
    template_option: dict[str, Any] | None = fields.template_option()
    prefill: str = fields.prefill()
    template_value: tuple[tuple[str, str], ...] = fields.template_value()
    av_base: str | None = fields.base("the AV")
    ar_base: str | None = fields.base("the AR")
    batch_size: int | None = fields.batch_size("Explanations generated at once.")
    follow: bool = fields.follow()
    residency: str = option(
        "AV and AR on the GPU: both (at once), turns (one at a time), or auto (both if they fit).",
        "auto",
        must=one_of(RESIDENCIES),
    )
    precision: str = _precision("AV and AR")
    dtype: str | None = fields.dtype()
    device: str | None = fields.device()
    kernels: str = _kernels()
    resume: bool = fields.resume("round trip")
    overwrite: bool = fields.replace()
    trust_remote_code: bool = fields.trust_remote_code()

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_table(self)
        _check_words(self)


@dataclass(frozen=True)
class ExplainOptions(Options):
    """The first half of stage 2: an AV alone. See each field's help."""

    store: str = fields.store()
    av: str = fields.av()
    out: Path = fields.table()
    layer: int | None = fields.layer("AV")
    where: str | None = fields.where()
    limit: int | None = fields.limit()
    samples: int = fields.samples("Explanations per row.")
    temperature: float = fields.temperature()
    seed: int = fields.seed("Seed of the sampling.")
    max_new_tokens: int = fields.explanation_tokens()
    injection_scale: str | None = fields.injection_scale()
    injection: str | None = fields.injection()
    norm_match: bool = fields.norm_match()
    prompt: str | None = fields.prompt("the AV")
    system: str | None = fields.system()
    template_option: dict[str, Any] | None = fields.template_option()
    prefill: str = fields.prefill()
    template_value: tuple[tuple[str, str], ...] = fields.template_value()
    av_base: str | None = fields.base("the AV")
    batch_size: int | None = fields.batch_size("Explanations generated at once.")
    follow: bool = fields.follow()
    precision: str = _precision("the AV")
    dtype: str | None = fields.dtype()
    device: str | None = fields.device()
    kernels: str = _kernels()
    resume: bool = fields.resume("run")
    overwrite: bool = fields.replace()
    trust_remote_code: bool = fields.trust_remote_code()

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_table(self)
        _check_words(self)


@dataclass(frozen=True)
class ScoreOptions(Options):
    """The second half of stage 2: an AR alone, on given texts. See each field's help."""

    store: str = fields.store()
    ar: str = fields.ar()
    texts: Path = option(
        "The texts: .parquet or .jsonl with fields row and text, or the table of explain or roundtrip."
    )
    out: Path = fields.table()
    layer: int | None = fields.layer("AR")
    seed: int = fields.seed("Seed of the controls.")
    variance: float | None = fields.store_variance()
    template_value: tuple[tuple[str, str], ...] = fields.template_value()
    ar_base: str | None = fields.base("the AR")
    precision: str = _precision("the AR")
    dtype: str | None = fields.dtype()
    device: str | None = fields.device()
    kernels: str = _kernels()
    resume: bool = fields.resume("run")
    overwrite: bool = fields.replace()
    trust_remote_code: bool = fields.trust_remote_code()

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_table(self)
        check_local(self.texts)


#: Options of the commands of stage 2: of those that write texts, of those that score them, of all.
WritingOptions = ExplainOptions | RoundtripOptions
ScoringOptions = ScoreOptions | RoundtripOptions
StageTwoOptions = ExplainOptions | ScoreOptions | RoundtripOptions


def _check_table(options: StageTwoOptions) -> None:
    check_local(options.out)
    if options.precision == "fp8" and options.kernels == "reference":
        raise RequestError("--precision fp8 has no reference kernels: leave one of the two out")


def _check_words(options: WritingOptions) -> None:
    if options.norm_match and options.injection is None:
        raise RequestError("--norm-match goes with --injection, such as add@1: give it too, or leave it out")
    if options.system is not None and options.prompt is None:
        raise RequestError("--system goes with --prompt: the AV's own prompt has none")
    if options.follow and options.limit is not None:
        raise RequestError(
            "--limit spreads over all rows, and --follow does not know them yet: leave one of the two out"
        )
    if options.samples > 1 and options.temperature == 0:
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
    seed: int = fields.seed("Seed of the problems, the samples, the controls and the intervals.")
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
    variance: float | None = fields.variance(
        "Var of FVE, such as a published training value. [default: measured on the store's rows]"
    )
    batch_size: int | None = fields.batch_size("Sequences run at once, in both stages.")
    dtype: str | None = fields.dtype()
    device: str | None = fields.device()
    kernels: str = _kernels()
    resume: bool = fields.resume("study")
    overwrite: bool = option("Replace a study that exists.", False)
    trust_remote_code: bool = fields.trust_remote_code()

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
