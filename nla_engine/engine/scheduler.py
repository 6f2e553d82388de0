"""What the device does next: which requests enter free slots, which prompt tokens are read, which sequences decode.

A request waits, is read in one or several passes, runs, and has finished. The host decides all of this without tensors.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from nla_engine.engine.forecast import Tally
from nla_engine.engine.request import Request
from nla_engine.engine.tap import KeptRows

#: Decode steps that the device takes without the host, before the host looks which sequences have ended.
STEPS_BETWEEN_POLLS = 8
#: The part of the slots that must be free before new prompts are read: a pass over few tokens costs as much as a step.
#: Until then the host need not know which sequences have ended.
REFILL_PART = 1 / 16


@dataclass
class Admitted:
    """A request in a slot. read: prompt tokens read so far; steps: decode steps since; twins: they share its prompt."""

    request: Request
    slot: int
    read: int = 0
    steps: int = 0
    twins: list[Admitted] = field(default_factory=list)


@dataclass(frozen=True)
class Ended:
    """A request whose sequence has ended but keeps its slot. count: tokens generated; kept: its rows."""

    request: Request
    slot: int
    count: int
    kept: KeptRows

    @property
    def nbytes(self) -> int:
        """Its size on the host: rows, and tokens as int32."""
        return self.kept.nbytes + self.count * 4


@dataclass(frozen=True)
class Run:
    """Prompt tokens [start, stop) of a request, read in one pass. They complete the prompt if stop is its end."""

    admitted: Admitted
    start: int
    stop: int

    @property
    def completes(self) -> bool:
        return self.stop == len(self.admitted.request.token_ids)


@dataclass(frozen=True)
class Step:
    """One turn of the device: open slots, read prompt tokens in one pass, then decode.

    entered: requests that take their slots now
    runs: what the pass reads; empty: no pass
    slots: those that decode, ascending, including requests whose prompt this pass completes; empty: no decode step
    steps: all decode steps; after_look: those of them that are queued after the host's look at what has ended
    """

    entered: list[Admitted]
    runs: list[Run]
    slots: list[int]
    steps: int
    after_look: int


class Scheduler:
    """Moves requests from waiting to finished.

    requests: read only when a slot is free; None means "nothing just now". check: raises if a request cannot run.
    prefill_tokens: most prompt tokens per pass
    more_steps: decode steps of a sequence, minus its generated tokens: -1 as the first token needs no step, 0 if the
        last token is read too
    alone: whether the device can take several decode steps without the host (with CUDA graphs)
    """

    def __init__(
        self,
        requests: Iterable[Request | None],
        *,
        slots: int,
        prefill_tokens: int,
        more_steps: int,
        alone: bool,
        check: Callable[[Request], None],
    ) -> None:
        self._requests = iter(requests)
        self._check = check
        self._prefill_tokens = prefill_tokens
        self._more_steps = more_steps
        self._alone = alone
        self._refill = math.ceil(slots * REFILL_PART)
        self._free = deque(range(slots))
        self._exhausted = False  # no request came when last asked for
        self.held_back = False  # None came instead: there are more, but not now
        self._reading: deque[Admitted] = deque()
        self._running: dict[int, Admitted] = {}  # by slot
        self._read_only: list[Admitted] = []  # these end with the pass that completes their prompt
        self.finished: dict[int, Ended] = {}  # by request id
        self._tally = Tally()

    def schedule(self) -> Step | None:
        """The next turn; None if no request is being read or running, and none can enter."""
        entered: list[Admitted] = []
        if not self._running or len(self._free) >= self._refill:
            entered = self._admit()
        if not self._reading and not self._running:
            return None
        runs = self._next_runs()
        # Fill all slots that can be filled before the next decode step. Only a prompt of several passes is interleaved.
        filling = entered and self._free and not self._reading and not self._exhausted
        if filling or not self._running:
            return Step(_with_twins(entered), runs, [], 0, 0)
        steps, after_look = self._decode_steps()
        return Step(_with_twins(entered), runs, sorted(self._running), steps, after_look)

    def ended(self, active: list[bool] | None) -> list[Admitted]:
        """The sequences that ended in the last turn. active: one per slot, from the host's look; None: no look."""
        ended, self._read_only = self._read_only, []
        if active is not None:
            ended += [self._running.pop(slot) for slot in sorted(self._running) if not active[slot]]
        return ended

    def finish(self, ended: Iterable[Ended]) -> None:
        """Keep these in their slots until they are released."""
        for each in ended:
            self.finished[each.request.id] = each
            self._tally.end(each.count, each.request.max_new_tokens)

    def tally(self) -> Tally:
        """What has been done so far. A sequence whose end has not been seen yet counts as running."""
        self._tally.running = [
            min(admitted.steps + 1, admitted.request.max_new_tokens) for admitted in self._running.values()
        ]
        return self._tally

    def running(self) -> list[Admitted]:
        """The sequences whose prompt has been read, and whose end has not been seen."""
        return list(self._running.values())

    def release(self, ids: Iterable[int]) -> list[Ended]:
        """Remove these finished requests and free their slots."""
        released = [self.finished.pop(id_) for id_ in ids]
        self._free.extend(each.slot for each in released)
        return released

    def _admit(self) -> list[Admitted]:
        """Fill free slots with as many prompts as one pass can read. Twins are attached to the request they follow."""
        room = self._prefill_tokens - sum(len(a.request.token_ids) - a.read for a in self._reading)
        entered: list[Admitted] = []
        while self._free and room > 0 and (request := self._next_request()) is not None:
            self._check(request)
            admitted = Admitted(request, self._free.popleft())
            if request.again and entered:  # else the one before is in an earlier turn: read the prompt again
                entered[-1].twins.append(admitted)
            else:
                entered.append(admitted)
                room -= len(request.token_ids)
        self._reading.extend(entered)
        return entered

    def _next_request(self) -> Request | None:
        request = next(self._requests, ...)
        self.held_back = request is None
        self._exhausted = request is None or request is ...
        return None if request is ... else request

    def _next_runs(self) -> list[Run]:
        """The prompt tokens of the next pass. Requests whose prompt it completes start to run, or end with it."""
        runs, room = [], self._prefill_tokens
        while self._reading and room > 0:
            admitted = self._reading[0]
            start, size = admitted.read, len(admitted.request.token_ids)
            admitted.read = min(size, start + room)
            room -= admitted.read - start
            self._tally.read += admitted.read - start
            runs.append(Run(admitted, start, admitted.read))
            if admitted.read == size:
                self._reading.popleft()
                for each in (admitted, *admitted.twins):
                    if each.request.max_new_tokens:
                        self._running[each.slot] = each
                    else:
                        self._read_only.append(each)
        return runs

    def _decode_steps(self) -> tuple[int, int]:
        """Decode steps to take now, and how many of them come after the host's look.

        At most as many steps as it takes until enough sequences must have ended for a refill.
        """
        left = sorted(a.request.max_new_tokens + self._more_steps - a.steps for a in self._running.values())
        ends = 0 if self._reading else self._refill if self._exhausted else self._refill - len(self._free)
        steps = 1
        if self._alone and ends > 0:
            steps = max(min(left[min(ends, len(left)) - 1], STEPS_BETWEEN_POLLS), 1)
        # The host looks before the last step and queues the next steps while the device takes it. A sequence that ends
        # in that step is seen one look later. If one is sure to end there, the host looks after that step instead.
        after_look = int(steps > 1 and steps not in left)
        for admitted in self._running.values():
            admitted.steps += steps
        self._tally.steps += steps
        self._tally.lanes += steps * len(self._running)
        return steps, after_look


def _with_twins(entered: list[Admitted]) -> list[Admitted]:
    return [each for first in entered for each in (first, *first.twins)]
