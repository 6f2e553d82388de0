"""Batched generation: requests enter free slots, are prefilled in packed chunks, decode together, and leave.

All state of a running sequence lives in tensors on the device (`SlotState`) and is advanced without looking at it; the
host only polls which slots have ended. Knows nothing of files, codecs or what a row is.
"""

from __future__ import annotations

import collections.abc
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from nla_engine.engine.graph import DecodeGraph, lane_bucket
from nla_engine.engine.logits import check_logits
from nla_engine.engine.request import Completion, Finish, Request
from nla_engine.engine.runner import Runner
from nla_engine.engine.sampling import Sampling
from nla_engine.engine.stopping import StopAutomaton
from nla_engine.engine.transfer import Glance, to_device
from nla_engine.errors import EngineError
from nla_engine.ops.choose import Choosing, SlotState, advance

#: Decode steps that the device takes alone before the host looks which sequences have ended.
STEPS_BETWEEN_POLLS = 8
#: The part of the slots that must be free before new prompts are read: a pass over few tokens costs as much as a step.
#: Before that nobody needs to know which sequences have ended.
REFILL_PART = 1 / 16

_T = TypeVar("_T")
Generate = collections.abc.Generator[_T, None, None]
#: Of sequences that ended, bytes by request id: which of them are to be fetched now.
Portion = Callable[[Mapping[int, int]], Sequence[int]]


class RowKeeper(Protocol):
    """What a tap offers the generator beside being called by the runner: slots opened, and rows collected."""

    def prepare(self) -> None:
        """Everything else is set up; the run comes next."""

    def open(self, slots: list[int], prompt_sizes: list[int], totals: list[int]) -> None:
        """These slots start new sequences of at most `total` tokens, `prompt_size` of them given."""

    @property
    def keeps_given(self) -> bool:
        """Whether tokens of prompts have rows, too."""

    def glance(self) -> None:
        """Queue a look at what there is to fetch. No synchronisation."""

    def waits(self) -> bool:
        """Whether the last look saw something, for which `poll` must come before more passes. Waits for the look."""

    def poll(self) -> None:
        """Fetch it. Always called between the end of a sequence and its `collect`. Waits for the device."""

    def nbytes(self, slots: list[int], sizes: list[int]) -> list[int]:
        """Bytes that the rows of each of these sequences, which ended with `size` tokens, will take on the host."""

    def collect(self, slots: list[int], sizes: list[int]) -> list[dict[int, Any]]:
        """The rows of sequences that ended with `size` tokens, by layer."""


class _Source:
    """The requests. dry: the last look gave nothing; held: because the caller holds back, not because it has ended."""

    def __init__(self, requests: Iterable[Request | None]) -> None:
        self._requests = iter(requests)
        self.dry = self.held = False

    def next(self) -> Request | None:
        request = next(self._requests, ...)
        self.held = request is None
        self.dry = request is None or request is ...
        return None if request is ... else request


@dataclass
class _Admitted:
    """A request in a slot. done: prompt tokens read so far; steps: decode steps since; twins: share its prompt.

    count: tokens generated, nbytes: of its generated tokens and rows; known once it has ended.
    """

    request: Request
    slot: int
    done: int = 0
    steps: int = 0
    twins: list[_Admitted] = field(default_factory=list)
    count: int = 0
    nbytes: int = 0


class Generator:
    """Runs requests through a Runner.

    read_last: read the last generated token too (one more pass, nothing sampled), as capture needs.
    max_prefill_tokens: most prompt tokens of one pass; longer prompts are read in chunks, between decode steps.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        max_new_tokens: int,
        stop: StopAutomaton | None = None,
        sampling: Sampling = Sampling(),
        keeper: RowKeeper | None = None,
        read_last: bool = False,
        max_prefill_tokens: int = 2048,
    ) -> None:
        self.runner = runner
        self.max_new_tokens = max_new_tokens
        self.sampling = sampling
        self.keeper = keeper
        self.read_last = read_last
        self.max_prefill_tokens = max_prefill_tokens
        if max_new_tokens and (runner.lm.head is None or stop is None):
            raise EngineError("generation needs a model with a head and a stop automaton")
        if max_new_tokens:
            check_logits(runner.lm)
        self.stop = stop.to(runner.device) if stop is not None else None
        self.state = SlotState.allocate(runner.cache.slots, max_new_tokens, runner.device)
        self.state.position.fill_(runner.cache.prefix_size)
        self._active = Glance(self.state.active)
        self._graphs: dict[int, DecodeGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if runner.graphable else None

    def run(self, requests: Iterable[Request | None]) -> Generate[Completion]:
        """`groups`, one completion after the other."""
        with closing(self.groups(requests)) as groups:
            for group in groups:
                yield from group

    @torch.inference_mode()
    def groups(
        self, requests: Iterable[Request | None], portion: Portion = list
    ) -> Generate[list[Completion]]:
        """Yield a Completion for each request, in order of ending; those that ended together in one list.

        The iterable is read only when a slot is free. It may yield None for "nothing just now" while others still run;
        None with nothing running is an error of the caller.
        portion: which of the sequences that ended to fetch, all by default. The others stay on the device, in their
            slots, and are asked for again when the caller has taken those; with nothing running it must choose one.
        """
        source = _Source(requests)
        free = deque(range(self.runner.cache.slots))
        refill = math.ceil(self.runner.cache.slots * REFILL_PART)
        reading: deque[_Admitted] = deque()
        decoding: dict[int, _Admitted] = {}
        resting: dict[int, _Admitted] = {}  # ended, and not fetched yet, by request id
        ready: list[Completion] = []
        while True:
            entered = False
            if not decoding or len(free) >= refill:
                entered = self._admit(source, free, reading)
            if not reading and not decoding:
                if ready:  # the caller may let requests go once it has these
                    yield ready
                    ready = []  # its memory goes before the next is fetched
                elif not resting:
                    if source.held:
                        raise EngineError("requests were held back although nothing is running")
                    return
                elif not (ready := self._fetch(resting, free, portion)):
                    raise EngineError("no sequence was chosen although all have ended")
                continue
            ended: list[_Admitted] = []
            if reading:
                for admitted in self._prefill(reading):
                    if admitted.request.max_new_tokens:
                        decoding[admitted.slot] = admitted
                    else:
                        ended.append(admitted)
            # Every slot that can be filled is filled before the next step; only a prompt of several passes waits.
            filling = entered and bool(free) and not reading and not source.dry
            stepping = bool(decoding) and not filling
            if stepping:
                ends = 0 if reading else refill if source.dry else refill - len(free)
                self._decode(decoding, ends)
            if ready:
                yield ready  # while the device works: what the caller does with them costs no time
                ready = []
            if stepping:
                active = self._active.read()
                ended += [decoding.pop(slot) for slot in sorted(decoding) if not active[slot]]
            elif self.keeper is not None and self.keeper.keeps_given:
                self.keeper.glance()
            if self.keeper is not None and (ended or self.keeper.waits()):
                self.keeper.poll()
            self._measure(ended)
            resting |= {admitted.request.id: admitted for admitted in ended}
            ready = self._fetch(resting, free, portion)

    def _admit(self, source: _Source, free: deque[int], reading: deque[_Admitted]) -> bool:
        """Fill free slots, with as many prompts as one prefill pass can read. True if any entered."""
        room = self.max_prefill_tokens - sum(len(a.request.token_ids) - a.done for a in reading)
        entered: list[_Admitted] = []
        while free and room > 0 and (request := source.next()) is not None:
            self._check(request)
            admitted = _Admitted(request, free.popleft())
            if request.again and entered:  # else the one before is under way already: read the prompt again
                entered[-1].twins.append(admitted)
            else:
                entered.append(admitted)
                room -= len(request.token_ids)
        if entered:
            self._open([each for first in entered for each in (first, *first.twins)])
            reading.extend(entered)
        return bool(entered)

    def _check(self, request: Request) -> None:
        total = self.runner.cache.prefix_size + len(request.token_ids) + request.max_new_tokens
        room = self.runner.cache.prefix_size + self.runner.cache.size - 1
        if not request.token_ids or total > room or request.max_new_tokens > self.max_new_tokens:
            raise EngineError(
                f"request {request.id}: {len(request.token_ids)} prompt and {request.max_new_tokens} new tokens "
                f"do not fit a slot of {room}"
            )
        if request.again and self.keeper is not None:
            raise EngineError(f"request {request.id}: shares a prompt, so it has no rows for the tap")

    def _open(self, entered: list[_Admitted]) -> None:
        state, prefix = self.state, self.runner.cache.prefix_size
        slots = [a.slot for a in entered]
        sizes = [prefix + len(a.request.token_ids) for a in entered]
        limits = [a.request.max_new_tokens for a in entered]
        columns = to_device(
            np.array([slots, [a.request.id for a in entered], limits, sizes]), self.runner.device
        )
        at = columns[0]
        state.sequence[at], state.limit[at] = columns[1], columns[2]
        state.position[at] = columns[3] - 1  # the last prompt token, whose reading gives the first new one
        state.count[at] = 0
        state.stop_state[at] = 0
        state.closing[at] = False
        state.active[at] = True
        carriers = [a for a in entered if a.request.vector is not None]
        if carriers:
            table = self.runner.vectors
            rows = torch.stack([a.request.vector for a in carriers])  # type: ignore[misc]
            at = to_device(np.array([a.slot for a in carriers]), table.device)
            table[at] = rows.to(table.device, table.dtype)
        if self.keeper is not None:
            self.keeper.open(slots, sizes, [size + limit for size, limit in zip(sizes, limits, strict=True)])

    def _prefill(self, reading: deque[_Admitted]) -> list[_Admitted]:
        """One packed pass. Returns the requests whose prompt has now been read; their first token is chosen."""
        room, prefix = self.max_prefill_tokens, self.runner.cache.prefix_size
        parts, complete, offset = [], [], 0
        wanted: list[int] = []  # tokens of the pass at which a prompt ends
        rows: list[int] = []  # and for each complete request, which of these is its own
        while reading and room > 0:
            admitted = reading[0]
            ids = admitted.request.token_ids[admitted.done : admitted.done + room]
            parts.append((admitted.slot, prefix + admitted.done, ids))
            admitted.done += len(ids)
            offset += len(ids)
            room -= len(ids)
            if admitted.done == len(admitted.request.token_ids):
                reading.popleft()
                complete += [admitted, *admitted.twins]
                rows += [len(wanted)] * (1 + len(admitted.twins))
                wanted.append(offset - 1)
        hidden = self.runner.prefill(parts, wanted or [offset - 1])
        twins = [(admitted, twin) for admitted in complete for twin in admitted.twins]
        if twins:
            longest = max(len(admitted.request.token_ids) for admitted, _ in twins)
            self.runner.cache.copy([a.slot for a, _ in twins], [twin.slot for _, twin in twins], longest)
        going_on = [i for i, admitted in enumerate(complete) if admitted.request.max_new_tokens]
        if going_on:
            lanes, mine = [complete[i].slot for i in going_on], [rows[i] for i in going_on]
            at = to_device(np.array([lanes, mine]), hidden.device)
            self._advance(at[0], hidden[at[1]])
        return complete

    def _decode(self, decoding: dict[int, _Admitted], ends: int) -> None:
        """Read a token each and choose the next: some steps, up to where `ends` sequences must have ended; 0: one step.

        Then `_active` can be read.
        """
        slots = sorted(decoding)
        if not self.runner.graphable:
            lanes = torch.tensor(slots, device=self.runner.device)
            self._step(lanes, int(self.state.position[lanes].max()) + 1)
            self._glance()
            return
        left = sorted(a.request.max_new_tokens + self.read_last - 1 - a.steps for a in decoding.values())
        steps = max(min(left[min(ends, len(left)) - 1], STEPS_BETWEEN_POLLS), 1) if ends > 0 else 1
        # The host looks before the last step, and queues the next ones while the device takes it. What ends in that
        # step is seen a look later; if something must end there, the host waits for it.
        early = int(steps > 1 and steps not in left)
        graph = self._graph(len(slots))
        graph.run(slots, steps - early)
        self._glance()
        graph.run(slots, early)
        for admitted in decoding.values():
            admitted.steps += steps

    def _glance(self) -> None:
        self._active.take()
        if self.keeper is not None:
            self.keeper.glance()

    def _graph(self, lanes: int) -> DecodeGraph:
        """The captured decode step for at least so many lanes."""
        size = min(lane_bucket(lanes), max(self.runner.cache.slots, lanes))
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
        """Build what the first steps need, so that a run's time is the run's: tuned products, a graph, buffers.

        Only full passes and steps of all slots are tuned; the others are few.
        """
        self.runner.tune(self.max_prefill_tokens)
        if self.runner.graphable and self.max_new_tokens:
            self.runner.tune(self.runner.cache.slots)
            self._graph(self.runner.cache.slots)
        if self.keeper is not None:
            self.keeper.prepare()

    @torch.inference_mode()
    def _step(self, lanes: torch.Tensor, longest: int) -> None:
        """Read the next token of each lane (int64 [B], slots) and choose the one after it."""
        state = self.state
        hidden = self.runner.decode(state.token[lanes], lanes, state.position[lanes], longest)
        self._advance(lanes, hidden)

    def _advance(self, lanes: torch.Tensor, hidden: torch.Tensor) -> None:
        """From the hidden states [B, d] of the tokens just read: choose, record and move on. No synchronisation."""
        advance(self.runner.lm.logits(hidden), lanes, self.state, self._choosing(), self.runner.reference)

    def _choosing(self) -> Choosing:
        stop, sampling = self.stop, self.sampling
        assert stop is not None
        return Choosing(sampling.temperature, sampling.seed, stop.table, stop.stopped, self.read_last)

    def _measure(self, ended: list[_Admitted]) -> None:
        """Note how many tokens were generated, and how much there is to fetch."""
        if not ended:
            return
        slots = [a.slot for a in ended]
        counts = self.state.count[to_device(np.array(slots), self.runner.device)].tolist()
        for admitted, count in zip(ended, counts, strict=True):
            admitted.count = count
        kept = self.keeper.nbytes(slots, self._sizes(ended)) if self.keeper is not None else [0] * len(ended)
        for admitted, nbytes in zip(ended, kept, strict=True):
            admitted.nbytes = nbytes + admitted.count * np.dtype(np.int32).itemsize

    def _sizes(self, ended: list[_Admitted]) -> list[int]:
        """Tokens of each, those of the prefix and the prompt among them."""
        return [self.runner.cache.prefix_size + len(a.request.token_ids) + a.count for a in ended]

    def _fetch(self, resting: dict[int, _Admitted], free: deque[int], portion: Portion) -> list[Completion]:
        """Fetch what `portion` chooses of those that rest; their slots are free then."""
        if not resting:
            return []
        chosen = [resting.pop(id_) for id_ in portion({id_: a.nbytes for id_, a in resting.items()})]
        free.extend(admitted.slot for admitted in chosen)
        return self._complete(chosen) if chosen else []

    def _complete(self, ended: list[_Admitted]) -> list[Completion]:
        state = self.state
        slots = [a.slot for a in ended]
        at = to_device(np.array(slots), self.runner.device)
        generated = state.generated[at].cpu().numpy().astype(np.int32)
        codes = (
            self.stop.finish_codes(state.stop_state[at]).tolist()
            if self.stop is not None
            else [0] * len(slots)
        )
        kept = (
            self.keeper.collect(slots, self._sizes(ended)) if self.keeper is not None else [{} for _ in ended]
        )
        return [
            Completion(
                request=a.request,
                generated=generated[i, : a.count],
                finish=Finish(codes[i]) if a.request.max_new_tokens else Finish.GIVEN,
                rows=kept[i],
            )
            for i, a in enumerate(ended)
        ]
