"""The tap: rows of the residual stream, encoded on the device the moment a block has computed them.

A decode step's row goes to the ring of its slot, a prompt's to the places of its pass. A row's place follows from slot
and position, and every place is marked as unwritten before its row comes, so a missing row is found. Rows leave when a
sequence ends; before that, when a ring fills up or the next pass needs its places.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future

import numpy as np
import torch

from nla_engine.capture.collect import Collector, Ending, StagedSequence
from nla_engine.capture.outbox import Outbox
from nla_engine.capture.row_range import RowRange
from nla_engine.capture.spill import HeldRows, Piece, RowKeeper
from nla_engine.capture.staging import Staging
from nla_engine.codec.rows import Codec
from nla_engine.engine.attention import counted
from nla_engine.engine.tap import Collected, KeptRows
from nla_engine.engine.transfer import to_device
from nla_engine.errors import EngineError
from nla_engine.ops.encode import encode_rows
from nla_engine.ops.places import row_places, row_places_reference
from nla_engine.sites import Site
from nla_engine.store.interrupt import interrupt_held

#: Lanes leave in turns: of those whose ring is filled to this part, at most so many rows per lane and decode step. A
#: little more than come in, so that what leaves is the same in every turn, even if all lanes began together.
_FILLED_PART, _ROWS_LEAVING = 1 / 3, 1.25

#: Takes a request's id and what it generated, int32 [n]; returns the positions to collect, int64 [k], ascending.
Choose = Callable[[int, np.ndarray], np.ndarray]


class RowTap:
    """Encodes the rows of `layers` in the range `rows`.

    layers: sites, each as a layer's number where it is a block's output
    rows_per_slot: generated rows of the longest sequence; slots need no more room
    sink_norm: by site; rows with a larger norm are sinks, and kept exactly as well
    choose: which rows of the range to collect once a sequence has ended; None: all
    skip_sinks: of these, leave out the sinks of any layer, but not rows that are not finite
    reference: use plain torch only
    keeper: keeps rows that have left until their sequences end; closed with the tap
    Implements `engine.tap.Tap`, which the generator calls.
    """

    def __init__(
        self,
        layers: Sequence[Site | int],
        codec: Codec,
        rows: RowRange,
        *,
        rows_per_slot: int,
        sink_norm: Mapping[Site, float],
        device: torch.device,
        choose: Choose | None = None,
        skip_sinks: bool = False,
        reference: bool = False,
        keeper: RowKeeper | None = None,
    ) -> None:
        self.layers = tuple(map(Site.at, layers))
        self.codec, self.rows, self.sink_norm = codec, rows, sink_norm
        self.choose, self.skip_sinks = choose, skip_sinks
        self.rows_per_slot = rows_per_slot
        self._device = device
        self._row_places = row_places_reference if reference else row_places
        self._backend = "torch" if reference else None
        self._places: tuple[torch.Tensor, torch.Tensor] | None = None
        self._next_pass: torch.Tensor | None = None  # where the rows of the pass to come go
        self._outbox = Outbox(self.layers, keeper or RowKeeper(codec, len(self.layers)), device)

    @property
    def reads_prompts(self) -> bool:
        """Whether rows of prompts are kept."""
        return self.rows.touches_prompts

    def allocate(self, slots: int, *, steps: int, given: int, step_by_step: bool = False) -> int:
        """Allocate staging buffers. Returns the most tokens of a pass."""
        longest = self.rows_per_slot
        if step_by_step:  # rows of prompts take places in the rings as well
            longest = max(longest, 2 * steps)
        self.staging = Staging(
            self.layers,
            self.codec,
            slots=slots,
            longest=longest,
            steps=steps,
            given=given,
            device=self._device,
        )
        self._collector = Collector(
            self.codec, self.layers, self._outbox.keeper, self.sink_norm, self.skip_sinks
        )
        self._steps = steps
        self._first = torch.zeros(slots + 1, dtype=torch.int64, device=self._device)
        self._end = torch.zeros_like(self._first)
        self._slots: dict[int, StagedSequence] = {}
        self._running = np.zeros(slots, bool)  # neither free nor ended
        # Of each slot: its kept positions; from `ring` on its rows are in its ring, written below `written`. That is
        # less than `ring` while positions are read that are not kept. The last `unseen` of them only if the sequence
        # had not ended before.
        self._from, self._to, self._ring, self._written, self._unseen = np.zeros((5, slots), np.int64)
        self._in_pass: list[int] = []  # slots with rows in the places of the last pass
        self._pass_tokens = np.zeros((2, 0), np.int64)  # slot and position of each of these places
        # Where the rows of a padded pass go.
        self._padded = torch.full((self.staging.given_size,), -1, dtype=torch.int64, device=self._device)
        return self.staging.given_size

    def __call__(self, layer: Site, hidden: torch.Tensor, slot: torch.Tensor, position: torch.Tensor) -> None:
        """Encode the rows of hidden [T, d] whose (slot, position) is kept. Launches only: no synchronisation."""
        if self._places is None or self._places[0] is not position:  # once per pass, not per layer
            places, self._next_pass = self._next_pass, None
            self._reading = places is not None
            if places is None:
                places = self._row_places(slot, position, self._first, self._end, self.staging.ring)
            self._places = (position, places)
        stage = (self.staging.reading if self._reading else self.staging.decoding)[layer]
        if len(self._places[1]):
            encode_rows(hidden, self._places[1], stage, self.sink_norm[layer], with_backend=self._backend)

    def prepare(self) -> None:
        """Allocate pinned memory."""
        self._outbox.prepare(self.staging.all)

    def open(self, slots: list[int], ids: list[int], prompt_sizes: list[int], totals: list[int]) -> None:
        """Forget all rows of these slots, and start new sequences there."""
        if self._running[slots].any():
            self.staging.look()
            self._fetch_exact()  # what others left behind is theirs, not that of their successors
        first = [self.rows.first(size) for size in prompt_sizes]
        end = [self.rows.end(size, total) for size, total in zip(prompt_sizes, totals, strict=True)]
        columns = to_device(np.array([slots, first, end]), self._first.device)
        self._first[columns[0]], self._end[columns[0]] = columns[1], columns[2]
        self.staging.forget(columns[0])
        self._from[slots] = self._ring[slots] = self._written[slots] = first
        self._to[slots], self._unseen[slots] = end, 0
        self._running[slots] = True
        for i, slot in enumerate(slots):
            if slot in self._slots:
                self._drop(self._slots[slot])
            chosen = None
            if self.choose is not None and totals[i] == prompt_sizes[i]:
                chosen = self._checked(ids[i], self.choose(ids[i], np.zeros(0, np.int32)), first[i], end[i])
            self._slots[slot] = StagedSequence(ids[i], prompt_sizes[i], first[i], end[i], chosen, {})

    def reads(self, runs: Sequence[tuple[int, int, int]], size: int | None = None) -> None:
        """The next pass reads these tokens: give those with rows their places. size: as in `Tap`"""
        if any(self._slots[slot].in_pass[2] for slot in self._in_pass):
            raise EngineError("a pass begins before the rows of the last one have left")
        slot, start, length = np.array(runs, np.int64).reshape(-1, 3).T
        stop, at = start + length, np.cumsum(length) - length
        low, high = np.maximum(start, self._from[slot]), np.minimum(stop, self._to[slot])
        some = np.flatnonzero(low < high)
        self._in_pass, taken = [], 0
        kept: list[np.ndarray] = []  # the positions of each of these runs that have rows
        columns = (slot, low, high, self._ring[slot])
        for number, first, end, ring in zip(*(column[some].tolist() for column in columns), strict=True):
            each = self._slots[number]
            if ring != first:
                raise EngineError(f"request {each.id}: position {first} is read after {ring}")
            begin, mine = first - each.first, np.arange(first, end)
            if each.chosen is not None:
                begin, last = np.searchsorted(each.chosen, [first, end]).tolist()
                mine = each.chosen[begin:last]
            if len(mine):
                each.in_pass = (begin, self.staging.given + taken, len(mine))
                self._in_pass.append(number)
                taken += len(mine)
            kept.append(mine)
        if taken > self.staging.given_size:
            raise EngineError(f"a pass has {taken} rows to keep, and room for {self.staging.given_size}")
        counts = np.array([len(mine) for mine in kept], np.int64)
        position = np.concatenate([np.zeros(0, np.int64), *kept])
        places = np.full(size or int(length.sum()), -1)
        places[np.repeat((at - start)[some], counts) + position] = self.staging.given + np.arange(taken)
        self._ring[slot] = np.maximum(self._ring[slot], stop)
        self._written[slot] = stop
        if size is None:
            self._next_pass = to_device(places if taken else np.zeros(0, np.int64), self._device)
        else:
            self._padded[:size].copy_(to_device(places, self._device))
        self._pass_tokens = np.stack([np.repeat(slot[some], counts), position])
        if taken:
            self.staging.expect(taken)

    def padded(self, size: int) -> None:
        """The pass that is computed next is padded: its places stay where they are."""
        self._next_pass = self._padded[:size]

    def decodes(self, slots: list[int], steps: int, after_look: int) -> None:
        """Each of these slots takes `steps` decode steps now. EngineError if its ring has no room for their rows."""
        self._written[slots] += steps
        self._unseen[slots] = after_look
        # A lane that has ended repeats its last step, one position further.
        filled = np.minimum(self._written + 1, self._to) - self._ring
        if (filled[slots] > self.staging.ring).any():
            raise EngineError("rows would be overwritten before they have left the device")

    def drain(self) -> None:
        """Make room: send rows of the last pass, and of rings that could be full after the next steps.

        Of a ring only what is there for certain: a sequence may have ended after the last look.
        """
        with interrupt_held():
            some = [self._slots[slot] for slot in self._in_pass]
            self._in_pass = []
            if some:
                number, place, size = np.array([each.in_pass for each in some]).T
                for each in some:
                    each.in_pass = (0, 0, 0)
                self._send(some, number, size, np.repeat(place, size) + counted(size))
            slots = self._leaving()
            if len(slots):
                number = self._ring[slots] - self._from[slots]
                stop = np.minimum(self._written - self._unseen, self._to)[slots]
                size = stop - self._ring[slots]
                self._ring[slots] = stop
                index = (np.repeat(number, size) + counted(size)) % self.staging.ring
                place = np.repeat(slots, size) * self.staging.ring + index
                self._send([self._slots[slot] for slot in slots.tolist()], number, size, place)

    def _leaving(self) -> np.ndarray:
        """Slots whose rings leave now, int64 [n]: those too full for the next steps, and the fullest of the others, so
        that not all are full at once. Sequences whose remaining rows fit their rings stay."""
        ring = self.staging.ring
        filled = np.minimum(self._written, self._to) - self._ring
        there = np.minimum(self._written - self._unseen, self._to) - self._ring
        waiting = self._running & (self._to - self._ring > ring)
        must = waiting & (filled + self._steps + 1 > ring)  # see `decodes`
        least = max(min(int(ring * _FILLED_PART), ring - 2 * self._steps), 1)
        may = np.flatnonzero(waiting & ~must & (there >= least))
        room = _ROWS_LEAVING * self._steps * int(self._running.sum()) - int(there[must].sum())
        may = may[np.argsort(-there[may], kind="stable")]
        may = may[np.cumsum(there[may]) - there[may] < room]
        return np.concatenate([np.flatnonzero(must), may])

    def _send(
        self, sequences: Sequence[StagedSequence], number: np.ndarray, size: np.ndarray, place: np.ndarray
    ) -> None:
        """Send rows of some sequences: of each the number of the first, and how many, int64 [n]; the places of all of
        them, int64 [sum of size]. The copies and the marks of their places are queued before this returns."""
        most = self._outbox.most
        parts = -(-size // most)
        at = counted(parts) * most
        owner, number = np.repeat(np.arange(len(sequences)), parts), np.repeat(number, parts) + at
        size = np.minimum(np.repeat(size, parts) - at, most)
        pieces = [
            self._piece(sequences[i], *each)
            for i, *each in zip(owner.tolist(), number.tolist(), size.tolist(), strict=True)
        ]
        end, done, sent = np.cumsum(size), 0, 0
        while done < len(pieces):
            stop = int(np.searchsorted(end, sent + most, "right"))
            upto = int(end[stop - 1])
            self._outbox.send(self.staging.leaving(self.staging.by_row(place[sent:upto])), pieces[done:stop])
            done, sent = stop, upto

    def _piece(self, each: StagedSequence, number: int, size: int) -> Piece:
        """The next rows of a sequence that the host gets."""
        if each.held is None:
            each.held = HeldRows(each.end - each.first if each.chosen is None else len(each.chosen))
        each.sent = number + size
        return Piece(each.held, number, size)

    def look(self, *, decoded: bool) -> None:
        """Queue a read of how many rows were kept exactly. Passes without rows need none."""
        if decoded or self._pass_tokens.size:
            self.staging.look()

    def settle(self, slots: list[int], sizes: list[int]) -> list[KeptRows]:
        """Fetch the rows kept exactly that the last `look` saw."""
        self._fetch_exact()
        self._running[slots] = False
        row_bytes = self.codec.row_bytes * len(self.layers)
        ended = []
        for slot, size in zip(slots, sizes, strict=True):
            each = self._slots[slot]
            exact = sum(part.nbytes for held in each.exact.values() for part in held)
            count = len(each.chosen) if each.chosen is not None else self._kept_end(each, size) - each.first
            ended.append(KeptRows(slot, size, count * row_bytes + exact))
        return ended

    def _kept_end(self, each: StagedSequence, size: int) -> int:
        """One past the last kept position of a sequence with `size` tokens."""
        return max(min(self.rows.end(each.prompt_size, size), size), each.first)

    def _fetch_exact(self) -> None:
        """Copy the rows kept exactly to the host, where they stay until their sequences end.

        A lane that has ended repeats its last step, which may give its successor in the slot a row that is not its own.
        The device wrote that row before any of the successor, and of two rows at one position the later one counts.
        """
        ring, given = self.staging.ring, self.staging.given
        for layer, parts in self.staging.take_exact().items():
            for part in parts:
                in_pass = part.place >= given
                slot, position = part.place // ring, part.place % ring
                slot[in_pass], position[in_pass] = self._pass_tokens[:, part.place[in_pass] - given]
                decoded = ~in_pass  # the last position, up to one past what was written, that has this place
                at = slot[decoded]
                last = np.minimum(self._written[at], self._to[at] - 1) - self._from[at]
                lap = last - (last - position[decoded]) % ring
                position[decoded] = self._from[at] + lap
                order = np.argsort(slot, kind="stable")
                for mine in np.split(order, np.flatnonzero(np.diff(slot[order])) + 1):
                    new = (position[mine], part.bits[mine])
                    exact = self._slots[int(slot[mine[0]])].exact
                    if (known := exact.get(layer)) is not None:
                        new = (np.concatenate([known[0], new[0]]), np.concatenate([known[1], new[1]]))
                    exact[layer] = new

    def collect(
        self, ended: Sequence[KeptRows], replies: Sequence[tuple[int, np.ndarray]]
    ) -> Future[Collected]:
        """Of each ended sequence the positions chosen, and their rows (LayerRows) by site. The result raises
        EngineError if one was never written.

        Of rows still on the device only these leave it.
        """
        endings, places = [], [np.zeros(0, np.int64)]
        for kept, reply in zip(ended, replies, strict=True):
            ending, place = self._ending(kept, *reply)
            endings.append(ending)
            places.append(place)
        with interrupt_held():
            sequences = [ending.sequence for ending in endings]
            self._outbox.call(self._outbox.keeper.end, [ending.held for ending in endings])
            number = np.array([each.sent for each in sequences], np.int64)
            size = np.array([len(place) for place in places[1:]], np.int64)
            self._send(sequences, number, size, np.concatenate(places))
            for each in sequences:
                each.held, each.sent, each.in_pass = None, 0, (0, 0, 0)
            return self._outbox.call(self._collector.collect, endings)

    def _ending(self, kept: KeptRows, id_: int, generated: np.ndarray) -> tuple[Ending, np.ndarray]:
        """An ended sequence, and the places of its rows that are to leave, int64 [k]. EngineError if some are missing,
        or one lies outside the range."""
        each = self._slots[kept.slot]
        if each.id != id_:
            raise EngineError(f"request {id_}: its slot holds request {each.id}")
        end = self._kept_end(each, kept.size)
        number, place, size = each.in_pass
        if each.chosen is not None:
            position = each.chosen[each.chosen < end]
            index, ring = np.arange(len(position)), np.zeros(0, np.int64)
        else:
            position = np.arange(each.first, end)
            if self.choose is not None:
                position = self._checked(id_, self.choose(id_, generated), each.first, end)
            index = position - each.first
            turn = self.staging.ring
            ring = kept.slot * turn + (np.arange(self._ring[kept.slot], end) - each.first) % turn
        places = np.concatenate([place + np.arange(size), ring])
        all_ = len(position) if each.chosen is not None else end - each.first
        if (size and number != each.sent) or each.sent + len(places) != all_:
            raise EngineError(f"request {id_}: {each.sent} and {len(places)} rows were staged of {all_}")
        border = int(np.searchsorted(index, each.sent))
        places = places[index[border:] - each.sent]
        if each.held is None:
            each.held = HeldRows(len(places))
        index = np.concatenate([index[:border], each.sent + np.arange(len(places))])
        return Ending(each, each.held, position, index), places

    def _checked(self, id_: int, positions: np.ndarray, first: int, end: int) -> np.ndarray:
        """The chosen positions. EngineError if one lies outside of [first, end)."""
        if len(positions) and not first <= positions[0] <= positions[-1] < end:
            raise EngineError(f"request {id_}: a row was chosen outside of positions {first} to {end - 1}")
        return positions

    def _drop(self, each: StagedSequence) -> None:
        """Forget the rows of a sequence that were sent to the host."""
        if each.held is not None:
            self._outbox.call(self._outbox.keeper.drop, each.held)
            each.held = None

    def close(self) -> None:
        """Forget all rows, and free what they hold on the host."""
        self._outbox.close()
