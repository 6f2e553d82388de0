"""The options of stage 1, capture."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nla_engine import fields
from nla_engine.codec.rows import CODEC_NAMES
from nla_engine.errors import RequestError
from nla_engine.options import (
    AT_LEAST_0,
    AT_LEAST_1,
    UNICODE,
    Must,
    Options,
    json_values,
    one_of,
    option,
    whole_numbers,
)

POSITIONS = ("generated", "prompt", "all", "last")
#: What becomes of a document with too many tokens.
LONG = ("refuse", "cut", "windows")


@dataclass(frozen=True)
class CaptureOptions(Options):
    """Stage 1. See each field's help."""

    model: str = option("Base model, or an adapter of one: a local directory or a Hub id.", argument=True)
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
    kernels: str = fields.kernels()
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
        object.__setattr__(self, "layer", tuple(sorted(set(self.layer))))
        super().__post_init__()
        if self.max_new_tokens == 0 and self.positions == "generated":
            raise RequestError(
                "--positions generated keeps nothing when nothing is generated: use all, prompt or last"
            )
