"""What `ask` would write and how long it would take: its checks, and a few of its answers. Writes no files."""

from __future__ import annotations

import time
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from nla_engine.config import AskOptions
from nla_engine.engine.forecast import Forecast
from nla_engine.progress import Announce, Phases, Progress
from nla_engine.roundtrip.ask import Answer, AskRun, prepare_ask
from nla_engine.roundtrip.far import AT_ONCE
from nla_engine.roundtrip.results import ANSWERS, ResultTable
from nla_engine.roundtrip.sample import (
    SAMPLE,
    SHORT,
    WRITE_SECONDS,
    Enough,
    Timed,
    Timing,
    bytes_per_token,
    evenly,
    first_prompt,
    table_bytes,
)


@dataclass(frozen=True)
class AskEstimate:
    """rows, questions, prompts, answers: all that the run is about; already_done: answers that an earlier run left.

    seconds_expected: of writing what is left; None if the sample was too short to say
    load_seconds: to load the oracle and check everything; bytes_expected: of the table
    sample_answers, sample_seconds: what was measured
    """

    layer: int | str
    rows: int
    questions: int
    prompts: int
    answers: int
    already_done: int
    seconds_expected: float | None
    answers_per_second: float | None
    tokens_per_answer: float | None
    bytes_expected: int | None
    load_seconds: float
    sample_answers: int
    sample_seconds: float

    def to_dict(self) -> dict[str, Any]:
        return {"dry_run": True, **asdict(self)}


def estimate_ask(options: AskOptions, announce: Announce = lambda text: None) -> AskEstimate:
    """Load and check all that a run would, and time a few answers. Raises what the run would raise before it writes."""
    started = time.perf_counter()
    run = prepare_ask(replace(options, dry_run=False), announce, Phases(Progress()))
    done = ResultTable.done_before(options.out, run.identity(), overwrite=options.overwrite)
    load_seconds = time.perf_counter() - started
    announce(str(run))
    announce(first_prompt("oracle", run.writer.lm.tokenizer, run.prompt(0).token_ids))
    samples, prompts = options.samples, len(run.questions)
    whole = prompts * samples
    left = np.arange(done // samples, prompts)
    answers, timing = _measure(run, left) if len(left) else ([], Timing(0.0, 0.0, 0.0))
    size = None
    if answers:
        texts, n_tokens = [each.text for each in answers], [each.n_tokens for each in answers]
        more = max(timing.tokens - float(np.mean(n_tokens)), 0.0) * bytes_per_token(texts, n_tokens)
        size = table_bytes(pa.table(run.columns(answers), schema=ANSWERS), whole) + more * whole
    seconds, all_left = timing.seconds, len(left) * samples
    return AskEstimate(
        layer=run.layer.key,
        rows=run.rows,
        questions=len(run.questions.texts),
        prompts=prompts,
        answers=whole,
        already_done=done,
        seconds_expected=None if seconds is None else round(seconds, 3),
        answers_per_second=round(all_left / seconds, 2) if seconds else None,
        tokens_per_answer=round(timing.tokens, 1) if len(left) else None,
        bytes_expected=None if size is None else round(size),
        load_seconds=round(load_seconds, 1),
        sample_answers=len(answers),
        sample_seconds=round(timing.took, 3),
    )


def _measure(
    run: AskRun, left: np.ndarray, most_seconds: float = WRITE_SECONDS
) -> tuple[list[Answer], Timing]:
    """Some answers to the prompts that are left, as far as the time reaches, and what they say of all these."""
    options, device = run.options, run.writer.lm.device.type
    sound = left[run.without_direction(left) == None]  # noqa: E711
    most, together = SAMPLE[device]
    asked = sound if len(sound) else left
    sample = asked[evenly(len(asked), max(most // options.samples, 1), together)]
    read = sum(len(run.prompt(prompt).token_ids) for prompt in sound.tolist())
    forecast = Forecast(
        len(sound) * options.samples,
        read - len(sound) * len(run.limits.shared),
        options.max_new_tokens,
        options.batch_size or AT_ONCE[device],
        device,
    )
    timed = Timed(forecast, most_seconds)
    answers: list[Answer] = []
    with suppress(Enough), closing(run.answers(sample, timed)) as written:
        answers.extend(written)
    timing = timed.timing()
    if not answers:
        short = replace(options, max_new_tokens=min(options.max_new_tokens, SHORT), samples=1)
        with closing(replace(run, options=short).answers(sample[:1])) as written:
            answers.extend(written)
    return answers, timing if len(sound) else Timing(timing.took, 0.0, 0.0)
