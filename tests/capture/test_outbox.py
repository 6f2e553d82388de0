"""The host's side of rows that leave: when a sender waits, what several threads copy, and steps that do not wait."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import byte_tokenizer, tiny_model

from nla_engine.capture import outbox, spill, staging
from nla_engine.capture.collect import Collector, RowsBySite
from nla_engine.capture.outbox import Outbox
from nla_engine.capture.row_range import RowRange
from nla_engine.capture.spill import HeldRows, HostRows, Piece, RowKeeper
from nla_engine.capture.staging import Rows
from nla_engine.capture.tap import RowTap
from nla_engine.codec.rows import Codec
from nla_engine.engine.completions import Arriving
from nla_engine.engine.generator import Generator
from nla_engine.engine.request import Request
from nla_engine.engine.runner import Runner
from nla_engine.engine.stopping import StopAutomaton
from nla_engine.errors import EngineError
from nla_engine.models.load import wrap_model
from nla_engine.models.tokens import token_bytes
from nla_engine.sites import Site
from nla_engine.workers.wire import Packed

CODEC, LAYERS = Codec.named("int8", 32), (Site(1), Site(4), Site(5))
ROW_BYTES = CODEC.row_bytes * len(LAYERS)


def random_rows(rng: np.random.Generator, size: int) -> HostRows:
    return HostRows(
        rng.integers(-127, 128, (size, len(LAYERS), CODEC.code_width), np.int8),
        rng.standard_normal((size, len(LAYERS), CODEC.scale_width)).astype(np.float16),
        rng.random((size, len(LAYERS))).astype(np.float32),
    )


def on_device(rows: HostRows) -> Rows:
    return Rows(*(torch.from_numpy(array.reshape(-1, *array.shape[2:])) for array in rows.arrays))


def same(got: HostRows, want: HostRows) -> bool:
    pairs = list(zip(got.arrays, want.arrays, strict=True))
    return all(a.dtype == b.dtype and a.shape == b.shape and (a == b).all() for a, b in pairs)


def test_a_sender_waits_only_if_too_much_is_under_way(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "UNDERWAY_BYTES", 3 * ROW_BYTES)
    keeper = RowKeeper(CODEC, len(LAYERS))
    box, held, rows = Outbox(LAYERS, keeper, torch.device("cpu")), HeldRows(5), random_rows(rng, 5)
    goes_on, sent = threading.Event(), threading.Semaphore(0)
    box.call(goes_on.wait)

    def send() -> None:
        for number in range(5):
            box.send(on_device(rows.part(number, number + 1)), [Piece(held, number, 1)])
            sent.release()

    sender = threading.Thread(target=send)
    sender.start()
    assert all(sent.acquire(timeout=20) for _ in range(3))
    assert not sent.acquire(timeout=0.2), "a fourth is more than may be under way"
    assert keeper.peak == 0
    goes_on.set()
    sender.join(20)
    assert same(box.call(keeper.take, held, None).result(), rows)
    box.close()


def test_a_row_that_was_never_written_is_found(rng: np.random.Generator) -> None:
    box, rows = Outbox(LAYERS, RowKeeper(CODEC, len(LAYERS)), torch.device("cpu")), random_rows(rng, 5)
    rows.norm[3, 1] = rows.norm[4, 1] = staging.UNWRITTEN
    box.send(on_device(rows), [Piece(HeldRows(2), 0, 2), Piece(HeldRows(3), 0, 3)])
    with pytest.raises(EngineError, match="layer 4: 2 rows that left the device were never written"):
        box.call(len, ()).result()
    box.close()


@pytest.mark.parametrize("copied", [1, 3 * ROW_BYTES, 1 << 20])
@pytest.mark.parametrize("limit", [np.inf, 40 * ROW_BYTES, 7 * ROW_BYTES, 0])
def test_rows_in_memory_and_in_files(
    limit: float, copied: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of several sequences at once, of which some end, some are dropped, and some rows of others are taken."""
    monkeypatch.setattr(spill, "_COPIED_BYTES", copied)
    keeper = RowKeeper(CODEC, len(LAYERS), limit)
    truth = {
        HeldRows(len(rows.norm)): rows for rows in (random_rows(rng, int(n)) for n in rng.integers(0, 60, 12))
    }
    waiting = list(truth)
    while waiting:
        some = [held for held in waiting if rng.random() < 0.5]
        pieces = [Piece(held, held.size, int(rng.integers(0, held.most - held.size + 1))) for held in some]
        parts = [truth[each.held].part(each.start, each.start + each.size) for each in pieces]
        arrays = zip(*(part.arrays for part in parts), strict=True)
        keeper.add(pieces, HostRows(*map(np.concatenate, arrays)) if parts else random_rows(rng, 0))
        running = [held for held in truth if held.counts]
        assert keeper._bytes == sum(held.size for held in running) * ROW_BYTES <= limit
        keeper.end([held for held in some if rng.random() < 0.3])
        for held in [held for held in waiting if held.size == held.most]:
            waiting.remove(held)
            kept, way = truth.pop(held), rng.integers(3)
            if way == 0:
                keeper.drop(held)
                continue
            index = np.flatnonzero(rng.random(held.most) < 0.5) if way == 1 else None
            assert (keeper.norms(held) == kept.norm).all()
            assert same(keeper.take(held, index), kept if index is None else kept.chosen(index))
    assert keeper._bytes == 0 and not keeper._held and (keeper.spilled > 0) == (limit < np.inf)
    with pytest.raises(EngineError, match="row 2 of a sequence left the device when 0 had left"):
        keeper.add([Piece(HeldRows(9), 2, 1)], random_rows(rng, 1))
    keeper.close()


def test_rows_by_site_travel_as_a_few_arrays(rng: np.random.Generator) -> None:
    rows, none = random_rows(rng, 400), (np.zeros(0, np.int64), np.zeros((0, 32), np.uint16))
    exact = (np.array([3, 9]), rng.integers(0, 1 << 16, (2, 32), np.uint16))
    made = RowsBySite(LAYERS, rows, [none, exact, none])
    packed = Packed.of(made)
    got, _ = Packed.opened(memoryview(packed.data))
    assert packed.nbytes < rows.nbytes + 4000
    assert list(got) == list(LAYERS) and got.keys() == set(LAYERS) and Site(2) not in got
    for i, site in enumerate(LAYERS):
        for name, array in zip(("codes", "scales", "norm"), rows.arrays, strict=True):
            assert (getattr(got[site], name) == array[:, i]).all()
        assert got[site].exact_index.tolist() == made[site].exact_index.tolist() == [[], [3, 9], []][i]
        assert (got[site].exact == made[site].exact).all()


def test_rows_are_waited_for_while_the_device_works() -> None:
    looks = iter([False, False, True])
    rows: Future[Any] = Future()

    class Look:
        @property
        def passed(self) -> bool:
            return next(looks)

    def waits(device: str) -> bool:
        generator = SimpleNamespace(_look=Look(), runner=SimpleNamespace(device=torch.device(device)))
        return Generator._while_device_works(generator, Arriving(rows, list))  # type: ignore[arg-type]

    assert not waits("cuda") and next(looks, None) is None
    assert waits("cpu"), "nothing else would be done meanwhile"
    rows.set_result("rows")
    assert waits("cuda") and Arriving(rows, list).wait() == list("rows")


def test_steps_go_on_while_rows_are_on_their_way(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of the first sequences that end are held up until four more turns have been queued. Nothing is lost."""
    lm, new = wrap_model(tiny_model("qwen2"), byte_tokenizer(), name="tiny"), 24
    work = [
        Request(i, tuple(rng.integers(1, 250, 5).tolist()), int(n))
        for i, n in enumerate(rng.integers(1, new, 14))
    ]
    work[0] = Request(0, work[0].token_ids, new)  # one that runs meanwhile
    goes_on, held_up, turns = threading.Event(), [], 0
    take, collect = Generator._take, Collector.collect

    def counted(self: Generator, *step: Any) -> None:
        nonlocal turns
        turns += 1
        if held_up and turns >= held_up[0] + 4:
            goes_on.set()
        take(self, *step)

    def late(self: Collector, *endings: Any) -> Any:
        held_up.append(turns)
        assert goes_on.wait(60), "the device was kept waiting"
        return collect(self, *endings)

    monkeypatch.setattr(Generator, "_take", counted)
    monkeypatch.setattr(Collector, "collect", late)
    monkeypatch.setattr(Generator, "_while_device_works", lambda self, arriving: arriving.have_come())
    tap = RowTap(
        LAYERS[:1], Codec.named("bf16", lm.d_model), RowRange.parse("all"), rows_per_slot=new,
        sink_norm={1: np.inf}, device=lm.device,
    )  # fmt: skip
    stop = StopAutomaton(token_bytes(lm.tokenizer, lm.vocab_size), ())
    with Runner(lm, slots=4, length=40, tap=tap) as runner:
        generator = Generator(runner, max_new_tokens=new, stop=stop, read_last=True)
        ended = {each.request.id: each for each in generator.run(iter(work))}
    assert held_up and sorted(ended) == [request.id for request in work]
    for request in work:
        size = len(request.token_ids) + request.max_new_tokens
        assert ended[request.id].positions.tolist() == list(range(size))
        assert len(ended[request.id].rows[1].norm) == size
