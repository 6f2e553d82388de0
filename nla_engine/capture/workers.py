"""A capture in several processes: each has the model, and returns the rows of sequences to the one that writes.

A worker is told the prompts it is to run, one by one, so it needs neither the prompt files nor the store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import reduce
from operator import add

import numpy as np

from nla_engine.capture.appender import portion_of, sequence_rows, unfinished_rows
from nla_engine.capture.choice import RowChoice
from nla_engine.capture.load import chosen_sites
from nla_engine.capture.plan import CapturePlan, room_for
from nla_engine.capture.reply_limits import stop_of
from nla_engine.capture.row_range import RowRange
from nla_engine.capture.setup import Setup, library_attention
from nla_engine.capture.spill import RUNNING_PART
from nla_engine.codec.rows import Codec
from nla_engine.config import CaptureOptions
from nla_engine.engine.forecast import Tally
from nla_engine.engine.generator import Generator
from nla_engine.engine.leader import ending_alone, first_device, group_devices, open_ranks
from nla_engine.engine.ranks import Ranks
from nla_engine.engine.request import Request
from nla_engine.engine.split_load import load_on
from nla_engine.errors import EngineError
from nla_engine.models.load import LanguageModel, pick_device, pick_dtype
from nla_engine.models.prompt_set import Prompt, PromptSet
from nla_engine.models.source import find_source
from nla_engine.models.tokens import token_bytes
from nla_engine.sites import Site
from nla_engine.store import SequenceRows
from nla_engine.workers.job import Parent
from nla_engine.workers.pool import Pool

#: The part of the host memory that all workers have together. The run itself has the rest.
WORKERS_PART = 1 / 2


@dataclass(frozen=True)
class Given:
    """One prompt, as a worker is told of it. limit: most new tokens; positions: of its rows, int64 [n], if they are
    chosen already; group: prompts with the same number are equal"""

    number: int
    prompt: Prompt
    limit: int
    positions: np.ndarray | None
    group: int


@dataclass(frozen=True)
class Captured:
    """An ended sequence. attention: what computed it, in words, if that is the library."""

    rows: SequenceRows
    attention: str | None


@dataclass(frozen=True)
class CaptureWork:
    """Picklable: all that a worker has to know before its first prompt. sequences: of each worker's share.

    weights: fingerprint of the model that the run was started with
    """

    options: CaptureOptions
    revision: str | None
    weights: str
    plan: CapturePlan
    codec: str
    sink_norm: Mapping[Site, float]
    prefix: tuple[int, ...]
    workers: int
    sequences: int

    def open(self, device: str, parent: Parent) -> CaptureWorker:
        """Load the model there, and set the generator up. Raises what these raise."""
        return CaptureWorker(self, device, parent)


class CaptureWorker:
    """See `workers.job.Worker`."""

    def __init__(self, work: CaptureWork, device: str, parent: Parent) -> None:
        options, plan = work.options, work.plan
        self.parent, self.prefix = parent, work.prefix
        self.opened = ExitStack()
        self.ranks, lm = self._load(replace(options, device=device, revision=work.revision))
        if lm.fingerprint() != work.weights:
            raise EngineError(f"{options.model}: its weights changed after the run began: start it again")
        self.given: dict[int, Given] = {}
        self.keep = RowRange.parse(str(options.positions))
        vocabulary = token_bytes(lm.tokenizer, lm.vocab_size)
        self.choice = RowChoice.of(options, lm, _Told(self.given), vocabulary)
        self.host_bytes = options.host_memory * 2**30 * WORKERS_PART / work.workers
        self.sink_norm = dict(work.sink_norm)
        setup = Setup(
            options=options,
            lm=lm,
            sites=chosen_sites(options, lm),
            keep=self.keep,
            stop=stop_of(options, vocabulary, lm.eos_ids),
            choose=None if self.choice.takes_all else self._choose,
            codec=Codec.named(work.codec, lm.d_model),
            sink_norm=self.sink_norm,
            prefix=work.prefix,
            host_bytes=self.host_bytes,
            announce=parent.announce,
        )
        self.generator = setup.generator(replace(plan, room=room_for(options, lm, plan, work.sequences)))
        self.attention = library_attention(self.generator)

    def _load(self, options: CaptureOptions) -> tuple[Ranks | None, LanguageModel]:
        """The model, and the group that it is split over, on the devices of the options."""
        size, remote_code = options.tensor_parallel, options.trust_remote_code
        device = pick_device(first_device(options.device, size))
        ranks = None
        if size > 1:
            ranks = self.opened.enter_context(open_ranks(group_devices(device, size, options.device)))
        lm = load_on(
            ranks,
            find_source(options.model, options.revision, base=options.base, remote_code=remote_code),
            device=device,
            dtype=pick_dtype(options.dtype, device),
            remote_code=remote_code,
        )
        return ranks, lm

    def run(self, items: Iterator[Given | None]) -> Iterator[tuple[int, Captured]]:
        """Generate, or read, each prompt; its rows."""
        with ending_alone(self.ranks), self.opened:
            yield from self._run(items)

    def _run(self, items: Iterator[Given | None]) -> Iterator[tuple[int, Captured]]:
        portion = portion_of(int(self.host_bytes * (1 - RUNNING_PART)))
        self.tally: Callable[[], Tally] = Tally
        with closing(self.generator.groups(self._requests(items), portion, self._watch)) as groups:
            for group in groups:
                for ended in group:
                    given = self.given[ended.request.id]
                    rows = sequence_rows(given.prompt, ended, self.sink_norm)
                    yield given.number, Captured(rows, self.attention)
                    del self.given[given.number]
                del group, ended  # frees their memory before the next is fetched

    def unfinished(self) -> Iterator[SequenceRows]:
        """Sequences that have rows and have not ended."""
        if isinstance(self.generator, Generator):
            prompts = {number: given.prompt for number, given in self.given.items()}
            yield from unfinished_rows(self.generator, prompts, self.sink_norm)

    def _watch(self, tally: Callable[[], Tally]) -> None:
        self.parent.state(tally)

    def _requests(self, items: Iterator[Given | None]) -> Iterator[Request | None]:
        """A further reply does not read its prompt again, unless rows of it are kept."""
        before = None
        for given in items:
            if given is None:
                yield None
                continue
            self.given[given.number] = given
            ids = tuple(given.prompt.token_ids[len(self.prefix) :].tolist())
            again = given.group == before and not self.keep.touches_prompts
            yield Request(given.number, ids, given.limit, again=again)
            before = given.group

    def _choose(self, number: int, generated: np.ndarray) -> np.ndarray:
        chosen = self.given[number].positions
        return self.choice.positions(number, generated) if chosen is None else chosen


def teller(
    options: CaptureOptions, prompts: PromptSet, choice: RowChoice, limits: np.ndarray
) -> Callable[[int], Given]:
    """What a worker is told of a prompt, by its number. limits: most new tokens of each, int64 [all]."""

    def told(number: int) -> Given:
        positions = None
        if not options.max_new_tokens and not choice.takes_all:
            positions = choice.positions(number, np.zeros(0, np.int32))
        return Given(number, prompts[number], int(limits[number]), positions, number // options.replies)

    return told


def waiting_room(host_memory: float, workers: int) -> tuple[int, int]:
    """The waiting and the outgoing bytes of a capture's pool: half of this process's part of the memory, and half of
    what each worker has for sequences that have ended. All lanes of all GPUs may end at once.

    host_memory: of the run, in GiB
    """
    whole = host_memory * 2**30
    ended = whole * WORKERS_PART / workers * (1 - RUNNING_PART)
    return int(whole * (1 - WORKERS_PART) / 2), int(ended / 2)


def open_pool(devices: Sequence[str], host_memory: float, announce: Callable[[str], None]) -> Pool:
    """The processes of a capture, which load their modules from now on. host_memory: of the run, in GiB"""
    waiting, outgoing = waiting_room(host_memory, len(devices))
    return Pool(
        devices,
        imports=__name__,
        announce=announce,
        unit="sequences",
        waiting_bytes=waiting,
        outgoing_bytes=outgoing,
    )


class _Told:
    """The prompts that a worker has, as RowChoice reads them. Each is a document of its own: the rows of a document of
    several prompts are chosen before it is handed out."""

    def __init__(self, given: Mapping[int, Given]) -> None:
        self._given = given

    def token_ids(self, number: int) -> np.ndarray:
        """int32 [t]."""
        return self._given[number].prompt.token_ids

    def document(self, number: int) -> int:
        """The number of the document, which its random numbers depend on."""
        return number

    def of_document(self, number: int) -> range:
        """Its prompts."""
        return range(number, number + 1)


def combined(now: Sequence[Tally], before: Sequence[Tally], workers: int) -> Tally:
    """What all workers did, as one whose steps have room for the sequences of all. before: of those that died: what was
    running there is lost."""
    ended = [replace(tally, running=[]) for tally in before]
    all_ = reduce(add, [*ended, *now], Tally())
    running = [tokens for tally in now for tokens in tally.running]
    return replace(all_, running=running, steps=round(all_.steps / workers))
