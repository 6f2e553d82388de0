"""What a capture would write and how long it would take: its plan, and a short run of its first prompts.

Leaves no files behind.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nla_engine.capture.choice import RowChoice
from nla_engine.capture.load import chosen_numbers, chosen_sites, first_prompt, load_inputs
from nla_engine.capture.plan import by_device, plan_capture
from nla_engine.capture.reply_limits import reply_limits
from nla_engine.capture.run import GENERATING, READING, CaptureJob, Enough, check_out, devices_of
from nla_engine.config import CaptureOptions
from nla_engine.engine.forecast import Forecast, Tally
from nla_engine.models.load import LanguageModel
from nla_engine.models.tokens import token_bytes
from nla_engine.options import MAX
from nla_engine.store import CaptureStore, RowFlag
from nla_engine.store.objects import place
from nla_engine.store.swap import exists
from nla_engine.workers.devices import with_work

#: Most sequences, most new tokens of each, and most seconds of generating, in the run that measures the speed.
SAMPLE, MOST_SECONDS = (64, 32), 8.0


@dataclass(frozen=True)
class CaptureEstimate:
    """rows, bytes: upper bounds, since replies may end early; sequences: those still to do.

    reply_tokens_expected: mean length of a reply, if replies end as often per token as in the sample
    rows_expected, bytes_expected: the same for rows, with as many sinks
    seconds_expected: of generating and writing: sample_seconds by the part of the whole work that was done in them
    load_seconds: to load the model and read its prompts; prepare_seconds: to calibrate and to check the model
    """

    sequences: int
    already_done: int
    rows: int
    bytes: int
    reply_tokens_expected: float
    rows_expected: int
    bytes_expected: int
    codec: str
    layers: list[int | str]
    skipped: int
    seconds_expected: float
    load_seconds: float
    prepare_seconds: float
    sample_sequences: int
    sample_tokens: int
    sample_seconds: float

    def to_dict(self) -> dict[str, Any]:
        return {"dry_run": True, **asdict(self)}


def estimate_capture(
    options: CaptureOptions,
    *,
    announce: Callable[[str], None] = lambda text: None,
    lm: LanguageModel | None = None,
) -> CaptureEstimate:
    """Plan a capture and time its first prompts. Raises what `load_inputs` and `check_out` raise. Whether a store can
    be resumed with these options is checked only by the run itself."""
    check_out(options)
    devices = devices_of(options, lm)
    workers = max(len(devices), 1)
    if devices:
        options = replace(options, device=devices[0], gpus=None, workers=1)
    with ExitStack() as opened:
        return _estimate(options, workers, announce, lm, opened)


def _estimate(
    options: CaptureOptions,
    workers: int,
    announce: Callable[[str], None],
    lm: LanguageModel | None,
    opened: ExitStack,
) -> CaptureEstimate:
    started = time.perf_counter()
    lm, prompts = load_inputs(options, lm, opened)
    load_seconds = time.perf_counter() - started
    for message in prompts.messages():
        announce(message)
    numbers = todo = chosen_numbers(options, prompts)
    if options.continues and exists(place(options.target)):
        todo = np.setdiff1d(todo, CaptureStore.open(options.target).numbers)
    vocabulary = token_bytes(lm.tokenizer, lm.vocab_size)
    choice = RowChoice.of(options, lm, prompts, vocabulary)
    limits = reply_limits(options, lm, prompts.sizes)
    workers = with_work(workers, len(todo))
    if workers > 1:
        announce(
            f"measured in one process on {options.device}; {workers} are taken to be {workers} times as fast"
        )
    plan = plan_capture(options, lm, prompts, choice, limits, todo, len(numbers), workers)
    announce(first_prompt(prompts, vocabulary))
    announce(str(plan))
    for line in by_device(plan, lm) if lm.ranks is not None else ():
        announce(line)
    sizes, new = prompts.sizes[todo], plan.new
    forecast = Forecast(
        len(sizes), int((sizes - plan.prefix).sum()), new, plan.slots * workers, lm.device.type
    )
    count, short = min(len(sizes), SAMPLE[0]), min(new, SAMPLE[1])
    if options.max_new_tokens == MAX:
        short = new  # only replies that end tell how long replies are
    tally, allowed, sinks, prepare, seconds = Tally(), 1.0, 0.0, 0.0, 0.0
    if count:
        announce(
            f"measuring {count} sequences of at most {short} new tokens, for at most {MOST_SECONDS:.0f} seconds"
        )
        with tempfile.TemporaryDirectory(prefix="nla-dry-run-") as directory:
            sample = replace(
                options,
                out=str(Path(directory) / "sample.zarr"),
                dry_run=False,
                keep_partial=False,
                shard=None,
                resume=False,
                overwrite=False,
                per_document=None,
                min_position=0,
                skip_special=False,
                tokens=None,
                every=1,
                skip_first=False,
                skip_sinks=False,
            )
            part_of = prompts.part(todo[:count].tolist())
            job = CaptureJob(sample, lm, part_of, most_seconds=MOST_SECONDS, most_new=short)
            with suppress(Enough):
                job.run()
            tally, by_phase = job.tally, job.phases.seconds()
            seconds = by_phase[GENERATING if short else READING]
            prepare = sum(by_phase.values()) - seconds
            made = CaptureStore.open(sample.out)
            allowed = _allowed_share(made, choice.tokens)
            if options.skip_sinks:
                sinks = _sink_share(made, choice)
    part = forecast.part(tally)
    replies = limits.astype(np.float64)
    if tally.stopped:
        replies = np.concatenate([[0.0], np.cumsum(forecast.survival(tally)[:-1])])[limits.clip(max=new)]
    elif count and options.max_new_tokens == MAX:
        announce("no reply ended in that time: what is expected is the most that there can be")
    expected = round(choice.most_rows(todo, replies.round().astype(np.int64), allowed) * (1 - sinks))
    return CaptureEstimate(
        sequences=len(sizes),
        already_done=plan.already_done,
        rows=plan.rows,
        bytes=plan.bytes,
        reply_tokens_expected=round(float(replies[todo].mean()), 1) if len(todo) else 0.0,
        rows_expected=expected,
        bytes_expected=expected * plan.row_bytes,
        codec=options.codec,
        layers=[site.key for site in chosen_sites(options, lm)],
        skipped=len(prompts.skipped),
        seconds_expected=round(seconds / part, 3) if part else 0.0,
        load_seconds=round(load_seconds, 1),
        prepare_seconds=round(prepare, 1),
        sample_sequences=count,
        sample_tokens=tally.read + tally.tokens,
        sample_seconds=round(seconds, 3),
    )


def _allowed_share(sample: CaptureStore, tokens: np.ndarray | None) -> float:
    """Which part of the generated tokens `tokens` allows, bool [V]; None: all."""
    if tokens is None:
        return 1.0
    replies = [sequence.tokens[sequence.prompt_size :] for sequence in sample.iter_sequences()]
    generated = np.concatenate([np.zeros(0, np.int32), *replies])
    return float(tokens[generated].mean()) if len(generated) else 1.0


def _sink_share(sample: CaptureStore, choice: RowChoice) -> float:
    """Which part of the rows that the choice allows are finite sinks."""
    flags = sample.column("flags")[choice.allows(sample.column("position"), sample.column("token_id"))]
    sinks = flags & (RowFlag.SINK | RowFlag.NONFINITE) == RowFlag.SINK
    return float(sinks.mean()) if len(sinks) else 0.0
