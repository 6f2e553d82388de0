"""The options of ask: questions to a model that answers them about stored activations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nla_engine import fields, pair_fields
from nla_engine.errors import RequestError
from nla_engine.fields import check_cuts, check_samples, check_table
from nla_engine.options import AT_LEAST_1, UNICODE, Must, Options, check_local, option
from nla_engine.pair_fields import INJECT, QUESTION


@dataclass(frozen=True)
class AskOptions(Options):
    """`ask`. See each field's help."""

    store: str = fields.store()
    oracle: str = option(
        "Activation oracle or LatentQA decoder: a local directory or a Hub id (owner/name, or owner/name/folder)."
    )
    out: Path = fields.table()
    question: tuple[str, ...] = option(
        "Question to ask about every selected row. Repeat for several.",
        (),
        must=Must(lambda texts: len(set(texts)) == len(texts), "each question once"),
        excludes="questions",
        typed=list[str],
        parse=lambda name, given: tuple(given),
    )
    questions: Path | None = option(
        "A question for rows of your choice: .jsonl or .parquet with fields question, and row (a number) or rows (a "
        "list, all in one prompt).",
        None,
    )
    injection: str | None = pair_fields.injection(
        "How vectors enter the oracle, which its directory does not say: add@1 (activation oracles), replace@0 "
        "(LatentQA), or any replace, replace@L or add@L."
    )
    norm_match: bool = pair_fields.norm_match()
    injection_scale: str | None = pair_fields.injection_scale(
        "Norm of the injected vectors: a number, raw (as they are: LatentQA) or sqrt_d_model."
    )
    layer: int | None = option("Layer of the store to read. [default: the store's only one]", None)
    site: str = fields.site()
    where: str | None = fields.where("ask about")
    rows_per_prompt: int = option(
        "Rows in one prompt: so many consecutive selected rows of a sequence. Its last prompt may have fewer.",
        1,
        must=AT_LEAST_1,
    )
    limit: int | None = option(
        "At most this many prompts per question, evenly spread over the selected rows.", None, must=AT_LEAST_1
    )
    prompt: str | None = option(
        "Message to the oracle, with <INJECT> where the vectors enter (once for all of them, or once for each) and "
        "<QUESTION>. [default: that of activation oracles, 'Layer: K', '<INJECT> ' and '<QUESTION>' on three lines]",
        None,
        must=UNICODE,
    )
    placeholder: str = option(
        "Text that stands in the prompt for each vector, one token long. LatentQA: '? '.",
        " ?",
        must=Must(lambda text: question_fault(text) is None, "a text other than spaces"),
    )
    raw: bool = option(
        "Read --prompt as it stands, without a chat template: it holds all turns and special tokens itself.",
        False,
    )
    system: str | None = pair_fields.system()
    template_option: dict[str, Any] | None = pair_fields.template_option()
    prefill: str = pair_fields.prefill()
    samples: int = fields.samples("Answers per question and prompt.")
    temperature: float = fields.temperature()
    top_p: float | None = fields.top_p()
    top_k: int | None = fields.top_k()
    min_p: float | None = fields.min_p()
    seed: int = fields.seed("Seed of the sampling.")
    max_new_tokens: int = option("Longest answer, in tokens.", 100, must=AT_LEAST_1)
    oracle_base: str | None = fields.base("the oracle")
    batch_size: int | None = fields.batch_size("Answers generated at once.")
    precision: str = fields.precision("the oracle")
    dtype: str | None = fields.dtype()
    device: str | None = fields.device()
    kernels: str = fields.kernels()
    resume: bool = fields.resume("run")
    overwrite: bool = fields.replace()
    dry_run: bool = fields.dry_run()
    trust_remote_code: bool = fields.trust_remote_code()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_local(*filter(None, [self.questions]))
        check_table(self)
        check_samples(self)
        check_cuts(self)
        self._check_questions()
        self._check_injection()
        self._check_prompt()

    def _check_questions(self) -> None:
        if not self.question and self.questions is None:
            raise RequestError("no question: give --question, or --questions with a file of them")
        for text in self.question:
            if fault := question_fault(text):
                raise RequestError(f"--question {text!a} {fault}")
        given = [
            flag
            for flag, is_given in (
                ("--where", self.where is not None),
                ("--limit", self.limit is not None),
                ("--rows-per-prompt", self.rows_per_prompt != 1),
            )
            if is_given
        ]
        if self.questions is not None and given:
            raise RequestError(f"--questions names its rows itself: leave {' and '.join(given)} out")

    def _check_injection(self) -> None:
        if self.injection is None:
            raise RequestError(
                "--injection is missing, and an oracle's directory does not say how vectors enter: give add@1 "
                "--norm-match for an activation oracle, replace@0 --injection-scale raw for a LatentQA decoder"
            )
        if not self.norm_match and self.injection_scale is None:
            raise RequestError(
                f"--injection {self.injection} needs a norm for the vectors: give --norm-match (activation oracles) or "
                "--injection-scale (raw for LatentQA)"
            )

    def _check_prompt(self) -> None:
        if self.prompt is not None:
            for hole, most in ((INJECT, None), (QUESTION, 1)):
                count = self.prompt.count(hole)
                if not count or (most and count > most):
                    times = f"{count} times" if count else "nowhere"
                    raise RequestError(f"--prompt holds {hole} {times}: put it in {'once' if most else 'it'}")
        if self.raw and self.prompt is None:
            raise RequestError("--raw goes with --prompt, which holds all that the oracle reads: give it too")
        if self.raw and (self.system is not None or self.template_option):
            raise RequestError("--raw reads no chat template: leave --system and --template-option out")


def question_fault(text: str) -> str | None:
    """What is wrong with a question, worded to follow it; None if nothing is."""
    if not text.strip():
        return "is empty: write a question"
    if not UNICODE.holds(text):
        return "holds half of a surrogate pair, which is no character"
    for hole in (INJECT, QUESTION):
        if hole in text:
            return f"holds {hole}, which has a meaning in prompts: leave it out"
    return None
