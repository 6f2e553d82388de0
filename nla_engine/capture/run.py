"""Stage 1: prompts -> batched generation -> tapped rows -> store.

A sequence is written when it ends, with the number of its prompt. An interrupted run is resumed with the prompts that
are not in the store.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from nla_engine.capture.appender import Appender, portion_of
from nla_engine.capture.calibrate import LayerCalibration, calibrate
from nla_engine.capture.choice import RowChoice
from nla_engine.capture.finished import finished_part
from nla_engine.capture.load import (
    chosen_layers,
    chosen_numbers,
    chosen_sites,
    first_prompt,
    load_inputs,
)
from nla_engine.capture.next_token import following_of
from nla_engine.capture.partial import partial_name, write_partial
from nla_engine.capture.plan import CapturePlan, plan_capture
from nla_engine.capture.recorded import Recorded
from nla_engine.capture.reply_limits import reply_limits
from nla_engine.capture.row_range import RowRange
from nla_engine.capture.spill import RUNNING_PART, RowKeeper
from nla_engine.capture.summary import CaptureSummary
from nla_engine.capture.tap import RowTap
from nla_engine.codec.rows import Codec
from nla_engine.config import CaptureOptions
from nla_engine.engine.choose import AnyGenerator, open_generator
from nla_engine.engine.families import why_unfused
from nla_engine.engine.forecast import Forecast, Tally
from nla_engine.engine.generator import Generator, Watch
from nla_engine.engine.library_generator import LibraryGenerator
from nla_engine.engine.request import Request
from nla_engine.engine.stopping import StopAutomaton
from nla_engine.errors import EngineError, RequestError, StoreError, already_there, first_line
from nla_engine.models.load import LanguageModel
from nla_engine.models.prompt_set import PromptSet
from nla_engine.models.sidecar import SIDECAR
from nla_engine.models.tokens import token_bytes
from nla_engine.ops.backends import Kernels, shortfall
from nla_engine.ops.sampling import sampling_of
from nla_engine.progress import Phases, Progress
from nla_engine.sites import Site
from nla_engine.store import CaptureStore, StoreWriter
from nla_engine.store.directory import check_place
from nla_engine.store.objects import place
from nla_engine.store.swap import exists

MAX_PREFILL_TOKENS = {"cpu": 2048, "cuda": 8192}

#: Phases of a run. Generating, or reading, includes writing to the store.
LOADING, CALIBRATING, PREPARING, GENERATING, READING = (
    "loading",
    "calibrating",
    "preparing",
    "generating",
    "reading",
)
#: Seconds between two estimates of how far a run is.
_LOOK_SECONDS = 1.0


def run_capture(
    options: CaptureOptions,
    *,
    announce: Callable[[str], None] = lambda text: None,
    progress: Callable[[int, int], None] | Progress = Progress(),
    lm: LanguageModel | None = None,
) -> CaptureSummary:
    """Run stage 1. Raises the errors of `nla_engine.errors`.

    progress: called with (sequences done, sequences in all), or told the phases too; lm: the model, if it is loaded
    A part that is finished already is left as it is.
    """
    if options.dry_run:
        raise RequestError("--dry-run writes nothing: call `nla_engine.capture.estimate.estimate_capture`")
    check_out(options)
    if done := finished_part(options):
        announce(f"{done.store}: part {options.shard} is finished: nothing to do")
        return done
    if (Path(options.model) / SIDECAR).is_file():
        announce(
            f"{options.model} is an AV or AR (it has {SIDECAR}); such a pair explains the rows of its base model"
        )
    phases = Phases(progress)
    phases.phase(LOADING)
    lm, prompts = load_inputs(options, lm)
    for message in prompts.messages():
        announce(message)
    return CaptureJob(options, lm, prompts, announce, phases).run()


def check_out(options: CaptureOptions) -> None:
    """StoreError if `out` holds something that may be neither resumed nor replaced."""
    out = place(options.target)
    there = exists(out)
    if there and not (options.continues or options.overwrite):
        raise StoreError(already_there(options.target))
    if not (there and options.continues):
        check_place(out, options.overwrite)
    if options.keep_partial:
        partial = place(partial_name(options.target))
        if exists(partial) and not (options.continues or options.overwrite):
            raise StoreError(already_there(str(partial)))
        check_place(partial, overwrite=True)


class Enough(Exception):
    """Ends a run that was made to be measured only."""


class CaptureJob:
    """One run of stage 1, once the model and its prompts are loaded and `check_out` has passed.

    most_seconds: of the last phase; then Enough is raised. tally: what that phase did
    most_new: fewer new tokens of each prompt than the options ask for
    """

    def __init__(
        self,
        options: CaptureOptions,
        lm: LanguageModel,
        prompts: PromptSet,
        announce: Callable[[str], None] = lambda text: None,
        progress: Progress = Progress(),
        most_seconds: float = math.inf,
        most_new: int | None = None,
    ) -> None:
        self.most_seconds, self.tally = most_seconds, Tally()
        self.options, self.lm, self.prompts = options, lm, prompts
        self.announce, self.phases = announce, Phases.of(progress)
        self.kernels = Kernels(options.kernels)
        limits = reply_limits(options, lm, prompts.sizes)
        self.limits = limits if most_new is None else np.minimum(limits, most_new)
        self.keep = RowRange.parse(str(options.positions))
        self.layers, self.sites = chosen_layers(options, lm), chosen_sites(options, lm)
        self.vocabulary = token_bytes(lm.tokenizer, lm.vocab_size)
        self.stop = self._stop() if options.max_new_tokens else None
        self.choice = RowChoice.of(options, lm, prompts, self.vocabulary)
        self.numbers = chosen_numbers(options, prompts)
        self.recorded = Recorded(options, lm, prompts, self.layers, lm.describe(), len(self.numbers))

    def run(self) -> CaptureSummary:
        """Calibrate, plan, generate and write. A new store is created only after every check has passed."""
        with ExitStack() as opened:
            writer = calibration = None
            if self.options.continues and exists(place(self.options.target)):
                writer = opened.enter_context(
                    StoreWriter.resume(self.options.target, options=self.recorded.unchanging())
                )
                codec, sink_norm = writer.codec, writer.sink_norm
            else:
                codec = Codec.named(self.options.codec, self.lm.d_model)
                self.phases.phase(CALIBRATING, "tokens")
                calibration = self._calibrate(codec)
                sink_norm = {layer: entry.sink_norm for layer, entry in calibration.items()}
            todo = self.numbers
            if writer:
                todo = np.intersect1d(todo, writer.missing(len(self.prompts)), assume_unique=True)
            self.phases.phase(PREPARING)
            plan = plan_capture(
                self.options, self.lm, self.prompts, self.choice, self.limits, todo, len(self.numbers)
            )
            self.announce(first_prompt(self.prompts, self.vocabulary))
            self.announce(str(plan))
            generator = None
            if len(todo):
                generator = self._generator(plan, codec, sink_norm)
                opened.enter_context(generator.runner)
                if self.options.keep_partial and isinstance(generator, LibraryGenerator):
                    raise RequestError(
                        f"--keep-partial: {self.lm.name} runs by transformers' generation, which does not offer it: "
                        "leave it out"
                    )
            if calibration is not None:
                writer = opened.enter_context(self._create_store(codec, calibration, generator))
            assert writer is not None
            return self._fill(writer, plan, generator, todo)

    def _stop(self) -> StopAutomaton:
        texts = [text.encode() for text in self.options.stop]
        try:
            return StopAutomaton(self.vocabulary, self.lm.eos_ids, texts)
        except ValueError as error:
            raise RequestError(f"--stop: {error}: give shorter ones") from error

    def _calibrate(self, codec: Codec) -> dict[Site, LayerCalibration]:
        try:
            new = int(self.limits.max(initial=0))
            return calibrate(self.lm, self.prompts, self.sites, codec, new, every=self.options.replies)
        except torch.cuda.OutOfMemoryError as error:
            raise EngineError(
                f"{self.lm.name}: its weights leave too little free memory on {self.lm.device} to run it"
            ) from error

    def _create_store(
        self, codec: Codec, calibration: Mapping[Site, LayerCalibration], generator: AnyGenerator | None
    ) -> StoreWriter:
        """A new store, with its calibration."""
        writer = StoreWriter.create(
            self.options.target,
            layers=self.sites,
            codec=codec,
            sink_norm={layer: entry.sink_norm for layer, entry in calibration.items()},
            vocabulary=self.vocabulary,
            provenance=self.recorded.provenance(generator),
            options=self.recorded.unchanging(),
            next_token=self.options.next_token,
            overwrite=self.options.overwrite,
        )
        for layer, entry in calibration.items():
            writer.record_codec_error(layer, entry.error)
        return writer

    def _generator(self, plan: CapturePlan, codec: Codec, sink_norm: Mapping[Site, float]) -> AnyGenerator:
        """The generator of the plan. Its slots are halved until they fit the GPU's memory."""
        for line in shortfall(self.lm.device):
            self.announce(line)
        if not self.kernels.plain(self.lm.device) and (reason := why_unfused(self.lm.blocks)):
            self.announce(f"{self.lm.name}: {reason}")
        while True:
            try:
                return self._try_generator(plan, codec, sink_norm)
            except torch.cuda.OutOfMemoryError as error:
                if plan.slots == 1:
                    message = f"{self.lm.name}: one sequence of {plan.length} tokens does not fit the free GPU memory"
                    raise EngineError(message) from error
            torch.cuda.empty_cache()
            plan = plan.half()
            self.announce(f"out of GPU memory while setting up: trying {plan.slots} sequences at once")

    def _try_generator(
        self, plan: CapturePlan, codec: Codec, sink_norm: Mapping[Site, float]
    ) -> AnyGenerator:
        options, lm, new = self.options, self.lm, plan.new
        following = following_of(options, self.keep, plan.slot_rows, lm.device, self.kernels.reference)
        tap = RowTap(
            self.sites,
            codec,
            self.keep,
            rows_per_slot=max(self.keep.end(1, 1 + new) - 1, 1),
            sink_norm=sink_norm,
            device=lm.device,
            choose=None if self.choice.takes_all else self.choice.positions,
            skip_sinks=options.skip_sinks,
            reference=self.kernels.reference,
            keeper=RowKeeper.beside(
                place(options.target), codec, len(self.sites), options.host_memory * 2**30
            ),
        )
        return open_generator(
            lm if new or following else lm.truncated(max(site.layer for site in self.sites)),
            slots=plan.slots,
            blocks=plan.room.blocks,
            length=plan.length,
            prefix=tuple(self.prompts.token_ids(-1)[: plan.prefix].tolist()),
            tap=tap,
            kernels=self.kernels,
            announce=self.announce,
            how={
                "max_new_tokens": new,
                "stop": self.stop,
                "sampling": sampling_of(options),
                "read_last": "generated" in self.keep.names or "all" in self.keep.names,
                "max_prefill_tokens": MAX_PREFILL_TOKENS[lm.device.type],
                "following": following,
            },
        )

    def _fill(
        self, writer: StoreWriter, plan: CapturePlan, generator: AnyGenerator | None, todo: np.ndarray
    ) -> CaptureSummary:
        """Generate and write the sequences of the prompts `todo`. generator: None if none remain."""
        rows_before, all_ = writer.rows, len(self.numbers)
        appender = Appender(writer, self.prompts)
        name = GENERATING if self.options.max_new_tokens else READING
        self.phases.phase(name, "sequences")
        if generator is not None:
            self.phases(all_ - len(todo), all_, part=0.0)
            portion = portion_of(int(self.options.host_memory * 2**30 * (1 - RUNNING_PART)))
            watch = self._watch(plan, todo)
            try:
                for group in generator.groups(self._requests(todo, plan.prefix), portion, watch):
                    appender.add(group)
                    del group  # frees its memory before the next is fetched
            except BaseException:
                if self.options.keep_partial and isinstance(generator, Generator):
                    self._keep_partial(writer, generator)
                raise
        if appender.sequences != len(todo):
            raise EngineError(f"{len(todo)} sequences were asked for, {appender.sequences} ended")
        writer.close(complete=True)
        if generator is not None:
            self.phases(all_, all_, tokens=self._work(appender.tokens_generated, todo), part=1.0)
        return self._summary(writer, rows_before, appender.tokens_generated, self.phases.seconds()[name])

    def _keep_partial(self, writer: StoreWriter, generator: Generator) -> None:
        """Write what is unfinished beside the store. A failure is announced: the error that stopped the run counts."""
        name = partial_name(self.options.target)
        try:
            sequences, rows = write_partial(
                writer,
                name,
                generator.unfinished(),
                self.prompts,
                vocabulary=self.vocabulary,
                provenance=self.recorded.provenance(generator),
                options=self.recorded.unchanging(),
                next_token=self.options.next_token,
            )
        except Exception as error:
            self.announce(f"{name}: what is unfinished could not be kept: {first_line(error)}")
        else:
            kept = f"{sequences:,} unfinished sequences with {rows:,} rows are kept in {name}"
            self.announce(kept if sequences else "no unfinished sequence has rows to keep")

    def _work(self, generated: int, todo: np.ndarray) -> int:
        """The tokens that a run counts: generated ones, or read ones where nothing is generated."""
        return generated if self.options.max_new_tokens else int(self.prompts.sizes[todo].sum())

    def _watch(self, plan: CapturePlan, todo: np.ndarray) -> Watch:
        """Tells how far the run is, from time to time."""
        sizes, new = self.prompts.sizes[todo], plan.new
        forecast = Forecast(
            len(sizes), int((sizes - plan.prefix).sum()), new, plan.slots, self.lm.device.type
        )
        last, began = 0.0, time.monotonic()

        def watch(tally: Callable[[], Tally]) -> None:
            nonlocal last
            now = time.monotonic()
            if self.most_seconds < math.inf:
                self.tally = tally()
                if now - began > self.most_seconds:
                    raise Enough
            if now - last >= _LOOK_SECONDS:
                last = now
                self.tally = at = tally()  # goes on counting
                self.phases(
                    plan.already_done + at.ended,
                    plan.sequences,
                    tokens=at.tokens if new else at.read,
                    part=forecast.part(at),
                    least=bool(new) and not at.ended,
                )

        return watch

    def _requests(self, todo: np.ndarray, prefix: int) -> Iterator[Request]:
        """Requests for these prompts. A further reply does not read its prompt again, unless rows of it are kept."""
        before = None
        for id_ in todo.tolist():
            ids, shared = tuple(self.prompts.token_ids(id_)[prefix:].tolist()), id_ // self.options.replies
            again = shared == before and not self.keep.touches_prompts
            yield Request(id_, ids, int(self.limits[id_]), again=again)
            before = shared

    def _summary(
        self, writer: StoreWriter, rows_before: int, generated: int, filling: float
    ) -> CaptureSummary:
        """filling: seconds of the last phase."""
        return CaptureSummary.of_store(
            CaptureStore.open(self.options.target),
            skipped=len(self.prompts.skipped),
            rows_before=rows_before,
            generated=generated,
            stepped_back=self.tally.stepped_back,
            filling=filling,
            by_phase=self.phases.seconds(),
        )
