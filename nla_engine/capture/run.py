"""Stage 1: prompts -> batched generation -> tapped rows -> store.

A sequence is written when it ends, with the number of its prompt. An interrupted run is resumed with the prompts that
are not in the store.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from nla_engine.capture.appender import Appender, portion_of, unfinished_rows
from nla_engine.capture.calibrate import LayerCalibration, calibrate
from nla_engine.capture.choice import RowChoice
from nla_engine.capture.finished import finished_part
from nla_engine.capture.load import (
    check_out,
    chosen_layers,
    chosen_numbers,
    chosen_sites,
    devices_of,
    first_prompt,
    load_inputs,
)
from nla_engine.capture.partial import keep_partial
from nla_engine.capture.plan import CapturePlan, by_device, plan_capture
from nla_engine.capture.recorded import Recorded
from nla_engine.capture.reply_limits import reply_limits, stop_of
from nla_engine.capture.row_range import RowRange
from nla_engine.capture.setup import Setup, library_attention
from nla_engine.capture.spill import RUNNING_PART
from nla_engine.capture.summary import CaptureSummary
from nla_engine.capture.workers import CaptureWork, combined, open_pool, teller
from nla_engine.codec.rows import Codec
from nla_engine.config import CaptureOptions
from nla_engine.engine.choose import AnyGenerator
from nla_engine.engine.forecast import Forecast, Tally
from nla_engine.engine.generator import Generator, Watch
from nla_engine.engine.request import Request
from nla_engine.errors import EngineError, RequestError
from nla_engine.models.load import LanguageModel
from nla_engine.models.prompt_set import PromptSet
from nla_engine.models.sidecar import SIDECAR
from nla_engine.models.tokens import token_bytes
from nla_engine.progress import Phases, Progress
from nla_engine.sites import Site
from nla_engine.store import CaptureStore, SequenceRows, StoreWriter
from nla_engine.store.objects import place
from nla_engine.store.swap import exists
from nla_engine.workers.pool import Lost, Pool

#: Phases of a run. Generating, or reading, includes writing to the store.
LOADING, CALIBRATING, PREPARING, STARTING = "loading", "calibrating", "preparing", "starting"
GENERATING, READING = "generating", "reading"
#: Seconds between two estimates of how far a run is.
_LOOK_SECONDS = 1.0
#: Seconds that workers have to return what is unfinished, if the run stops.
_LEFT_SECONDS = 60.0


def run_capture(
    options: CaptureOptions,
    *,
    announce: Callable[[str], None] = lambda text: None,
    progress: Callable[[int, int], None] | Progress = Progress(),
    lm: LanguageModel | None = None,
) -> CaptureSummary:
    """Run stage 1. Raises the errors of `nla_engine.errors`.

    progress: called with (sequences done, sequences in all), or told the phases too; lm: the model, if it is loaded
    """
    if options.dry_run:
        raise RequestError("--dry-run writes nothing: call `nla_engine.capture.estimate.estimate_capture`")
    if done := finished_part(options):
        announce(f"{done.store}: part {options.shard} is finished: nothing to do")
        return done
    check_out(options)
    if (Path(options.model) / SIDECAR).is_file():
        announce(
            f"{options.model} is an AV or AR (it has {SIDECAR}); such a pair explains the rows of its base model"
        )
    devices = devices_of(options, lm)
    phases = Phases(progress)
    phases.phase(LOADING)
    with ExitStack() as opened:
        pool = None
        if len(devices) > 1:  # they load their modules meanwhile
            pool = opened.enter_context(open_pool(devices, options.host_memory, announce))
        lm, prompts = load_inputs(replace(options, device=devices[0]) if devices else options, lm, opened)
        for message in prompts.messages():
            announce(message)
        return CaptureJob(options, lm, prompts, announce, phases, pool=pool).run()


class Enough(Exception):
    """Ends a run that was made to be measured only."""


class CaptureJob:
    """One run of stage 1, once the model and its prompts are loaded and `check_out` has passed.

    most_seconds: of the last phase; then Enough is raised. tally: what that phase did
    most_new: fewer new tokens of each prompt than the options ask for
    pool: runs the model in other processes; then it is given up here once that is all that is left to do
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
        pool: Pool | None = None,
    ) -> None:
        self.most_seconds, self.tally = most_seconds, Tally()
        self.options, self.lm, self.prompts = options, lm, prompts
        self.announce, self.phases = announce, Phases.of(progress)
        self.pool, self.device = pool, lm.device
        limits = reply_limits(options, lm, prompts.sizes)
        self.limits = limits if most_new is None else np.minimum(limits, most_new)
        self.keep = RowRange.parse(str(options.positions))
        self.layers, self.sites = chosen_layers(options, lm), chosen_sites(options, lm)
        self.vocabulary = token_bytes(lm.tokenizer, lm.vocab_size)
        self.stop = stop_of(options, self.vocabulary, lm.eos_ids)
        self.choice = RowChoice.of(options, lm, prompts, self.vocabulary)
        self.numbers = chosen_numbers(options, prompts)
        if pool is not None:
            pool.keep_for(len(self.numbers))
        devices = ", ".join(pool.devices) if pool is not None else str(lm.device)
        self.recorded = Recorded(options, lm, prompts, self.layers, lm.describe(), devices, len(self.numbers))

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
            workers = 1 if self.pool is None else self.pool.keep_for(len(todo))
            asked = len(self.numbers)
            plan = plan_capture(
                self.options, self.lm, self.prompts, self.choice, self.limits, todo, asked, workers
            )
            self.announce(first_prompt(self.prompts, self.vocabulary))
            self.announce(str(plan))
            for line in by_device(plan, self.lm) if self.lm.ranks is not None else ():
                self.announce(line)
            prefix = tuple(self.prompts.token_ids(-1)[: plan.prefix].tolist())
            generator = None
            if len(todo) and self.pool is None:
                generator = self._setup(codec, sink_norm, prefix).generator(plan)
                opened.enter_context(generator.runner)

            def store(library: str | None) -> StoreWriter:
                """The store, which is created only now: every check has passed."""
                if writer is not None:
                    return writer
                assert calibration is not None
                return opened.enter_context(self._create_store(codec, calibration, library))

            if self.pool is not None and len(todo):
                work = CaptureWork(
                    options=self.options,
                    revision=self.lm.revision or self.options.revision,
                    weights=self.recorded.described["weights"],
                    plan=plan,
                    codec=codec.name,
                    sink_norm=sink_norm,
                    prefix=prefix,
                    workers=workers,
                    sequences=-(-len(todo) // workers),
                )
                return self._finish(*self._from_workers(self.pool, work, store, todo), plan, todo)
            return self._finish(*self._from_here(generator, store, plan, todo), plan, todo)

    def _setup(self, codec: Codec, sink_norm: Mapping[Site, float], prefix: tuple[int, ...]) -> Setup:
        return Setup(
            options=self.options,
            lm=self.lm,
            sites=self.sites,
            keep=self.keep,
            stop=self.stop,
            choose=None if self.choice.takes_all else self.choice.positions,
            codec=codec,
            sink_norm=sink_norm,
            prefix=prefix,
            host_bytes=self.options.host_memory * 2**30,
            announce=self.announce,
        )

    def _calibrate(self, codec: Codec) -> dict[Site, LayerCalibration]:
        try:
            new = int(self.limits.max(initial=0))
            return calibrate(self.lm, self.prompts, self.sites, codec, new, every=self.options.replies)
        except torch.cuda.OutOfMemoryError as error:
            raise EngineError(
                f"{self.lm.name}: its weights leave too little free memory on {self.lm.device} to run it"
            ) from error

    def _create_store(
        self, codec: Codec, calibration: Mapping[Site, LayerCalibration], library: str | None
    ) -> StoreWriter:
        """A new store, with its calibration."""
        writer = StoreWriter.create(
            self.options.target,
            layers=self.sites,
            codec=codec,
            sink_norm={layer: entry.sink_norm for layer, entry in calibration.items()},
            vocabulary=self.vocabulary,
            provenance=self.recorded.provenance(library),
            options=self.recorded.unchanging(),
            next_token=self.options.next_token,
            overwrite=self.options.overwrite,
        )
        for layer, entry in calibration.items():
            writer.record_codec_error(layer, entry.error)
        return writer

    def _from_here(
        self,
        generator: AnyGenerator | None,
        store: Callable[[str | None], StoreWriter],
        plan: CapturePlan,
        todo: np.ndarray,
    ) -> tuple[StoreWriter, Appender]:
        """Generate and write the sequences of the prompts `todo`. generator: None if none remain."""
        writer = store(library_attention(generator))
        appender = Appender(writer, self.prompts)
        self._begin(todo)
        if generator is not None:
            portion = portion_of(int(self.options.host_memory * 2**30 * (1 - RUNNING_PART)))
            watch = self._watch(plan, todo)
            try:
                for group in generator.groups(self._requests(todo, plan.prefix), portion, watch):
                    appender.add(group)
                    del group  # frees its memory before the next is fetched
            except BaseException:
                if self.options.keep_partial and isinstance(generator, Generator):
                    self._keep_partial(writer, unfinished_rows(generator, self.prompts, writer.sink_norm))
                raise
        return writer, appender

    def _from_workers(
        self, pool: Pool, work: CaptureWork, store: Callable[[str | None], StoreWriter], todo: np.ndarray
    ) -> tuple[StoreWriter, Appender]:
        """The same in the processes of the pool: the model here is given up, to leave its memory to them."""
        self.lm.move(torch.device("meta"))
        if self.lm.ranks is not None:
            self.lm.ranks.close()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        watch, began = self._watch(work.plan, todo), False
        appender: Appender | None = None
        self.phases.phase(STARTING)
        told = teller(self.options, self.prompts, self.choice, self.limits)

        def begin() -> None:
            nonlocal began
            if not began:
                began = True
                self._begin(todo)

        def watching(now: list[Tally], before: list[Tally]) -> None:
            begin()
            self.tally = combined(now, before, work.workers)
            watch(lambda: self.tally)

        try:
            for group in pool.run(work, todo, told=told, together=self.options.replies, watch=watching):
                begin()
                if appender is None:
                    writer = store(group[0][1].attention)
                    appender = Appender(writer, self.prompts)
                appender.add_rows([captured.rows for _, captured in group])
                del group  # frees its memory before the next is taken
        except BaseException:
            if self.options.keep_partial and appender is not None:
                self._keep_partial(writer, pool.unfinished(_LEFT_SECONDS))
            raise
        assert appender is not None
        return writer, appender

    def _begin(self, todo: np.ndarray) -> None:
        """The last phase begins."""
        self.phases.phase(self._last_phase, "sequences")
        if len(todo):
            self.phases(len(self.numbers) - len(todo), len(self.numbers), part=0.0)

    @property
    def _last_phase(self) -> str:
        return GENERATING if self.options.max_new_tokens else READING

    def _finish(
        self, writer: StoreWriter, appender: Appender, plan: CapturePlan, todo: np.ndarray
    ) -> CaptureSummary:
        """Close the store, which is complete."""
        if appender.sequences != len(todo):
            raise EngineError(f"{len(todo)} sequences were asked for, {appender.sequences} ended")
        writer.close(complete=True)
        if len(todo):
            all_ = len(self.numbers)
            self.phases(all_, all_, tokens=self._work(appender.tokens_generated, todo), part=1.0)
        return self._summary(writer, appender, plan)

    def _keep_partial(self, writer: StoreWriter, unfinished: Iterable[SequenceRows]) -> None:
        keep_partial(
            writer,
            self.options.target,
            unfinished,
            self.announce,
            vocabulary=self.vocabulary,
            provenance=self.recorded.provenance(None),
            options=self.recorded.unchanging(),
            next_token=self.options.next_token,
        )

    def _work(self, generated: int, todo: np.ndarray) -> int:
        """The tokens that a run counts: generated ones, or read ones where nothing is generated."""
        return generated if self.options.max_new_tokens else int(self.prompts.sizes[todo].sum())

    def _watch(self, plan: CapturePlan, todo: np.ndarray) -> Watch:
        """Tells how far the run is, from time to time."""
        sizes, new = self.prompts.sizes[todo], plan.new
        forecast = Forecast(
            len(sizes),
            int((sizes - plan.prefix).sum()),
            new,
            plan.slots * plan.workers,
            self.device.type,
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

    def _summary(self, writer: StoreWriter, appender: Appender, plan: CapturePlan) -> CaptureSummary:
        by_phase, lost = self.phases.seconds(), Lost() if self.pool is None else self.pool.lost
        return CaptureSummary.of_store(
            CaptureStore.open(self.options.target),
            skipped=len(self.prompts.skipped),
            new_rows=appender.rows,
            generated=appender.tokens_generated,
            stepped_back=self.tally.stepped_back,
            filling=by_phase[self._last_phase],
            by_phase=by_phase,
            workers=plan.workers,
            workers_lost=lost.workers,
            sequences_again=lost.items,
            workers_waited={} if self.pool is None else asdict(self.pool.waited),
        )
