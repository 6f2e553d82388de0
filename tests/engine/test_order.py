"""What many sequences cost: rows that wait for an earlier sequence, and graphs for numbers of lanes."""

from __future__ import annotations

import numpy as np
import pytest
from tiny import byte_tokenizer, tiny_model

from nla_engine.engine import generator as engine
from nla_engine.engine.generator import Generator
from nla_engine.engine.graph import GraphSizes, capture_lanes, lane_bucket, steps_meanwhile
from nla_engine.engine.order import InOrder
from nla_engine.engine.request import Completion, Finish, Request
from nla_engine.engine.runner import Runner
from nla_engine.models.load import wrap_model


def test_sequences_leave_in_the_order_they_were_asked_for(rng: np.random.Generator) -> None:
    count, size = 200, 40
    order, left, held = InOrder(10 * size), [], {}
    for id_ in range(count):
        order.asked(Request(id_, (1,), 10))
    ending = rng.permutation(count).tolist()
    while ending:
        ids = [ending.pop() for _ in range(min(len(ending), int(rng.integers(1, 9))))]
        shared = np.repeat(np.asarray(ids, np.int32), 10).reshape(-1, 10)
        group = [
            Completion(Request(i, (1,), 10), own, Finish.STOP) for i, own in zip(ids, shared, strict=True)
        ]
        leaving = order.add(group)
        shared[:] = -1  # the group's memory is reused
        left += [c.request.id for c in leaving]
        held |= dict.fromkeys(ids)
        for completion in leaving:
            del held[completion.request.id]
            if completion.request.id not in ids:
                assert (completion.generated == completion.request.id).all()
        assert order.bytes == size * len(held)
        assert order.is_full == (len(held) > 10)
    assert left == list(range(count)) and order.bytes == 0


def test_graphs_are_few_however_many_lanes_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(engine, "DecodeGraph", lambda step, size, *_: made.append(size))
    lm = wrap_model(tiny_model("qwen2"), byte_tokenizer(), name="tiny")
    with Runner(lm, slots=3000, length=4) as runner:
        generator = Generator(runner, max_new_tokens=0)
        for lanes in range(1, 3001):
            generator._graph(lanes, 8)
    assert made[-8:] == [896, 1024, 1280, 1536, 1792, 2048, 2560, 3000]  # no larger than all slots
    assert [lane_bucket(lanes) for lanes in (1024, 1025, 2049, 4097, 8192)] == [1024, 1280, 2560, 5120, 8192]


def test_a_smaller_graph_waits_until_unused_lanes_would_have_paid_for_it(rng: np.random.Generator) -> None:
    cost = 20_000
    sizes, made = GraphSizes(512, cost), {512}
    assert sizes.choose(512, 0) == 512
    unused = 0
    for lanes in sorted(rng.integers(1, 513, 300).tolist(), reverse=True):
        steps, own = int(rng.integers(1, 9)), lane_bucket(lanes)
        there = min(size for size in made if size >= own)
        unused += (there - own) * steps
        if unused >= cost and own not in made:
            made.add(own)
            there, unused = own, 0
        assert sizes.choose(lanes, steps) == there
    assert 2 <= len(made) <= 9  # of 17 numbers of lanes
    assert sizes.choose(600, 1) == 600  # none is large enough


def test_graphs_of_a_large_model_pay_for_themselves_sooner() -> None:
    assert 60_000 < capture_lanes(30, 134_000_000) < 70_000
    assert 1_100 < capture_lanes(28, 7_070_000_000) < 1_300
    at_once = GraphSizes(64, 0)
    assert [at_once.choose(lanes, 1) for lanes in (64, 33, 17, 1, 64)] == [64, 48, 24, 1, 64]


def test_the_faster_its_steps_the_more_of_them_a_device_takes_while_the_host_decides() -> None:
    sizes = ((30, 134_000_000), (24, 494_000_000), (28, 1_540_000_000), (28, 7_070_000_000))
    assert [steps_meanwhile(*size, 512) for size in sizes] == [4, 2, 1, 1]
