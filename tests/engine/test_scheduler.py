"""The order of work, without a model: played against a device that ends sequences at random."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from nla_engine.engine.blocks import Blocks
from nla_engine.engine.request import Finish, Request
from nla_engine.engine.scheduler import STEPS_BETWEEN_POLLS, Ended, Kept, Scheduler
from nla_engine.engine.tap import KeptRows

SLOTS, ROOM = 5, 17


def requests(rng: np.random.Generator, count: int, patient: bool) -> Iterator[Request | None]:
    """Some prompts are longer than a pass, some are shared with the next request, some are only read."""
    ids: tuple[int, ...] = ()
    for id_ in range(count):
        if patient and id_ > 5 and rng.random() < 0.2:
            yield None
        again = id_ % 7 == 3
        ids = ids if again else (1,) * int(rng.integers(1, 40))
        yield Request(id_, ids, 0 if id_ % 5 == 1 else int(rng.integers(1, 30)), None, again)


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("patient", [True, False])
@pytest.mark.parametrize("longest", [0, 70])
def test_every_request_is_read_once_runs_and_ends(
    alone: bool, patient: bool, longest: int, rng: np.random.Generator
) -> None:
    """longest: with it, the scheduler knows that the blocks fit everything."""
    after_look = int(rng.integers(1, 6))
    blocks = Blocks(SLOTS * 18, 4, SLOTS)
    count, done, read, steps, owner = 80, [], {}, {}, {}
    queue = Scheduler(
        requests(rng, count, patient),
        slots=SLOTS,
        prefill_tokens=ROOM,
        blocks=blocks,
        more_steps=0,
        alone=alone,
        check=lambda request: None,
        longest=longest,
        after_look=after_look,
    )
    while True:
        step = queue.schedule()
        assert step is None or not step.stepped_back
        if step is None:
            if not queue.finished:
                if not queue.held_back:
                    break
                continue
            ended = []
        else:
            for admitted in step.entered:
                assert admitted.slot not in owner, "a slot has one sequence at a time"
                owner[admitted.slot] = admitted.request
            assert sum(run.stop - run.start for run in step.runs) <= ROOM
            for run in step.runs:
                id_ = run.admitted.request.id
                assert run.start == read.get(id_, 0), "prompts are read in order, and no token twice"
                read[id_] = run.stop
                if run.completes:
                    read |= {twin.request.id: run.stop for twin in run.admitted.twins}
            assert 1 <= step.steps <= (STEPS_BETWEEN_POLLS if alone else 1) or not step.slots
            assert 0 <= step.after_look <= after_look and step.after_look < max(step.steps, 1)
            assert step.slots == sorted(step.slots) and set(step.slots) <= owner.keys()
            active = [False] * (SLOTS + 1)
            for slot in step.slots:
                request = owner[slot]
                assert read[request.id] == len(request.token_ids), "no prompt is continued before it is read"
                seen = steps.get(request.id, 0) + step.steps - step.after_look
                most = request.max_new_tokens if longest else min(seen, request.max_new_tokens)
                assert blocks.room(slot) >= len(request.token_ids) + most
                steps[request.id] = steps.get(request.id, 0) + step.steps
                active[slot] = seen < request.max_new_tokens and rng.random() < 0.9
            ended = queue.ended(active if step.slots else None)
        queue.finish(Ended(a.request, a.slot, 3, Finish.EOS, KeptRows(a.slot, 0, 100)) for a in ended)
        assert all(each.nbytes == 112 for each in queue.finished.values())
        chosen = [id_ for id_ in queue.finished if step is None or rng.random() < 0.7]
        for each in queue.release(chosen):
            assert owner.pop(each.slot) is each.request
            done.append(each.request.id)
    assert sorted(done) == list(range(count)) and not owner and blocks.free == blocks.count


@pytest.mark.parametrize("alone", [True, False])
def test_whoever_came_last_steps_back_and_everyone_ends(alone: bool, rng: np.random.Generator) -> None:
    """Against a device that ends sequences at random, with hardly more blocks than one sequence may need."""
    count, size, most = 60, 4, 40
    ages: dict[int, int] = {}
    asked = [request for request in requests(rng, count, False) if request is not None]
    asked = [Request(r.id, r.token_ids, most if r.max_new_tokens else 0, again=r.again) for r in asked]
    blocks = Blocks(-(-79 // size) + int(rng.integers(0, 20)), size, SLOTS)
    queue = Scheduler(
        iter(asked),
        slots=SLOTS,
        prefill_tokens=ROOM,
        blocks=blocks,
        more_steps=0,
        alone=alone,
        check=lambda _: None,
    )
    generated: dict[int, int] = {}
    running: dict[int, int] = {}  # by slot
    done: list[int] = []
    back = 0
    for _turn in range(100_000):
        step = queue.schedule()
        if step is None:
            break
        for admitted in step.stepped_back:
            id_ = running.pop(admitted.slot)
            assert id_ > min([*running.values(), id_ + 1]) or not running, (
                "the first to come never steps back"
            )
            over = (
                generated[id_] >= most or rng.random() < 0.1
            )  # it ended in a step that the host had not seen
            queue.put_back(admitted, None if over else Kept((1,) * generated[id_], 0, False))
            back += not over
        for admitted in step.entered:
            id_ = admitted.request.id
            assert len(admitted.ids) == len(admitted.request.token_ids) + generated.get(id_, 0)
            assert ages.setdefault(id_, admitted.age) == admitted.age
        for run in step.runs:
            for each in (run.admitted, *run.admitted.twins) if run.completes else ():
                if each.request.max_new_tokens:
                    running[each.slot] = each.request.id
                    generated[each.request.id] = generated.get(each.request.id, 0) + 1
        assert sorted(running) == step.slots or not step.slots
        active = [False] * (SLOTS + 1)
        for slot in step.slots:
            id_ = running[slot]
            seen = generated[id_] + step.steps - step.after_look
            generated[id_] += step.steps
            prompt = len(asked[id_].token_ids)
            assert blocks.room(slot) >= min(prompt + generated[id_] - 1, prompt + most)
            active[slot] = seen < most and rng.random() < 0.99
        ended = queue.ended(active if step.slots else None)
        for each in ended:
            running.pop(each.slot, None)
        queue.finish(Ended(a.request, a.slot, 3, Finish.EOS, KeptRows(a.slot, 0, 100)) for a in ended)
        done += [each.request.id for each in queue.release(list(queue.finished))]
    assert sorted(done) == list(range(count)) and blocks.free == blocks.count
    tally = queue.tally()
    assert tally.stepped_back >= back > 0 and tally.again > 0


def test_a_request_that_cannot_run_takes_no_slot() -> None:
    def refuse(request: Request) -> None:
        raise ValueError(request.id)

    queue = Scheduler(
        iter([Request(0, (1,), 1)]),
        slots=1,
        prefill_tokens=4,
        blocks=Blocks(1, 4, 1),
        more_steps=0,
        alone=False,
        check=refuse,
    )
    with pytest.raises(ValueError, match="0"):
        queue.schedule()
    assert queue.schedule() is None


@pytest.mark.parametrize("after_look", [1, 2, 9])
def test_steps_end_where_a_sequence_must_end(after_look: int) -> None:
    """One sequence of 12 tokens: the first comes with the prompt, eight from eight steps; three remain."""
    queue = Scheduler(
        iter([Request(0, (1, 2), 12)]),
        slots=1,
        prefill_tokens=4,
        blocks=Blocks(1, 14, 1),
        more_steps=-1,
        alone=True,
        check=lambda _: None,
        after_look=after_look,
    )
    taken = []
    for _ in range(2):
        step = queue.schedule()
        assert step is not None
        taken.append((len(step.runs), step.steps, step.after_look))
        assert queue.ended([True]) == []
    assert taken == [(1, 8, min(after_look, 4)), (0, 3, 0)]


def test_the_host_does_not_wait_for_the_certain_end_of_too_few_for_a_refill() -> None:
    """40 slots are refilled three at a time: one of 8 steps, then two more of 16."""
    limits = [8, 16, 16] + [60] * 37
    queue = Scheduler(
        iter([Request(i, (1,), limit) for i, limit in enumerate([*limits, *[60] * 9])]),
        slots=40,
        prefill_tokens=40,
        blocks=Blocks(40, 70, 40),
        more_steps=0,
        alone=True,
        check=lambda _: None,
        after_look=3,
    )
    taken = []
    for _ in range(2):
        step = queue.schedule()
        assert step is not None
        taken.append((step.steps, step.after_look))
        assert queue.ended([True] * 40) == []
    assert taken == [(8, 3), (8, 0)]


@pytest.mark.parametrize(("tokens", "full"), [(14, True), (2048, True), (2049, False)])
def test_a_prompt_cut_by_a_full_pass_holds_up_no_filling(tokens: int, full: bool) -> None:
    """Passes hold 146 prompts of 14 tokens and a part of the next. All slots are filled, then all decode in step; a
    prompt longer than a pass is read between decode steps."""
    slots, new = (1024, 120) if tokens == 14 else (4, 20)
    queue = Scheduler(
        (Request(i, (1,) * tokens, new) for i in range(2 * slots)),
        slots=slots,
        prefill_tokens=2048,
        blocks=Blocks(slots * 40, 64, slots),
        more_steps=-1,
        alone=True,
        check=lambda _: None,
        longest=tokens + new,
        after_look=1,
    )
    passes = decoding = steps = reads = 0
    left: dict[int, int] = {}
    while (step := queue.schedule()) is not None:
        passes += bool(step.runs)
        reads += sum(run.stop - run.start for run in step.runs)
        decoding += bool(step.runs and step.slots and step.slots != list(range(slots)))
        left |= {run.admitted.slot: new - 1 for run in step.runs if run.completes}
        steps += step.steps
        for slot in step.slots:
            left[slot] -= step.steps
        ended = queue.ended([left.get(slot, 0) > 0 for slot in range(slots)] if step.slots else None)
        queue.finish(Ended(a.request, a.slot, new, Finish.LENGTH, KeptRows(a.slot, 0, 0)) for a in ended)
        queue.release(list(queue.finished))
    assert reads == 2 * slots * tokens
    assert (decoding == 0) == full
    if full:
        assert passes == -(-2 * slots * tokens // 2048) and steps == 2 * (new - 1)
