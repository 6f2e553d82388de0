"""The engine's generator over transformers' own generation: batches in the order of the requests, one after another."""

from __future__ import annotations

import collections.abc
from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import Any

import numpy as np
import torch

from nla_engine.engine.completions import completions, generated_by
from nla_engine.engine.following import Following, NotAsked
from nla_engine.engine.forecast import Tally
from nla_engine.engine.generator import Generate, Portion, Watch
from nla_engine.engine.library import Library
from nla_engine.engine.library_batch import Batch
from nla_engine.engine.request import Completion, Request
from nla_engine.engine.scheduler import STEPS_BETWEEN_POLLS, Ended
from nla_engine.engine.stopping import StopAutomaton, finish_of
from nla_engine.engine.transfer import Glance, to_device, to_host
from nla_engine.errors import EngineError, RequestError
from nla_engine.ops.sampling import Choosing, Sampling, SlotState

#: A pass over prompts reads at most this many times the tokens of the engine's passes: a batch is not refilled.
_PASS = 4


class LibraryGenerator:
    """Runs requests through a Library. Arguments and methods are those of `engine.generator.Generator`."""

    def __init__(
        self,
        runner: Library,
        *,
        max_new_tokens: int,
        stop: StopAutomaton | None = None,
        sampling: Sampling = Sampling(),
        read_last: bool = False,
        max_prefill_tokens: int = 2048,
        following: Following | None = None,
    ) -> None:
        if following is not None:
            raise RequestError(
                f"--next-token: {runner.lm.name} runs by transformers' own generation, where it is not offered: "
                "leave it out"
            )
        self.runner, self.max_new_tokens, self.read_last = runner, max_new_tokens, read_last
        if max_new_tokens and (runner.lm.head is None or stop is None):
            raise EngineError("generation needs a model with a head and a stop automaton")
        self.stop = stop.to(runner.device) if stop is not None else None
        self.choosing: Choosing | None = None
        if self.stop is not None:
            self.choosing = Choosing(sampling, self.stop.table, self.stop.stopped, read_last)
        slots = self.most_lanes = runner.slots
        self.state = SlotState.allocate(slots, max_new_tokens, runner.device)
        self._active = Glance(self.state.active)
        wanted = max(_PASS * max_prefill_tokens, runner.length)
        given = runner.tap.allocate(slots, steps=STEPS_BETWEEN_POLLS, given=wanted, step_by_step=True)
        self.most_tokens = min(given, _PASS * max_prefill_tokens)

    def prepare(self) -> None:
        """Allocate the tap's host memory."""
        self.runner.tap.prepare()

    def run(self, requests: Iterable[Request | None]) -> Generate[Completion]:
        """The completions of `groups`, one at a time."""
        with closing(self.groups(requests)) as groups:
            for group in groups:
                yield from group

    @torch.inference_mode()
    def groups(
        self,
        requests: Iterable[Request | None],
        portion: Portion = list,
        watch: Watch = lambda tally: None,
    ) -> collections.abc.Generator[list[Completion], None, None]:
        """As `Generator.groups`. A batch takes the next requests; it is left before the next ones are read."""
        source: Iterator[Any] = iter(requests)
        tally = Tally()
        while True:
            taken: list[Request] = []
            held_back = False
            while len(taken) < self.runner.slots:
                request = next(source, ...)
                held_back = request is None
                if held_back or request is ...:
                    break
                self._check(request)
                taken.append(request)
            if not taken:
                if held_back:
                    raise EngineError("requests were held back although nothing is running")
                return
            finished: dict[int, Ended] = {}
            for batch in self._batches(taken):
                finished |= {each.request.id: each for each in self._run_fitting(batch, tally, watch)}
            while finished:
                chosen = [
                    finished.pop(id_) for id_ in portion({i: each.nbytes for i, each in finished.items()})
                ]
                if not chosen:
                    raise EngineError("no sequence was chosen although all have ended")
                slots, counts = [each.slot for each in chosen], [each.count for each in chosen]
                generated = to_host(generated_by(self.state, slots, counts))
                yield completions(chosen, generated, self.runner.tap, NotAsked()).wait()

    def _check(self, request: Request) -> None:
        request.check(
            shared=len(self.runner.prefix),
            room=self.runner.length,
            where=f"the {self.runner.length} that were announced",
            new=self.max_new_tokens,
            vectors=self.runner.injector.most,
        )

    def _batches(self, taken: list[Request]) -> Iterator[Batch]:
        """The requests, cut where reading a longer prompt token by token would cost more than another batch, or a pass
        would read too many tokens."""
        slots = sorted(range(len(taken)), key=lambda i: len(taken[i].token_ids))
        group: list[int] = []
        shared = len(self.runner.prefix)
        for slot in slots:
            size = shared + len(taken[slot].token_ids)
            if group:
                shortest = shared + len(taken[group[0]].token_ids)
                generating = any(taken[i].max_new_tokens for i in (*group, slot))
                pass_size = (len(group) + 1) * (shortest if generating else size)
                crowded = len(group) == self.most_lanes or pass_size > self.most_tokens
                if crowded or (generating and size > shortest + self.max_new_tokens):
                    yield self._batch(taken, group)
                    group = []
            group.append(slot)
        yield self._batch(taken, group)

    def _batch(self, taken: list[Request], slots: list[int]) -> Batch:
        return Batch([taken[slot] for slot in slots], slots, self.runner.prefix, self.runner.device)

    def _run_fitting(self, batch: Batch, tally: Tally, watch: Watch) -> list[Ended]:
        """Run a batch. If it does not fit the free memory, its halves, and no larger ones from then on."""
        lanes = len(batch.requests)
        try:
            return self._run(batch, tally, watch)
        except torch.OutOfMemoryError as error:
            if lanes == 1:
                raise EngineError(
                    f"{self.runner.lm.name}: one sequence of {int(batch.ends.max())} tokens does not fit the free "
                    f"memory of {self.runner.device}"
                ) from error
        self._open(batch)  # forgets the rows of the failed batch
        torch.cuda.empty_cache()  # what the failed batch held
        self.most_lanes = lanes // 2
        halves = batch.halves(self.runner.prefix, self.runner.device)
        return [each for half in halves for each in self._run_fitting(half, tally, watch)]

    def _run(self, batch: Batch, tally: Tally, watch: Watch) -> list[Ended]:
        """Run a batch to its end, and settle its rows."""
        state, at = self.state, batch.slots
        columns = to_device(
            np.array([[request.draws for request in batch.requests], batch.limits, batch.sizes]),
            self.runner.device,
        )
        state.sequence[at], state.limit[at] = columns[0], columns[1]
        state.position[at] = columns[2] - 1  # the last prompt token: reading it gives the first new token
        state.token[at] = 0
        state.count[at] = 0
        state.stop_state[at] = 0
        state.closing[at] = False
        state.active[at] = True
        running = _Running(self, batch, tally, watch)
        vectors = {
            slot: request.vectors for slot, request in running.requests.items() if request.vectors is not None
        }
        if vectors:
            self.runner.injector.put(list(vectors), list(vectors.values()))
        self.runner.tap.drain()
        self._open(batch)
        running.begin()
        if batch.limits.any():
            assert self.choosing is not None
            self.runner.generate(batch, state, self.choosing, running.passed)
        else:
            self.runner.read(batch)
            state.active[at] = False
            self.runner.tap.look(decoded=False)
        return running.finish()

    def _open(self, batch: Batch) -> None:
        ids = [request.id for request in batch.requests]
        totals = (batch.sizes + batch.limits).tolist()
        self.runner.tap.open(batch.slots.tolist(), ids, batch.sizes.tolist(), totals)


class _Running:
    """A batch that runs: its rows, and which of its sequences have ended.

    Passes are announced to the tap, and rows of ended sequences settled, in turns of several passes.
    """

    def __init__(self, generator: LibraryGenerator, batch: Batch, tally: Tally, watch: Watch) -> None:
        self.batch, self.tally, self.watch = batch, tally, watch
        self.state, self.tap, self._stop = generator.state, generator.runner.tap, generator.stop
        slots = batch.slots.tolist()
        self.requests = dict(zip(slots, batch.requests, strict=True))  # of each slot that is not settled
        self._sizes = dict(zip(slots, batch.sizes.tolist(), strict=True))
        self._ended: list[Ended] = []
        self._active = generator._active
        self._more = batch.until(generator.read_last) - batch.new  # passes after the first, at most
        self._left = 0  # passes of this turn that are still to be queued
        self._read = tally.read  # before this batch

    def begin(self) -> None:
        """Announce the first pass. Whatever is to be queued before it has been."""
        self._active.take()
        self.tap.reads([(slot, 0, self.batch.new) for slot in self.requests])
        self._announce(self._more)
        self._left += 1

    def _announce(self, more: int) -> None:
        """Begin a turn. more: passes that may follow."""
        self._left = min(STEPS_BETWEEN_POLLS, more)
        if self._left:
            # What had not ended before the last pass has a row of it, so that all rows are there when a turn begins.
            self.tap.decodes(list(self.requests), self._left, 0)

    def passed(self, generating: int, more: int) -> bool:
        """After a pass is queued in which so many lanes generated: whether another one follows. `Each` of LockStep.

        Waits for the pass before at most, so a batch may run one pass too many, in which no lane has a row or a token.
        """
        self.tally.steps, self.tally.lanes = self.tally.steps + 1, self.tally.lanes + generating
        self.watch(self._told)
        (active,) = self._active.read()
        self._active.take()
        if self._active.passed:
            (active,) = self._active.read()
        if not more or not any(active[slot] for slot in self.requests):
            return False
        self._left -= 1
        if not self._left:
            self._settle([slot for slot in self.requests if not active[slot]])
            self.tap.drain()
            self._announce(more)
        if self._left == 1:  # the device takes the last pass of the turn while the host reads what it saw
            self.tap.look(decoded=True)
        return True

    def _told(self) -> Tally:
        batch, tally = self.batch, self.tally
        tally.read = self._read + int(np.minimum(batch.sizes, batch.start).sum())
        new = np.minimum(batch.start + 1 - batch.sizes, batch.limits)
        tally.running = new[batch.sizes <= batch.start].tolist()
        return tally

    def _settle(self, slots: list[int]) -> None:
        """Settle the rows of sequences that have ended. Waits for the device if there are any."""
        counts, states = [], []
        if slots:
            self.tap.look(decoded=True)  # some may have ended after the last one
            at = to_device(np.array(slots, np.int64), self.state.count.device)
            counts, states = self.state.count[at].tolist(), self.state.stop_state[at].tolist()
        sizes = [self._sizes[slot] + count for slot, count in zip(slots, counts, strict=True)]
        kept = self.tap.settle(slots, sizes)
        for slot, count, state, rows in zip(slots, counts, states, kept, strict=True):
            request = self.requests.pop(slot)
            self._ended.append(Ended(request, slot, count, finish_of(request, state, self._stop), rows))

    def finish(self) -> list[Ended]:
        """After the last pass: the ended sequences, which are all."""
        self._settle(list(self.requests))
        self.tally.running = []
        self.tally.read = self._read + int(self.batch.sizes.sum())
        for each in self._ended:
            self.tally.end(each.count, each.request.max_new_tokens)
        self.watch(lambda: self.tally)
        return self._ended
