"""The options of stage 1, capture."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nla_engine import fields
from nla_engine.codec.rows import CODEC_NAMES, SINK_FACTOR
from nla_engine.errors import RequestError
from nla_engine.fields import check_cuts
from nla_engine.options import (
    AT_LEAST_0,
    AT_LEAST_1,
    UNICODE,
    Must,
    Options,
    block_numbers,
    check_local,
    check_pattern,
    json_values,
    one_of,
    option,
    paths,
    texts,
    whole_number_or_max,
)
from nla_engine.sites import RESID_POST, part_names

POSITIONS = ("generated", "prompt", "all", "last")
#: What a prompt file can be.
PROMPT_FORMATS = ("jsonl", "csv", "tsv", "txt", "parquet", "whole")
#: What becomes of a document with too many tokens.
LONG = ("refuse", "cut", "windows")
#: Of a row: more would outweigh its vector.
MOST_NEXT_TOKENS = 1024


@dataclass(frozen=True)
class CaptureOptions(Options):
    """Stage 1. See each field's help."""

    model: str = option("Base model, or an adapter of one: a local directory or a Hub id.", argument=True)
    prompts: tuple[Path, ...] = option(
        "Prompt file: .jsonl, .parquet, .csv or .tsv with a prompt or messages field, or .txt with a prompt per line; "
        "a directory of such files; or - for standard input. Repeat for several.",
        must=Must(bool, "one or several files"),
        typed=list[str],
        parse=paths,
    )
    layer: tuple[int, ...] | str = option(
        "Block whose output is captured, counted from 0; a range, such as 5-20; or all. Several: join them with "
        "commas, or repeat the option.",
        typed=list[str],
        parse=block_numbers,
    )
    out: str = option(
        "The Zarr store to write: a directory, or s3://bucket/run.zarr.",
        must=Must(bool, "the name of a store"),
    )
    sites: tuple[str, ...] = option(
        "What is captured of each of these blocks: resid_post (the block's output), resid_mid (the residual stream "
        "between attention and MLP), attn_out and mlp_out (what these add to it); and embeddings (the input of block "
        "0). Several: join them with commas, or repeat the option.",
        (RESID_POST,),
        typed=list[str],
        parse=part_names,
    )
    max_new_tokens: int | str = option(
        "Maximum number of tokens to generate per prompt; 0 only reads the prompt; max goes on to the end of the "
        "model's context.",
        128,
        typed=str,
        parse=whole_number_or_max,
    )
    replies: int = option(
        "Replies to each prompt, each a sequence of its own. More than 1 needs a temperature.",
        1,
        must=AT_LEAST_1,
    )
    stop: tuple[str, ...] = option(
        "Text that ends a reply as soon as the reply contains it. Repeat for several.",
        (),
        must=Must(
            lambda texts: all(text and UNICODE.holds(text) for text in texts), "text in UTF-8, and not empty"
        ),
        typed=list[str],
        parse=texts,
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
    next_token: int | None = option(
        "Beside each row, store the log-probability of the token that follows, and this many of the likeliest tokens "
        "with theirs. 0: the log-probability alone.",
        None,
        must=Must(lambda count: 0 <= count <= MOST_NEXT_TOKENS, f"0 to {MOST_NEXT_TOKENS}"),
    )
    codec: str = option("How rows are stored: int8, int4 or bf16.", "int8", must=one_of(CODEC_NAMES))
    batch_size: int | None = fields.batch_size("Sequences run at once.")
    temperature: float = fields.temperature()
    top_p: float | None = fields.top_p()
    top_k: int | None = fields.top_k()
    min_p: float | None = fields.min_p()
    seed: int = fields.seed("Seed of the sampling and of --per-document.")
    chat: bool | None = option(
        "Render prompts through the chat template, or read them raw. [default: --chat if there is a template]",
        None,
        flags="--chat/--raw",
    )
    prompt_format: str | None = option(
        "What every prompt file is: jsonl, csv, tsv, txt, parquet, or whole (each file is one text). [default: as its "
        "suffix says; jsonl on standard input]",
        None,
        must=one_of(PROMPT_FORMATS),
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
    prefill: str | None = option(
        "Beginning of every reply, which the model continues. A record's own prefill comes first.",
        None,
        must=Must(lambda text: bool(text.strip()) and UNICODE.holds(text), "text in UTF-8, and not blank"),
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
    gpus: str | None = fields.gpus()
    workers: int = fields.workers()
    kernels: str = fields.kernels()
    revision: str | None = option("Revision of a Hub model.", None)
    base: str | None = fields.base("MODEL")
    skip_bad: bool = option("Skip unusable prompt records and count them, instead of stopping.", False)
    resume: bool = fields.resume("capture")
    overwrite: bool = option("Replace a store that exists.", False)
    keep_partial: bool = option(
        "If the run is interrupted or fails, write the rows of replies that have not ended to a store of their own: "
        "run.partial.zarr beside run.zarr.",
        False,
    )
    dry_run: bool = option(
        "Write nothing. Print the expected rows, bytes and time, measured on the first prompts.", False
    )
    host_memory: float = option(
        "GiB of host memory for rows that are not in the store yet. Running sequences may have more: these wait in "
        "temporary files beside the store.",
        4.0,
        must=Must(lambda value: 0 < value < math.inf, "above 0, and finite"),
    )
    trust_remote_code: bool = fields.trust_remote_code()

    def __post_init__(self) -> None:
        if isinstance(self.prompts, str | Path):
            object.__setattr__(self, "prompts", (Path(self.prompts),))
        check_local(*self.prompts)
        new = whole_number_or_max("max_new_tokens", self.max_new_tokens)
        object.__setattr__(self, "max_new_tokens", new)
        if self.corpus:
            if self.chat:
                raise RequestError("--corpus reads text as it is: leave --chat out")
            if self.temperature or self.max_new_tokens not in (0, type(self).max_new_tokens):
                raise RequestError("--corpus generates nothing: leave --max-new-tokens and --temperature out")
            object.__setattr__(self, "chat", False)
            object.__setattr__(self, "max_new_tokens", 0)
        elif self.max_tokens is not None or self.long != "refuse":
            raise RequestError("--max-tokens and --long are for documents: give --corpus, or leave them out")
        if self.chat is False and (
            self.system is not None or self.template_option or self.prefill is not None
        ):
            raise RequestError(
                "--system, --prefill and --template-option are for a chat template, and text is read as it is here: "
                "leave them out"
            )
        if self.max_new_tokens == 0 and (self.replies > 1 or self.stop or self.keep_partial):
            raise RequestError(
                "--replies, --stop and --keep-partial are for replies, and nothing is generated: leave them out"
            )
        if self.replies > 1 and self.temperature == 0:
            raise RequestError(
                "--replies above 1 would generate one greedy reply several times: give a --temperature"
            )
        if self.positions is None:
            object.__setattr__(self, "positions", "all" if self.corpus else "generated")
        object.__setattr__(self, "layer", block_numbers("layer", self.layer))
        object.__setattr__(self, "sites", part_names("sites", self.sites))
        super().__post_init__()
        check_pattern("tokens", self.tokens)
        check_cuts(self)
        if self.max_new_tokens == 0 and self.positions == "generated":
            raise RequestError(
                "--positions generated keeps nothing when nothing is generated: use all, prompt or last"
            )

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "prompts": ", ".join(map(str, self.prompts))}
