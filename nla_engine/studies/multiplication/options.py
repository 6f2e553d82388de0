"""The options of `study multiplication`. The command line is made from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from nla_engine import fields
from nla_engine.errors import RequestError
from nla_engine.options import AT_LEAST_0, AT_LEAST_1, AT_LEAST_2, Must, Options, one_of, option


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
        "Number of problems whose explanations are read again clause by clause.", 48, must=AT_LEAST_0
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
    gpus: str | None = fields.gpus()
    workers: int = fields.workers()
    kernels: str = fields.kernels()
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
