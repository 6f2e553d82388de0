"""The options of train: which rows and texts, how AV and AR are trained on them, for how long."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from nla_engine import fields
from nla_engine.errors import RequestError
from nla_engine.options import AT_LEAST_0, AT_LEAST_1, AT_LEAST_2, Must, Options, check_local, one_of, option
from nla_engine.pair_fields import SCALES, is_scale

METHODS = ("lora", "full")
_RATE = Must(lambda value: math.isfinite(value) and 0 < value <= 1, "above 0 and at most 1")
_POSITIVE = Must(lambda value: math.isfinite(value) and value > 0, "above 0")


@dataclass(frozen=True)
class TrainOptions(Options):
    """`train`. See each field's help."""

    store: str = fields.store()
    out: Path = option(
        "Directory to write: av and ar in it are the pair, log.jsonl is the course of the training."
    )
    model: str | None = option(
        "Model that AV and AR start from: a local directory or a Hub id. [default: the captured model]", None
    )
    layer: int | None = option("Layer of the store to train on. [default: the store's only one]", None)
    where: str | None = fields.where("train on")
    limit: int | None = fields.limit()
    texts: Path | None = option(
        "The text of each row, for the warm start: .parquet or .jsonl with fields row and text, or a table of explain "
        "or roundtrip. [default: texts by rule, see docs/training.md]",
        None,
        excludes="text_field",
    )
    text_field: str | None = option(
        "Or the field of the rows' records that holds it, where a record has one row: so does imported training data.",
        None,
    )
    held_out: float = option(
        "Part of the documents that is held out: measured, never trained on.",
        0.05,
        must=Must(lambda value: 0 < value < 1, "between 0 and 1"),
    )
    method: str = option(
        "lora: train a low-rank change of every linear layer, and write adapters. full: train every weight, and write "
        "whole checkpoints.",
        "lora",
        must=one_of(METHODS),
    )
    av_rank: int = option("Rank of the AV's LoRA.", 16, must=AT_LEAST_1)
    ar_rank: int = option("Rank of the AR's LoRA.", 16, must=AT_LEAST_1)
    ar_steps: int = option("Supervised steps of the AR.", 3000, must=AT_LEAST_0)
    av_steps: int = option("Supervised steps of the AV.", 4000, must=AT_LEAST_0)
    rl_steps: int = option("Steps of reinforcement.", 400, must=AT_LEAST_0)
    batch_size: int = option("Rows of a supervised step.", 256, must=AT_LEAST_1)
    rate: float = option("Highest learning rate of supervised steps.", 5e-4, must=_RATE)
    vectors: int = option("Rows of a step of reinforcement.", 64, must=AT_LEAST_1)
    samples: int = option(
        "Texts of each of these rows, which are compared with each other.", 8, must=AT_LEAST_2
    )
    rl_rate: float = option("Highest learning rate of reinforcement.", 1e-4, must=_RATE)
    kl: float = option(
        "Weight of the KL term that keeps the AV near its warm start; 0: none. Needs --method lora.",
        0.02,
        must=Must(lambda value: math.isfinite(value) and value >= 0, "0 or more"),
    )
    budget: float | None = option(
        "Minutes of training in all: each phase ends with its part of them, and its rate falls to zero by then. "
        "[default: until the steps are done]",
        None,
        must=_POSITIVE,
    )
    max_new_tokens: int = option("Longest text, in tokens, with its tags.", 96, must=AT_LEAST_2)
    injection_scale: str = option(
        f"Norm with which vectors enter the AV: a number, or one of {', '.join(SCALES)}.",
        "sqrt_d_model",
        must=Must(is_scale, f"a positive number, or one of {', '.join(SCALES)}"),
    )
    measured_rows: int = option("Held-out rows that are measured.", 512, must=AT_LEAST_2)
    measures: int = option("How often they are measured in a phase.", 4, must=AT_LEAST_1)
    checkpoint_steps: int = option(
        "Steps between checkpoints, from which --resume goes on.", 500, must=AT_LEAST_1
    )
    tokens_at_once: int = option(
        "Tokens of one pass with gradients; a step takes as many passes as it needs.", 16384, must=AT_LEAST_1
    )
    slots: int = option("Texts that the engine writes at once.", 512, must=AT_LEAST_1)
    seed: int = fields.seed("Seed of everything that is drawn.")
    device: str | None = fields.device()
    resume: bool = fields.resume("training")
    overwrite: bool = fields.replace()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_local(self.out)
        if self.method == "full" and self.kl and self.rl_steps:
            raise RequestError("--kl needs --method lora: pass --kl 0 where every weight is trained")
        if not self.ar_steps + self.av_steps + self.rl_steps:
            raise RequestError("--ar-steps, --av-steps and --rl-steps are all 0: nothing would be trained")
