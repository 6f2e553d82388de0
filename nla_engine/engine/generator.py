"""Batched generation: requests enter free slots, are prefilled in packed passes, decode together, and leave.

The state of a running sequence is kept in tensors on the device (`SlotState`), and decode steps advance it there. The
host only checks which slots have ended. `Scheduler` decides what comes next, the generator does it.
"""

from __future__ import annotations

import collections.abc
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch

from nla_engine.engine.completions import Arriving, completions, generated_by
from nla_engine.engine.following import Following, NotAsked
from nla_engine.engine.forecast import Tally
from nla_engine.engine.graph import DecodeGraph, GraphSizes, capture_lanes, steps_meanwhile
from nla_engine.engine.logits import check_logits
from nla_engine.engine.pass_graphs import PassGraphs
from nla_engine.engine.request import Completion, Finish, Request
from nla_engine.engine.runner import Runner
from nla_engine.engine.scheduler import STEPS_BETWEEN_POLLS, Admitted, Ended, Kept, Run, Scheduler, Step
from nla_engine.engine.stopping import StopAutomaton, finish_of
from nla_engine.engine.transfer import Glance, to_device, to_host
from nla_engine.errors import EngineError
from nla_engine.ops.sampling import Choosing, Sampling, SlotState, advance

_T = TypeVar("_T")
Generate = collections.abc.Generator[_T, None, None]
#: Takes the bytes of each ended sequence by request id, returns the ids to fetch now.
Portion = Callable[[Mapping[int, int]], Sequence[int]]
Watch = Callable[[Callable[[], Tally]], None]
#: Of a sequence that has not stepped back.
_NOTHING = Kept((), 0, False)


class Generator:
    """Runs requests through a Runner, and collects the rows that the runner's tap keeps.

    read_last: also read the last generated token (one more pass that samples nothing), as capture needs.
    max_prefill_tokens: most prompt tokens per pass. Longer prompts are read in several passes, between decode steps.
    following: keeps what the model says of the token behind each row.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        max_new_tokens: int,
        stop: StopAutomaton | None = None,
        sampling: Sampling = Sampling(),
        read_last: bool = False,
        max_prefill_tokens: int = 2048,
        following: Following | None = None,
    ) -> None:
        self.runner = runner
        self.max_new_tokens = max_new_tokens
        self.read_last = read_last
        if max_new_tokens and (runner.lm.head is None or stop is None):
            raise EngineError("generation needs a model with a head and a stop automaton")
        self.following = following or NotAsked()
        if max_new_tokens or self.following.asked:
            check_logits(runner.lm)
        self.stop = stop.to(runner.device) if stop is not None else None
        self.choosing: Choosing | None = None
        if self.stop is not None:
            self.choosing = Choosing(sampling, self.stop.table, self.stop.stopped, read_last)
        slots = runner.cache.slots
        self.state = SlotState.allocate(slots, max_new_tokens, runner.device)
        self.state.position.fill_(runner.cache.prefix_size)
        self.max_prefill_tokens = runner.tap.allocate(
            slots, steps=STEPS_BETWEEN_POLLS, given=max_prefill_tokens
        )
        self.following.allocate(slots)
        self._look = Glance(self.state.active, self.state.count, self.state.stop_state)
        self._queue: Scheduler | None = None
        self._graphs: dict[int, DecodeGraph] = {}
        blocks, weights = len(runner.lm.blocks), runner.weights
        # Ranks have parts of different sizes, and must choose alike.
        self._sizes = GraphSizes(slots, capture_lanes(blocks, weights) if runner.ranks is None else 0.0)
        self._meanwhile = steps_meanwhile(blocks, weights, slots)
        self._pool: Any = torch.cuda.graph_pool_handle() if runner.graphable else None
        most = self.max_prefill_tokens if max_new_tokens else 0
        self._passes = PassGraphs(runner, most, self._advance, self._pool)
        self.ranks = runner.ranks
        runner.at_close.append(self._graphs.clear)

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
    ) -> Generate[list[Completion]]:
        """Yield a Completion for each request, in the order they end. Those that end together are in one list.

        The iterable is read only when a slot is free. It may yield None for "nothing just now" while others still run;
        None with nothing running is an error of the caller.
        portion: chooses which ended sequences to fetch, all by default. The others stay on the device, in their slots,
            and are offered again once the caller has taken the chosen ones. With nothing running it must choose one.
        watch: called after every turn with a function that says what has been done so far
        """
        self.runner.cache.release_all()  # sequences take blocks as they grow; an earlier run may have been left
        queue = Scheduler(
            requests,
            slots=self.runner.cache.slots,
            prefill_tokens=self.max_prefill_tokens,
            blocks=self.runner.cache.blocks,
            more_steps=self.read_last - 1,
            alone=self.runner.graphable,
            check=self._check,
            longest=self.runner.cache.size,
            after_look=self._meanwhile,
        )
        self._queue = queue
        arriving: Arriving | None = None
        while True:
            step = queue.schedule()
            if step is None:
                if arriving is not None:  # once the caller has these, it may stop holding requests back
                    yield arriving.wait()
                    arriving = None  # freed before the next group is fetched
                elif not queue.finished:
                    if queue.held_back:
                        raise EngineError("requests were held back although nothing is running")
                    return
                elif (arriving := self._fetch(queue, portion)) is None:
                    raise EngineError("no sequence was chosen although all have ended")
                continue
            for admitted, kept in self._step_back(step.stepped_back):
                queue.put_back(admitted, kept)
            self._take(step)
            if arriving is not None and self._while_device_works(arriving):
                yield arriving.wait()  # the device works meanwhile, so the caller's work costs no time
                arriving = None
            ended = queue.ended(self._look.read()[0] if step.slots else None)
            if self.ranks is not None:
                self.ranks.check()
            queue.finish(self._settle(ended))
            watch(queue.tally)
            if arriving is None:
                arriving = self._fetch(queue, portion)

    @torch.inference_mode()
    def unfinished(self) -> Generate[Completion]:
        """After `groups` has been stopped early: its running sequences, as if each had ended with the last token that
        was read. One whose rows are not complete, because the stop came between two steps of the work, is left out.

        EngineError if another rank has failed: what was computed since then means nothing."""
        if self.ranks is not None:
            self.ranks.check()
        position = self.state.position.tolist()
        self.runner.tap.look(decoded=True)
        for each in self._queue.running() if self._queue is not None else []:
            size, given = position[each.slot], self.runner.cache.prefix_size + len(each.request.token_ids)
            if size < given:
                continue
            generated = self.state.generated[each.slot, : size - given].to(torch.int32).cpu().numpy()
            with suppress(EngineError):
                kept = self.runner.tap.settle([each.slot], [size])
                [(positions, rows)] = self.runner.tap.collect(kept, [(each.request.id, generated)]).result()
                [told] = self.following.collect([each.slot], [positions])
                if told is not None:
                    told.next_logprob[positions == size - 1] = (
                        np.nan
                    )  # the token that follows has not been read
                yield Completion(each.request, generated, Finish.PARTIAL, rows, positions, told)

    def _check(self, request: Request) -> None:
        shared = self.runner.cache.prefix_size
        room = shared + self.runner.cache.size - 1
        request.check(
            shared=shared,
            room=room,
            where=f"a slot of {room}",
            new=self.max_new_tokens,
            vectors=self.runner.injector.most,
        )
        if request.again and self.runner.tap.reads_prompts:
            raise EngineError(f"request {request.id}: shares a prompt, and the tap keeps rows of prompts")

    def _take(self, step: Step) -> None:
        """Queue a step, and a look at which sequences have ended, without waiting for either."""
        self.runner.tap.drain()
        changes = self.runner.cache.blocks.changes()
        if self.ranks is None:
            self.do(step, changes)
        else:
            self.ranks.together(Generator.do, self, step, changes)

    def do(self, step: Step, changes: np.ndarray) -> None:
        """Queue a step, on every rank. changes: of the blocks that slots hold, as `Blocks.changes` says them."""
        cache = self.runner.cache
        cache.apply(changes)
        if self.ranks is not None and self.ranks.rank:
            cache.blocks.follow(changes)
        if step.entered:
            self._open(step.entered)
        if step.runs:
            self._prefill(step.runs)
        if step.slots:
            self._decode(step)
        else:
            self._take_look(decoded=False)

    def _step_back(self, admitted: list[Admitted]) -> list[tuple[Admitted, Kept | None]]:
        """What to keep of sequences that step back; None: it has ended meanwhile. Waits for the device if any do."""
        if not admitted:
            return []
        state = self.state
        at = to_device(np.array([a.slot for a in admitted]), self.runner.device)
        columns = torch.stack([state.active[at], state.closing[at], state.stop_state[at], state.count[at]])
        kept: list[tuple[Admitted, Kept | None]] = []
        active, closing, stop, counts = columns.tolist()
        tokens = to_host(generated_by(state, [a.slot for a in admitted], counts))
        for i, each in enumerate(admitted):
            there = Kept(tuple(tokens[i, : counts[i]].tolist()), stop[i], bool(closing[i]))
            kept.append((each, there if active[i] else None))
        return kept

    def _open(self, entered: list[Admitted]) -> None:
        state, prefix = self.state, self.runner.cache.prefix_size
        slots = [a.slot for a in entered]
        sizes = [prefix + len(a.request.token_ids) for a in entered]
        limits = [a.request.max_new_tokens for a in entered]
        kept = [a.kept or _NOTHING for a in entered]
        counts = [len(each.generated) for each in kept]
        columns = to_device(
            np.array(
                [
                    slots,
                    [a.request.draws for a in entered],
                    limits,
                    # Reading the last of these tokens gives the next.
                    [size + count - 1 for size, count in zip(sizes, counts, strict=True)],
                    counts,
                    [each.stop_state for each in kept],
                    [each.closing for each in kept],
                ]
            ),
            self.runner.device,
        )
        at = columns[0]
        state.sequence[at], state.limit[at], state.position[at], state.count[at] = columns[1:5]
        state.stop_state[at], state.closing[at] = columns[5].to(torch.uint8), columns[6].bool()
        state.active[at] = True
        if most := max(counts):
            tokens = np.zeros((len(kept), most), np.int64)
            for row, each in zip(tokens, kept, strict=True):
                row[: len(each.generated)] = each.generated
            state.generated[at, :most] = to_device(tokens, self.runner.device)
        vectors = {a.slot: a.request.vectors for a in entered if a.request.vectors is not None}
        if vectors:
            self.runner.injector.put(list(vectors), list(vectors.values()))
        totals = [size + limit for size, limit in zip(sizes, limits, strict=True)]
        self.runner.tap.open(slots, [a.request.id for a in entered], sizes, totals)
        self.following.open(slots, sizes, totals)

    def _prefill(self, runs: list[Run]) -> None:
        """One packed pass. Chooses the first token of each request whose prompt it completes."""
        prefix = self.runner.cache.prefix_size
        parts = []
        wanted: list[int] = []  # tokens of the pass at which a prompt ends
        lanes: list[tuple[int, int]] = []  # index in `wanted`, and slot that generates
        twins: list[tuple[Admitted, Admitted]] = []
        entering: list[tuple[int, int, int]] = []  # token, slot and number of each vector
        end = 0
        for run in runs:
            admitted, ids = run.admitted, run.admitted.ids
            parts.append((admitted.slot, prefix + run.start, ids[run.start : run.stop]))
            for number, place in enumerate(run.admitted.request.places):
                if run.start <= place < run.stop:
                    entering.append((end + place - run.start, admitted.slot, number))
            end += run.stop - run.start
            if run.completes:
                both = (admitted, *admitted.twins)
                lanes += [(len(wanted), a.slot) for a in both if a.request.max_new_tokens]
                twins += [(admitted, twin) for twin in admitted.twins]
                wanted.append(end - 1)
        told = self.following.of_prompts(runs, prefix)
        graph = None if told.token or entering else self._passes.fitting(end)
        reads = [(slot, start, len(ids)) for slot, start, ids in parts]
        self.runner.tap.reads(reads, None if graph is None else graph.size)
        if graph is not None:
            graph.run(parts, [(wanted[number], slot) for number, slot in lanes])
            lanes = []
        elif told.token:
            states = self.runner.prefill(parts, None, entering)
            self.following.read(self.runner.lm, states[to_device(np.array(told.token), states.device)], told)
            hidden = states[to_device(np.array(wanted, np.int64), states.device)]
        else:
            hidden = self.runner.prefill(parts, wanted or [end - 1], entering)
        if twins:
            longest = max(len(admitted.request.token_ids) for admitted, _ in twins)
            self.runner.cache.copy([a.slot for a, _ in twins], [twin.slot for _, twin in twins], longest)
        if lanes:
            at = to_device(np.array(lanes).T.copy(), hidden.device)
            self._advance(at[1], hidden[at[0]])

    def _decode(self, step: Step) -> None:
        """Take the decode steps, several at a time with a graph, and a look."""
        self.runner.tap.decodes(step.slots, step.steps, step.after_look)
        if self.runner.graphable:
            graph = self._graph(len(step.slots), step.steps)
            graph.run(step.slots, step.steps - step.after_look)
            self._take_look(decoded=True)
            graph.run(step.slots, step.after_look)
        else:
            lanes = torch.tensor(step.slots, device=self.runner.device)
            self._step(lanes, int(self.state.position[lanes].max()) + 1)
            self._take_look(decoded=True)

    def _take_look(self, *, decoded: bool) -> None:
        """The one look of a turn at the device."""
        self._look.take()
        self.runner.tap.look(decoded=decoded)
        if self.ranks is not None:
            self.ranks.look()

    def _graph(self, lanes: int, steps: int) -> DecodeGraph:
        """The captured decode step for so many steps of at least this many lanes."""
        size = self._sizes.choose(lanes, steps)
        if size not in self._graphs:
            longest = self.runner.cache.prefix_size + self.runner.cache.size
            self._graphs[size] = DecodeGraph(
                lambda at: self._step(at, longest),
                size,
                self.runner.cache.spare,
                self.runner.device,
                self._pool,
            )
        return self._graphs[size]

    def prepare(self) -> None:
        """Build what the first steps need, so that it does not count as run time: tuned products, a graph, buffers.

        Only full passes and steps of all slots are tuned; others are rare.
        """
        self.runner.tune(self.max_prefill_tokens)
        if self.runner.graphable and self.max_new_tokens:
            self.runner.tune(self.runner.cache.slots)
            self._graph(self.runner.cache.slots, 0)
            self._passes.prepare()
        self.runner.tap.prepare()  # last, because capturing a graph releases pinned memory

    @torch.inference_mode()
    def _step(self, lanes: torch.Tensor, longest: int) -> None:
        """Read the next token of each lane (int64 [B], slots) and choose the one after it."""
        state = self.state
        hidden = self.runner.decode(state.token[lanes], lanes, state.position[lanes], longest)
        self._advance(lanes, hidden)

    def _advance(self, lanes: torch.Tensor, hidden: torch.Tensor) -> None:
        """Choose and record the next tokens, given the hidden states [B, d] of those just read. No synchronisation."""
        assert self.choosing is not None
        logits = self.runner.lm.logits(hidden)
        before = self.following.before(lanes, self.state)
        advance(logits, lanes, self.state, self.choosing, self.runner.reference)
        self.following.after(logits, lanes, self.state, before)

    def _settle(self, ended: list[Admitted]) -> list[Ended]:
        """Settle the rows of these sequences. What has ended does not change after the last look, which saw its end."""
        slots, prefix = [a.slot for a in ended], self.runner.cache.prefix_size
        _, count, state = self._look.read() if ended else ([], [], [])
        counts = [count[slot] for slot in slots]
        sizes = [prefix + len(a.request.token_ids) + n for a, n in zip(ended, counts, strict=True)]
        kept = self.runner.tap.settle(slots, sizes)
        kept = [replace(k, nbytes=k.nbytes + k.size * self.following.row_bytes) for k in kept]
        finish = [finish_of(a.request, state[a.slot], self.stop) for a in ended]
        requests = [a.request for a in ended]
        return [Ended(*each) for each in zip(requests, slots, counts, finish, kept, strict=True)]

    def _while_device_works(self, arriving: Arriving) -> bool:
        """Wait for rows until a GPU has come to the last look. Whether to take them now. A CPU has no other work."""
        while self.runner.device.type == "cuda" and not arriving.have_come():
            if self._look.passed:
                return False
        return True

    def _fetch(self, queue: Scheduler, portion: Portion) -> Arriving | None:
        """Fetch the ended sequences that `portion` chooses, and free their slots. None: it chooses none."""
        if not queue.finished:
            return None
        chosen = queue.release(portion({id_: a.nbytes for id_, a in queue.finished.items()}))
        return self._complete(chosen) if chosen else None

    def _complete(self, ended: list[Ended]) -> Arriving:
        slots, counts = [each.slot for each in ended], [each.count for each in ended]
        generated = self._look.fetch(lambda: generated_by(self.state, slots, counts))
        return completions(ended, generated, self.runner.tap, self.following)
