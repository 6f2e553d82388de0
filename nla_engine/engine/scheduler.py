"""What the device does next: which requests enter free slots, which prompt tokens are read, which sequences decode.

A request waits, is read in one or several passes, runs, and has finished. The host decides all of this without tensors.

Sequences take blocks of the cache as they grow. If none is left, the one that came last steps back: it leaves its slot,
and is the first to enter again, where its prompt and what it generated are read as one prompt. The one that came first
never steps back, and has room for its whole length, so it ends, and all others after it.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from nla_engine.engine.blocks import Blocks
from nla_engine.engine.forecast import Tally
from nla_engine.engine.request import Finish, Request
from nla_engine.engine.tap import KeptRows

#: Decode steps of a turn, all without the host; most of them that come after its look at which sequences have ended.
STEPS_BETWEEN_POLLS, STEPS_AFTER_LOOK = 8, 4
#: The part of the slots that must be free before new prompts are read: a pass over few tokens costs as much as a step.
#: Until then the host need not know which sequences have ended.
REFILL_PART = 1 / 16
#: The part of the blocks that must be free, besides what a request needs, before one enters that lacked room.
_ROOM_PART = 1 / 32


@dataclass(frozen=True)
class Kept:
    """What is kept of a sequence that stepped back: its tokens so far; stop_state and closing as in `SlotState`."""

    generated: tuple[int, ...]
    stop_state: int
    closing: bool


@dataclass(eq=False)
class Admitted:
    """A request that has entered, or waits to enter again. age: its number among all requests of the run.

    ids: what is read before it generates; read: how many of them so far; steps: generated tokens that the host knows
    of, without the one that reading gives; twins: they share its prompt; kept: if it stepped back while it generated
    returned: whether it stepped back; seen: how many of `ids` had been read before that
    """

    request: Request
    age: int
    slot: int = -1
    read: int = 0
    steps: int = 0
    twins: list[Admitted] = field(default_factory=list)
    kept: Kept | None = None
    returned: bool = False
    seen: int = 0

    def __post_init__(self) -> None:
        generated = () if self.kept is None else self.kept.generated
        self.steps = len(generated)
        self.ids = self.request.token_ids + generated

    def places(self, steps: int) -> int:
        """Places of the cache that it needs for so many more decode steps."""
        return len(self.request.token_ids) + min(self.steps + steps, self.request.max_new_tokens)


@dataclass(frozen=True)
class Ended:
    """A request whose sequence has ended but keeps its slot. count: tokens generated; kept: its rows."""

    request: Request
    slot: int
    count: int
    finish: Finish
    kept: KeptRows

    @property
    def nbytes(self) -> int:
        """Its size on the host: rows, and tokens as int32."""
        return self.kept.nbytes + self.count * 4


@dataclass(frozen=True)
class Run:
    """Tokens [start, stop) of `ids`, read in one pass. They complete what is read if stop is its end."""

    admitted: Admitted
    start: int
    stop: int

    @property
    def completes(self) -> bool:
        return self.stop == len(self.admitted.ids)


@dataclass(frozen=True)
class Step:
    """One turn of the device: open slots, read prompt tokens in one pass, then decode.

    stepped_back: sequences whose state has to be fetched before anything else, see `Scheduler.put_back`
    entered: requests that take their slots now
    runs: what the pass reads; empty: no pass
    slots: those that decode, ascending, including requests whose prompt this pass completes; empty: no decode step
    steps: all decode steps; after_look: those of them that are queued after the host's look at what has ended
    """

    stepped_back: list[Admitted]
    entered: list[Admitted]
    runs: list[Run]
    slots: list[int]
    steps: int
    after_look: int


class Scheduler:
    """Moves requests from waiting to finished.

    requests: read only when a slot is free; None means "nothing just now". check: raises if a request cannot run.
    prefill_tokens: most prompt tokens per pass
    blocks: which each slot holds. One slot's longest sequence fits them.
    longest: places that a sequence may need. If there are blocks for as many in every slot, each sequence gets all of
        its own when it enters, and none can lack room; 0: nobody knows
    more_steps: decode steps of a sequence, minus its generated tokens: -1 as the first token needs no step, 0 if the
        last token is read too
    alone: whether the device can take several decode steps without the host (with CUDA graphs)
    after_look: decode steps that the device takes while the host decides what comes next, at most STEPS_AFTER_LOOK
    """

    def __init__(
        self,
        requests: Iterable[Request | None],
        *,
        slots: int,
        prefill_tokens: int,
        blocks: Blocks,
        more_steps: int,
        alone: bool,
        check: Callable[[Request], None],
        longest: int = 0,
        after_look: int = 1,
    ) -> None:
        self._requests = iter(requests)
        self._check = check
        self._prefill_tokens = prefill_tokens
        self._blocks = blocks
        self._fits = 0 < slots * blocks.of(longest) <= blocks.count
        self._more_steps = more_steps
        self._alone, self._after_look = alone, min(after_look, STEPS_AFTER_LOOK)
        self._ahead = STEPS_BETWEEN_POLLS if alone else 1  # most steps of a turn
        self._back: list[Admitted] = []  # waiting to enter again, or for room, the first to enter first
        self._no_room = False  # the first of these did not fit when last tried
        self._numbered = 0
        self._refill = math.ceil(slots * REFILL_PART)
        self._free = deque(range(slots))
        self._exhausted = False  # no request came when last asked for
        self.held_back = False  # None came instead: there are more, but not now
        self._reading: deque[Admitted] = deque()
        self._running: dict[int, Admitted] = {}  # by slot
        self._over: list[Admitted] = []  # these end with this turn, or have ended
        self.finished: dict[int, Ended] = {}  # by request id
        self._tally = Tally()

    def schedule(self) -> Step | None:
        """The next turn; None if no request is being read or running, and none can enter."""
        stepped_back = self._make_room()
        entered: list[Admitted] = []
        if not stepped_back and (not self._running or self._may_refill()):
            entered = self._admit()
        if not self._reading and not self._running and not stepped_back:
            return None
        runs = self._next_runs()
        # Fill all slots that can be filled before the next decode step. Only a prompt that no pass could read whole is
        # interleaved: one that a full pass has cut is completed by the next pass.
        long = any(len(a.ids) > self._prefill_tokens for a in self._reading)
        filling = entered and self._free and not long and not self._exhausted and not self._no_room
        if filling or not self._running:
            return Step(stepped_back, _with_twins(entered), runs, [], 0, 0)
        steps, after_look = self._decode_steps()
        return Step(stepped_back, _with_twins(entered), runs, sorted(self._running), steps, after_look)

    def ended(self, active: list[bool] | None) -> list[Admitted]:
        """The sequences that ended in the last turn. active: one per slot, from the host's look; None: no look."""
        ended, self._over = self._over, []
        if active is not None:
            ended += [self._running.pop(slot) for slot in sorted(self._running) if not active[slot]]
        for each in ended:
            self._blocks.release(each.slot)
        return ended

    def put_back(self, admitted: Admitted, kept: Kept | None) -> None:
        """A sequence of `stepped_back` leaves its slot, to enter again with what is kept of it. None: it has ended."""
        if kept is None:
            self._over.append(admitted)
            return
        self._free.append(admitted.slot)
        waits = Admitted(admitted.request, admitted.age, kept=kept, returned=True)
        waits.seen = len(waits.ids)
        self._wait(waits)

    def finish(self, ended: Iterable[Ended]) -> None:
        """Keep these in their slots until they are released."""
        for each in ended:
            self.finished[each.request.id] = each
            self._tally.end(each.count, each.request.max_new_tokens)

    def tally(self) -> Tally:
        """What has been done so far, which goes on counting. A sequence whose end has not been seen yet counts as
        running."""
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

    def _make_room(self) -> list[Admitted]:
        """Blocks for the next steps of every running sequence. Those that came last step back if there are too few;
        returns those of them that were running."""
        if self._fits:
            return []
        short = [a for a in self._running.values() if a.places(self._ahead) > self._blocks.room(a.slot)]
        stepped_back: list[Admitted] = []
        for admitted in sorted(short, key=_age):
            places = admitted.places(self._ahead)
            lacking = self._blocks.of(places - self._blocks.room(admitted.slot))
            while admitted.slot in self._running and lacking > self._blocks.free:
                last = max((*self._running.values(), *self._reading), key=_age)
                if last in self._reading:
                    self._reading.remove(last)
                    for each in (last, *last.twins):
                        self._blocks.release(each.slot)
                        self._free.append(each.slot)
                        seen = max(each.seen, each.read)
                        self._wait(Admitted(each.request, each.age, kept=each.kept, returned=True, seen=seen))
                else:
                    del self._running[last.slot]
                    self._blocks.release(last.slot)
                    stepped_back.append(last)
            if admitted.slot in self._running:
                self._blocks.grow(admitted.slot, places)
        return stepped_back

    def _wait(self, admitted: Admitted) -> None:
        """Queue it, to enter before all that came later."""
        self._tally.stepped_back += admitted.returned
        self._no_room = True
        insort(self._back, admitted, key=_age)

    def _may_refill(self) -> bool:
        """Whether so much is free that prompts should be read between decode steps."""
        lacks_room = self._no_room and self._blocks.free < self._reserve() + self._blocks.count * _ROOM_PART
        return len(self._free) >= self._refill and not lacks_room

    def _reserve(self) -> int:
        """Blocks that stay free for sequences that have entered: one for each that may need more."""
        if self._fits:
            return 0
        entered = (*self._running.values(), *_with_twins(self._reading))
        return min(sum(map(self._may_grow, entered)), math.ceil(self._blocks.count * REFILL_PART))

    def _may_grow(self, admitted: Admitted) -> bool:
        return admitted.places(admitted.request.max_new_tokens) > self._blocks.room(admitted.slot)

    def _admit(self) -> list[Admitted]:
        """Fill free slots with as many prompts as one pass can read. Twins are attached to the request they follow."""
        room = self._prefill_tokens - sum(len(a.ids) - a.read for a in self._reading)
        entered: list[Admitted] = []
        self._no_room = False
        most, reserve = math.ceil(self._blocks.count * REFILL_PART), self._reserve()
        while self._free and room > 0 and (admitted := self._next_request()) is not None:
            first = entered[-1] if entered and _is_twin(admitted, entered[-1]) else None
            places = admitted.places(admitted.request.max_new_tokens if self._fits else self._ahead)
            needed = self._blocks.of(places)
            if first is not None:
                needed -= len(admitted.ids) // self._blocks.size
            if needed > self._blocks.free - min(reserve, most):
                insort(self._back, admitted, key=_age)
                self._no_room = True
                break
            admitted.slot = self._free.popleft()
            if first is not None:  # else the one before is in an earlier turn: read the prompt again
                self._blocks.share(first.slot, admitted.slot, len(admitted.ids))
                first.twins.append(admitted)
            else:
                entered.append(admitted)
                self._reading.append(admitted)
                room -= len(admitted.ids)
            self._blocks.grow(admitted.slot, places)
            reserve += not self._fits and self._may_grow(admitted)
        return entered

    def _next_request(self) -> Admitted | None:
        """The first that waits to enter again, else the next request."""
        if self._back:
            return self._back.pop(0)
        request = next(self._requests, ...)
        self.held_back = request is None
        self._exhausted = request is None or request is ...
        if request is None or request is ...:
            return None
        self._check(request)
        self._numbered += 1
        return Admitted(request, self._numbered)

    def _next_runs(self) -> list[Run]:
        """The tokens of the next pass. Requests whose tokens it completes start to run, or end with it."""
        runs, room = [], self._prefill_tokens
        while self._reading and room > 0:
            admitted = self._reading[0]
            start = admitted.read
            stop = admitted.read = min(len(admitted.ids), start + room)
            room -= stop - start
            again = max(min(stop, admitted.seen) - start, 0)
            self._tally.again += again
            self._tally.read += stop - start - again
            runs.append(Run(admitted, start, stop))
            if stop == len(admitted.ids):
                self._reading.popleft()
                for each in (admitted, *admitted.twins):
                    if each.request.max_new_tokens:
                        self._running[each.slot] = each
                    else:
                        self._over.append(each)
        return runs

    def _decode_steps(self) -> tuple[int, int]:
        """Decode steps to take now, and how many of them come after the host's look.

        At most as many steps as it takes until enough sequences must have ended for a refill.
        """
        left = sorted(  # of each sequence, until it must have ended
            a.request.max_new_tokens + self._more_steps - a.steps for a in self._running.values()
        )
        ends = 0 if self._reading else self._refill
        if not self._exhausted and not self._no_room:
            ends -= len(self._free)
        steps = after_look = 1
        if self._alone and ends > 0:
            certain = left[min(ends, len(left)) - 1]
            steps = max(min(certain, STEPS_BETWEEN_POLLS), 1)
            # The host looks before the last steps and queues the next ones while the device takes them. A sequence that
            # ends in them is seen one look later. If as many as a refill needs are sure to end with the last step, the
            # host looks after it.
            after_look = 0 if certain <= steps else self._after_look
        after_look = min(after_look, steps - 1)
        for admitted in self._running.values():
            admitted.steps += steps
        self._tally.steps += steps
        self._tally.lanes += steps * len(self._running)
        return steps, after_look


def _age(admitted: Admitted) -> int:
    return admitted.age


def _is_twin(admitted: Admitted, first: Admitted) -> bool:
    """Whether the prompt that `first` reads now is all that this request has to read."""
    before = first.twins[-1] if first.twins else first
    follows = admitted.request.again and before.age == admitted.age - 1
    return follows and admitted.kept is None and first.kept is None


def _with_twins(entered: Iterable[Admitted]) -> list[Admitted]:
    return [each for first in entered for each in (first, *first.twins)]
