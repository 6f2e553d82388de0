"""Rows that leave while their sequences run: in any order of work each row once, in its place; a lost one is found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from nla_engine.capture import outbox, staging
from nla_engine.capture import tap as tap_module
from nla_engine.capture.row_range import RowRange
from nla_engine.capture.spill import RowKeeper
from nla_engine.capture.tap import RowTap
from nla_engine.codec.rows import Codec
from nla_engine.errors import EngineError
from nla_engine.store import LayerRows

WIDTH, STEPS, GIVEN = 32, 8, 11
LAYERS, SINK = (1, 4), {1: 7.0, 4: 6.0}  # about the norms' 90th and 60th percentile


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rings as small as they may be, portions of three rows."""
    monkeypatch.setattr(staging, "RING_BYTES", 0)
    monkeypatch.setattr(outbox, "PORTION_BYTES", 3 * Codec.named("int8", WIDTH).row_bytes * len(LAYERS))


@dataclass
class Sequence:
    """A sequence of the simulation: `given` tokens, `size` in the end. hidden: [L, size, d]. read: tokens read."""

    id: int
    given: int
    size: int
    hidden: np.ndarray
    slot: int = -1
    read: int = 0
    to_read: int = (
        0  # tokens that passes read before decode steps follow: more than `given` when it runs again
    )


@dataclass
class Simulation:
    """Does what a generator may do, in random order, with random rows: passes over parts of several sequences, steps
    that go on after a sequence has ended, looks that miss an end, sequences that lose their slots and run again."""

    rng: np.random.Generator
    tap: RowTap
    sequences: list[Sequence]
    slots: int
    lose_slots: bool = True
    waiting: list[Sequence] = field(default_factory=list)
    running: dict[int, Sequence] = field(default_factory=dict)
    ended: dict[int, tuple[Any, Sequence]] = field(default_factory=dict)
    found: dict[int, tuple[np.ndarray, dict[int, LayerRows]]] = field(default_factory=dict)
    counts: list[bool] = field(
        default_factory=list
    )  # of each token of the last call: whether its row is wanted
    seen: set[int] = field(default_factory=set)  # slots whose sequences had ended at the last look

    def run(self) -> None:
        self.waiting = list(self.sequences)
        self.tap.allocate(self.slots, steps=STEPS, given=GIVEN)
        while self.waiting or self.running or self.ended:
            self.turn()

    def turn(self) -> None:
        self.tap.drain()
        self.enter()
        passed = self.read()
        steps = self.decode(passed)
        if not steps:
            self.tap.look(decoded=False)
        done = [s for s in self.running.values() if s.slot in self.seen]
        kept = self.tap.settle([s.slot for s in done], [s.size for s in done])
        for each, sequence in zip(kept, done, strict=True):
            del self.running[sequence.slot]
            self.ended[sequence.slot] = (each, sequence)
        self.collect()

    def enter(self) -> None:
        if self.lose_slots and self.running and self.rng.random() < 0.2:
            slot = int(self.rng.choice(list(self.running)))
            back = self.running.pop(slot)
            back.to_read, back.read, back.slot = max(back.read, back.given), 0, -1
            self.waiting.insert(0, back)
        free = [s for s in range(self.slots) if s not in self.running and s not in self.ended]
        count = min(len(free), len(self.waiting), int(self.rng.integers(0, 3)) or int(not self.running))
        new, self.waiting = self.waiting[:count], self.waiting[count:]
        for sequence, slot in zip(new, self.rng.permutation(free).tolist(), strict=False):
            sequence.slot = slot
            self.running[slot] = sequence
        if new:
            sizes, totals = [s.given for s in new], [s.given + (s.size > s.given) * 40 for s in new]
            self.tap.open([s.slot for s in new], [s.id for s in new], sizes, totals)

    def read(self) -> bool:
        room, runs = int(self.rng.integers(1, GIVEN + 1)), []
        for sequence in self.running.values():
            length = min(room, sequence.to_read - sequence.read)
            if length > 0:
                runs.append((sequence.slot, sequence.read, length))
                room -= length
        if not runs:
            return False
        self.tap.reads(runs)
        self.write([(slot, p) for slot, start, length in runs for p in range(start, start + length)])
        for slot, _, length in runs:
            self.running[slot].read += length
        return True

    def decode(self, passed: bool) -> int:
        lanes = [s for s in self.running.values() if s.read >= s.to_read and s.size > s.given]
        self.seen = {s.slot for s in self.running.values() if s.read == s.size == s.given}
        if not lanes or (passed and self.rng.random() < 0.3):
            return 0
        steps = int(self.rng.integers(1, STEPS + 1))
        after_look = int(self.rng.integers(0, min(STEPS // 2, steps - 1) + 1))
        self.tap.decodes([s.slot for s in lanes], steps, after_look)
        for step in range(steps + 1):
            if step == steps - after_look:
                self.tap.look(decoded=True)
                self.seen |= {s.slot for s in lanes if s.read == s.size}
            if step == steps:
                break
            self.write([*((s.slot, s.read) for s in lanes), (self.slots, int(self.rng.integers(40)))])
            for sequence in lanes:
                sequence.read += sequence.read < sequence.size
        return steps

    def write(self, tokens: list[tuple[int, int]]) -> None:
        device = self.tap.staging.all.norm.device
        slot, position = (torch.tensor(column, device=device) for column in zip(*tokens, strict=True))
        self.counts = [s < self.slots and p < self.running[s].size for s, p in tokens]
        for number, layer in enumerate(LAYERS):
            rows = (
                self.rng.standard_normal((len(tokens), WIDTH)).astype(np.float32) * 9
            )  # of a lane that has ended
            for i, (s, p) in enumerate(tokens):
                if s < self.slots and p < self.running[s].size:
                    rows[i] = self.running[s].hidden[number, p]
            self.tap(layer, torch.from_numpy(rows).to(device), slot, position)

    def collect(self) -> None:
        taken = [slot for slot in self.ended if self.rng.random() < 0.7]
        if taken:
            ended = [self.ended.pop(slot) for slot in taken]
            replies = [(s.id, np.arange(s.size - s.given, dtype=np.int32)) for _, s in ended]
            rows = self.tap.collect([kept for kept, _ in ended], replies).result()
            self.found |= {s.id: got for (_, s), got in zip(ended, rows, strict=True)}


def sequences(rng: np.random.Generator, count: int = 14) -> list[Sequence]:
    """Of one to 30 given tokens, a third of them with nothing more, the others with up to 40 more."""
    made = []
    for id_ in range(count):
        given = int(rng.integers(1, 31))
        size = given + int(rng.integers(1, 41)) * (rng.random() < 0.7)
        hidden = rng.standard_normal((len(LAYERS), size, WIDTH)).astype(np.float32)
        made.append(Sequence(id_, given, size, hidden, to_read=given))
    return made


def simulation(
    rng: np.random.Generator,
    positions: str,
    codec: str = "int8",
    limit: float = np.inf,
    choose: Callable | None = None,
    device: str = "cpu",
    **how: Any,
) -> Simulation:
    made = Codec.named(codec, WIDTH)
    keeper = RowKeeper(made, len(LAYERS), limit)
    tap = RowTap(
        LAYERS, made, RowRange.parse(positions), rows_per_slot=40, sink_norm=SINK,
        device=torch.device(device), keeper=keeper, choose=choose, **how,
    )  # fmt: skip
    return Simulation(rng, tap, sequences(rng), slots=4)


def check(work: Simulation, choose: Callable | None = None, skip_sinks: bool = False) -> None:
    """Every sequence against the host's encoder."""
    keep, codec = work.tap.rows, work.tap.codec
    assert sorted(work.found) == [s.id for s in work.sequences]
    for sequence in work.sequences:
        positions, rows = work.found[sequence.id]
        want = np.arange(keep.first(sequence.given), keep.end(sequence.given, sequence.size))
        if choose is not None:
            want = choose(sequence.id, np.arange(sequence.size - sequence.given))
        norm = np.linalg.norm(sequence.hidden, axis=2)
        if skip_sinks:
            want = want[~(norm[:, want] > np.array(list(SINK.values()))[:, None]).any(0)]
        assert positions.tolist() == want.tolist()
        for number, layer in enumerate(LAYERS):
            true = LayerRows.encode(codec, sequence.hidden[number, want], SINK[layer])
            for name in ("codes", "scales", "norm", "exact_index", "exact"):
                got, expected = getattr(rows[layer], name), getattr(true, name)
                if codec.name == "bf16" and name.startswith("exact"):
                    assert not got.size  # its codes are exact
                    continue
                assert got.dtype == expected.dtype and got.shape == expected.shape
                assert (got == expected).all(), (sequence.id, layer, name)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("limit", [np.inf, 3000, 40])
@pytest.mark.parametrize("positions", ["generated", "all", "prompt", "last", "last,generated"])
def test_each_row_once_and_in_its_place(
    positions: str, limit: float, device: str, rng: np.random.Generator
) -> None:
    work = simulation(rng, positions, str(rng.choice(["int8", "int4", "bf16"])), limit, device=device)
    work.run()
    assert work.tap.staging.ring == 2 * STEPS
    work.tap.close()
    check(work)
    keeper = work.tap._outbox.keeper
    assert 0 <= keeper.peak <= limit and keeper._bytes == 0 and not keeper._held
    if positions in ("generated", "all", "last,generated"):
        assert (keeper.peak > 0) == (limit > 40) and (limit < np.inf or not keeper.spilled)
        assert keeper.spilled or limit > 40, "each piece is larger than that"


@pytest.mark.parametrize("limit", [np.inf, 500])
@pytest.mark.parametrize("skip_sinks", [False, True])
def test_chosen_rows(skip_sinks: bool, limit: float, rng: np.random.Generator) -> None:
    """Some positions, by what was generated: known from the start where nothing is generated."""
    work = simulation(rng, "all", limit=limit, skip_sinks=skip_sinks)
    given = {s.id: s.given for s in work.sequences}

    def choose(id_: int, generated: np.ndarray) -> np.ndarray:
        position = np.arange(given[id_] + len(generated))
        return position[(position * 7 + id_ + len(generated)) % 3 == 0]

    work.tap.choose = choose
    work.run()
    work.tap.close()
    check(work, choose, skip_sinks)


@pytest.mark.parametrize("positions", ["generated", "all"])
def test_a_row_that_is_lost_is_found(
    positions: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever it is: in a first lap or a later one, in a pass, of a sequence that leaves in parts or not at all.

    What a lane writes after its end may be lost. No sequence runs again here, for then its rows are made again.
    """
    seed, real = int(rng.integers(1 << 30)), tap_module.encode_rows
    kept: list[
        tuple[int, int, bool]
    ] = []  # of each row that is staged: call, token of the call, whether it counts

    def attempt(lost: tuple[int, int] | None) -> None:
        work, call = simulation(np.random.default_rng(seed), positions), 0
        work.lose_slots = False

        def encode(hidden, dest, stage, sink_norm, **how) -> None:
            nonlocal call
            if lost is None:
                kept.extend((call, int(row), work.counts[row]) for row in np.flatnonzero(dest >= 0))
            elif lost[0] == call:
                dest = dest.clone()
                dest[lost[1]] = -1
            call += 1
            real(hidden, dest, stage, sink_norm, **how)

        with monkeypatch.context() as patch:
            patch.setattr(tap_module, "encode_rows", encode)
            work.run()

    attempt(None)
    assert {counts for *_, counts in kept} == {True, False}
    for number in rng.choice(len(kept), 15, replace=False):
        call, row, counts = kept[number]
        if counts:
            with pytest.raises(EngineError, match="never written"):
                attempt((call, row))
        else:
            attempt((call, row))


@pytest.mark.parametrize(("slots", "ring"), [(20, 2 * STEPS + 1), (20, 40), (3, 200)])
def test_lanes_that_began_together_do_not_leave_all_at_once(
    slots: int, ring: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No turn has many more rows to send than its steps make, or one of few lanes has; each lane leaves in time."""
    row_bytes = Codec.named("int8", WIDTH).row_bytes * len(LAYERS)
    monkeypatch.setattr(staging, "RING_BYTES", ring * row_bytes * (slots + 1))
    tap, sent = simulation(rng, "generated").tap, []
    tap.rows_per_slot = 1000
    tap.allocate(slots, steps=STEPS, given=GIVEN)
    assert tap.staging.ring == ring
    monkeypatch.setattr(tap, "_send", lambda slot, number, size, place: sent.append(int(size.sum())))
    lanes = list(range(slots))
    tap.open(lanes, lanes, [4] * slots, [1004] * slots)
    for _ in range(100):
        tap.drain()
        tap.decodes(lanes, STEPS, STEPS // 2)
    assert max(sent) <= max(2 * STEPS * slots, ring // 2) and sum(sent) >= slots * (100 * STEPS - ring)


def test_a_ring_that_would_overflow_is_refused(rng: np.random.Generator) -> None:
    tap = simulation(rng, "generated").tap
    tap.allocate(2, steps=STEPS, given=GIVEN)
    tap.open([0, 1], [0, 1], [4, 4], [40, 4 + 2 * STEPS])
    tap.decodes([1], 2 * STEPS, 1)  # all rows of the sequence: what comes then has no row
    tap.decodes([1], 2 * STEPS, 1)
    tap.decodes([0], 2 * STEPS - 1, 1)
    with pytest.raises(EngineError, match="would be overwritten before they have left"):
        tap.decodes([0], 1, 0)


def test_passes_that_are_not_in_order_are_refused(rng: np.random.Generator) -> None:
    tap = simulation(rng, "all").tap
    tap.allocate(2, steps=STEPS, given=GIVEN)
    tap.open([0, 1], [5, 6], [9, 9], [40, 40])
    tap.reads([(0, 0, 4)])
    with pytest.raises(EngineError, match="before the rows of the last one have left"):
        tap.reads([(0, 4, 4)])
    tap.open([0], [7], [9], [40])
    with pytest.raises(EngineError, match="request 7: position 4 is read after 0"):
        tap.reads([(0, 4, 4)])
    with pytest.raises(EngineError, match="a pass has 18 rows to keep, and room for 11"):
        tap.reads([(0, 0, 9), (1, 0, 9)])


@pytest.mark.parametrize("codec", ["int8", "bf16"])
def test_more_rows_to_keep_exactly_than_there_is_room_for(
    codec: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "EXACT_BYTES", 9 * 2 * WIDTH * len(LAYERS))
    work = simulation(rng, "all", codec)
    for sequence in work.sequences:
        sequence.hidden *= 1000
    if codec == "bf16":
        work.run()
        check(work)
        return
    with pytest.raises(EngineError, match="rows to keep exactly at once, room for .*use --codec bf16"):
        work.run()
