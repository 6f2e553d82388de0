"""Stage 1: prompts -> batched generation -> tapped rows -> store.

Sequences are written in the order of the prompts, so a store that was interrupted goes on with the next prompt.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nla_engine.capture.appender import Appender
from nla_engine.capture.calibrate import LayerCalibration, calibrate
from nla_engine.capture.job import CLOCK, load_job, prompts_rendering
from nla_engine.capture.tap import RowRange, RowTap
from nla_engine.codec.rows import Codec
from nla_engine.config import CaptureOptions
from nla_engine.engine.generator import STEPS_BETWEEN_POLLS, Generator
from nla_engine.engine.order import InOrder
from nla_engine.engine.request import Request
from nla_engine.engine.runner import Runner
from nla_engine.engine.sampling import Sampling
from nla_engine.engine.slots import default_slots
from nla_engine.engine.stopping import StopAutomaton
from nla_engine.errors import EngineError, RequestError, StoreError
from nla_engine.models.load import LanguageModel
from nla_engine.models.prompts import PromptSet
from nla_engine.models.sidecar import SIDECAR
from nla_engine.models.tokens import token_bytes
from nla_engine.ops.backends import shortfall
from nla_engine.provenance import describe_run
from nla_engine.store import CaptureStore, RowFlag, StoreWriter
from nla_engine.store.directory import check_place
from nla_engine.store.objects import place
from nla_engine.store.swap import exists

#: Shared prompt tokens below this are not worth a prefix.
SHORTEST_PREFIX = 8
#: Slots when prompts are only read: a pass reads no more texts than this at once.
READING_SLOTS = 64
MAX_PREFILL_TOKENS = {"cpu": 2048, "cuda": 8192}

#: progress(sequences done, sequences in all)
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class CapturePlan:
    """What a run will do, known before it starts. rows: an upper bound, since replies may end early."""

    sequences: int
    already_done: int
    rows: int
    bytes: int
    codec: str
    slots: int
    length: int
    prefix: int

    def __str__(self) -> str:
        done = f" ({self.already_done:,} already there)" if self.already_done else ""
        shared = f", {self.prefix} prompt tokens shared" if self.prefix else ""
        return (
            f"{self.sequences:,} sequences{done}: at most {self.rows:,} rows, {self.bytes / 2**30:.3g} GiB "
            f"as {self.codec}; {self.slots} slots of {self.length} tokens{shared}"
        )


@dataclass(frozen=True)
class CaptureSummary:
    """What a store holds after a run; its keys are those of `--json`.

    tokens_generated, seconds and the rates are of this run alone.
    """

    store: str
    layers: list[int]
    codec: str
    codec_error: dict[str, float]
    sequences: int
    rows: int
    skipped: int
    sink_rows: int
    nonfinite_rows: int
    tokens_generated: int
    seconds: float
    rows_per_second: float
    tokens_per_second: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def run_capture(
    options: CaptureOptions,
    *,
    announce: Callable[[str], None] = lambda text: None,
    progress: Progress = lambda done, total: None,
    lm: LanguageModel | None = None,
) -> CaptureSummary:
    """Run stage 1. `lm`: the model, if it is loaded already. Raises the errors of `nla_engine.errors`."""
    if options.dry_run:
        raise RequestError("--dry-run writes nothing: ask `nla_engine.capture.estimate.estimate_capture`")
    check_out(options)
    if (Path(options.model) / SIDECAR).is_file():
        announce(
            f"{options.model} is an AV or AR (it has {SIDECAR}); their pair explains the base model's rows"
        )
    lm, prompts = load_job(options, lm)
    for message in prompts.messages():
        announce(message)
    tokens = token_bytes(lm.tokenizer, lm.vocab_size)
    described = lm.describe()
    same = _unchanging(options, described, prompts)
    with ExitStack() as opened:
        writer = calibration = None
        if options.resume and exists(place(options.out)):
            writer = opened.enter_context(StoreWriter.resume(options.out, options=same))
            codec, sink_norm = writer.codec, writer.sink_norm
        else:
            codec = Codec.named(options.codec, lm.d_model)
            try:
                calibration = calibrate(lm, prompts, options.layer, codec, options.kernels)
            except torch.cuda.OutOfMemoryError as error:
                raise EngineError(
                    f"{lm.name}: there is no room to run it beside its weights on {lm.device}"
                ) from error
            sink_norm = {layer: entry.sink_norm for layer, entry in calibration.items()}
        plan = plan_capture(options, lm, prompts, writer.sequences if writer else 0)
        announce(str(plan))
        generator = None
        if plan.already_done < len(prompts):
            generator = _fitting_generator(options, lm, prompts, plan, tokens, codec, sink_norm, announce)
            opened.enter_context(generator.runner)
        if calibration is not None:  # only now: whatever the model or the machine cannot do has been refused
            provenance = described | _provenance(options, lm, prompts)
            writer = opened.enter_context(
                _create_store(options, tokens, codec, calibration, same, provenance)
            )
        assert writer is not None
        return _fill_store(options, prompts, plan, generator, writer, progress)


def check_out(options: CaptureOptions) -> None:
    """StoreError if something is in the way that is neither to be gone on with nor to be replaced."""
    out = place(options.out)
    there = exists(out)
    if there and not (options.resume or options.overwrite):
        raise StoreError(
            f"{options.out}: exists; pass --resume to go on with it or --overwrite to replace it"
        )
    if not (there and options.resume):
        check_place(out, options.overwrite)


def _unchanging(options: CaptureOptions, described: Mapping[str, Any], prompts: PromptSet) -> dict[str, Any]:
    """What a run that goes on with a store must have in common with those before it. described: the model."""
    given = options.to_dict()
    same = {key: given[key] for key in ("max_new_tokens", "positions", "codec", "temperature", "seed")}
    same["layer"] = list(options.layer)
    same["prompts"] = prompts.fingerprint()
    return same | {key: described[key] for key in ("weights", "tokenizer", "dtype")}


def _provenance(options: CaptureOptions, lm: LanguageModel, prompts: PromptSet) -> dict[str, Any]:
    """What a new store remembers of the run that made it, beside the model itself."""
    return {
        **describe_run(),
        "attention": "nla_engine slot attention, softmax in float32",
        "device": str(lm.device),
        "chat_template": prompts_rendering(options, lm),
        **({CLOCK: prompts.clock.isoformat()} if prompts.clock else {}),
        "sampling": "greedy"
        if options.temperature == 0
        else "softmax at the temperature, no truncation or penalty",
        "options": options.to_dict(),
        "skipped_prompts": len(prompts.skipped),
    }


def _create_store(
    options: CaptureOptions,
    tokens: list[bytes],
    codec: Codec,
    calibration: Mapping[int, LayerCalibration],
    same: dict[str, Any],
    provenance: dict[str, Any],
) -> StoreWriter:
    """A new store, with what was measured for it. same: the options that every run on it has in common."""
    writer = StoreWriter.create(
        options.out,
        layers=list(options.layer),
        codec=codec,
        sink_norm={layer: entry.sink_norm for layer, entry in calibration.items()},
        vocabulary=tokens,
        provenance=provenance,
        options=same,
        overwrite=options.overwrite,
    )
    for layer, entry in calibration.items():
        writer.record_codec_error(layer, entry.error)
    return writer


def plan_capture(options: CaptureOptions, lm: LanguageModel, prompts: PromptSet, done: int) -> CapturePlan:
    """Sizes of the run: slots from the batch size or the memory that is free, rows from the lengths."""
    keep = RowRange.parse(str(options.positions))
    new = options.max_new_tokens
    todo = prompts.sizes[done:]
    prefix = prompts.common_prefix() if len(todo) > 1 else 0
    if prefix < SHORTEST_PREFIX or keep.first(prefix + 1) < prefix:
        prefix = 0  # the rows of a shared prefix would be computed once and wanted for every sequence
    longest = int(todo.max(initial=1)) + new
    slots = options.batch_size or default_slots(lm, longest, prefix)
    if not new and options.batch_size is None:
        slots = min(slots, READING_SLOTS)
    rows = rows_kept(keep, todo, new)
    row_bytes = Codec.named(options.codec, lm.d_model).row_bytes * len(options.layer)
    return CapturePlan(
        sequences=len(prompts),
        already_done=done,
        rows=rows,
        bytes=rows * row_bytes,
        codec=options.codec,
        slots=max(min(slots, len(todo)), 1),
        length=longest,
        prefix=prefix,
    )


def rows_kept(keep: RowRange, sizes: np.ndarray, new: int) -> int:
    """Rows of prompts of these sizes, int64 [n], each continued by `new` tokens."""
    counted = zip(*np.unique(sizes, return_counts=True), strict=True)
    return sum(keep.count(int(size), int(size) + new) * int(count) for size, count in counted)


def _fill_store(
    options: CaptureOptions,
    prompts: PromptSet,
    plan: CapturePlan,
    generator: Generator | None,
    writer: StoreWriter,
    progress: Progress,
) -> CaptureSummary:
    """Run what is left to be done. generator: None if nothing is. Setting up is not part of the time it takes."""
    done, rows_before = writer.sequences, writer.rows
    appender = Appender(writer, prompts, RowRange.parse(str(options.positions)))
    started = time.perf_counter()
    if generator is not None:
        order = InOrder(int(options.host_memory * 2**30))
        requests = _requests(prompts, done, plan.prefix, options.max_new_tokens, order)
        for group in generator.groups(requests, order.portion):
            appender.add(order.add(group))
            del group  # its memory, before the next is fetched
            progress(done + appender.sequences, len(prompts))
    if done + appender.sequences != len(prompts):
        raise EngineError(f"{len(prompts) - done} sequences were asked for, {appender.sequences} ended")
    writer.close(complete=True)
    seconds = time.perf_counter() - started
    store = CaptureStore.open(options.out)
    flags = store.column("flags")
    return CaptureSummary(
        store=str(options.out),
        layers=list(options.layer),
        codec=options.codec,
        codec_error={str(k): round(v["mean"], 6) for k, v in store.codec_error.items() if v},
        sequences=writer.sequences,
        rows=writer.rows,
        skipped=len(prompts.skipped),
        sink_rows=int(np.count_nonzero(flags & RowFlag.SINK)),
        nonfinite_rows=int(np.count_nonzero(flags & RowFlag.NONFINITE)),
        tokens_generated=appender.tokens_generated,
        seconds=round(seconds, 3),
        rows_per_second=round((writer.rows - rows_before) / seconds, 1),
        tokens_per_second=round(appender.tokens_generated / seconds, 1),
    )


def _fitting_generator(
    options: CaptureOptions,
    lm: LanguageModel,
    prompts: PromptSet,
    plan: CapturePlan,
    tokens: list[bytes],
    codec: Codec,
    sink_norm: Mapping[int, float],
    announce: Callable[[str], None],
) -> Generator:
    """The generator of the plan, or of the largest halving of its slots that the GPU has memory for."""
    for line in shortfall(lm.device):
        announce(line)
    while True:
        try:
            return _generator(options, lm, prompts, plan, tokens, codec, sink_norm)
        except torch.cuda.OutOfMemoryError as error:
            if plan.slots == 1:
                message = f"{lm.name}: one sequence of {plan.length} tokens does not fit the free GPU memory"
                raise EngineError(message) from error
        torch.cuda.empty_cache()
        plan = replace(plan, slots=plan.slots // 2)
        announce(f"out of GPU memory while setting up: trying {plan.slots} slots")


def _generator(
    options: CaptureOptions,
    lm: LanguageModel,
    prompts: PromptSet,
    plan: CapturePlan,
    tokens: list[bytes],
    codec: Codec,
    sink_norm: Mapping[int, float],
) -> Generator:
    new = options.max_new_tokens
    keep = RowRange.parse(str(options.positions))
    budget = MAX_PREFILL_TOKENS[lm.device.type]
    tap = RowTap(
        options.layer,
        codec,
        keep,
        slots=plan.slots,
        rows_per_slot=max(keep.count(plan.length - new, plan.length), 1),
        exact_capacity=plan.slots * (STEPS_BETWEEN_POLLS + 1) + (budget if keep.first(2) < 1 else plan.slots),
        sink_norm=sink_norm,
        device=lm.device,
        reference=options.kernels == "reference",
    )
    runner = Runner(
        lm if new else lm.truncated(max(options.layer)),
        slots=plan.slots,
        length=plan.length,
        prefix=tuple(prompts.token_ids(-1)[: plan.prefix].tolist()),
        tap=tap,
        tap_layers=options.layer,
        kernels=options.kernels,
    )
    try:
        generator = Generator(
            runner,
            max_new_tokens=new,
            stop=StopAutomaton(tokens, lm.eos_ids) if new else None,
            sampling=Sampling(options.temperature, options.seed),
            keeper=tap,
            read_last="generated" in keep.names or "all" in keep.names,
            max_prefill_tokens=budget,
        )
        generator.prepare()
    except BaseException:
        runner.close()
        raise
    return generator


def _requests(
    prompts: PromptSet, first: int, prefix: int, max_new_tokens: int, order: InOrder
) -> Iterator[Request]:
    """Requests for prompts[first:]."""
    for id_ in range(first, len(prompts)):
        ids = tuple(prompts.token_ids(id_)[prefix:].tolist())
        yield order.asked(Request(id_, ids, max_new_tokens))
