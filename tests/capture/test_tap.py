"""The tap by itself: rows kept exactly, rows that are not finite, rows that are lost."""

from __future__ import annotations

import math
import threading

import numpy as np
import pytest
import torch

from nla_engine.capture.row_range import RowRange
from nla_engine.capture.staging import Staging
from nla_engine.capture.tap import RowTap
from nla_engine.codec.rows import Codec, bf16_bits, bf16_values
from nla_engine.errors import EngineError
from nla_engine.sites import Site


def row_tap(sizes: list[int], hidden: np.ndarray, **how: object) -> tuple[RowTap, list]:
    """A tap of layers 1 and 2 that has read sequences of these sizes, and what has ended."""
    made = RowTap(
        (1, 2), Codec.named("int8", 64), RowRange.parse("all"), rows_per_slot=max(sizes),
        sink_norm={1: 100.0, 2: math.inf}, device=torch.device("cpu"), **how,
    )  # fmt: skip
    made.allocate(len(sizes), steps=1, given=sum(sizes))
    made.open(list(range(len(sizes))), list(range(len(sizes))), [1] * len(sizes), sizes)
    made.reads([(slot, 0, size) for slot, size in enumerate(sizes)])
    slot = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    position = torch.cat([torch.arange(size) for size in sizes])
    for layer, rows in ((1, hidden), (2, hidden[::-1].copy())):
        made(layer, torch.from_numpy(rows), slot, position)
    made.look(decoded=False)
    return made, made.settle(list(range(len(sizes))), sizes)


def test_rows_that_are_not_finite_are_no_sinks_and_exact_rows_stay_with_theirs(
    rng: np.random.Generator,
) -> None:
    sizes = [5, 3, 4]
    hidden = rng.standard_normal((12, 64)).astype(np.float32)
    hidden[[2, 7, 10]] *= 100
    hidden[3, 0], hidden[8, 5] = np.inf, np.nan
    chosen = {0: [0, 2, 3, 4], 1: [], 2: [0, 1, 2]}
    replies = [(id_, np.zeros(0, np.int32)) for id_ in range(3)]
    for skip in (False, True):
        made, ended = row_tap(
            sizes, hidden, choose=lambda id_, _: np.array(chosen[id_], np.int64), skip_sinks=skip
        )
        collected = made.collect(ended, replies).result()
        left = {0: [0, 3, 4], 1: [], 2: [0, 1]} if skip else chosen
        assert [positions.tolist() for positions, _ in collected] == list(left.values())
        for (positions, rows), start in zip(collected, (0, 5, 8), strict=True):
            for layer, held in ((1, hidden), (2, hidden[::-1])):
                true = held[start + positions]
                assert len(rows[layer].norm) == len(true)
                norm = np.linalg.norm(true, axis=1)
                exact = np.flatnonzero(~(np.isfinite(norm) & (norm <= made.sink_norm[layer])))
                assert rows[layer].exact_index.tolist() == exact.tolist()
                want = bf16_values(
                    torch.from_numpy(true[exact]).bfloat16().view(torch.int16).numpy().view(np.uint16)
                )
                np.testing.assert_array_equal(bf16_values(rows[layer].exact), want)
                decoded = rows[layer].decode(made.codec)
                finite = np.isfinite(true).all(1)
                assert np.abs(decoded[finite] - true[finite]).max(initial=0) < 0.02 * np.abs(
                    true[finite]
                ).max(initial=1)
    made, ended = row_tap(sizes, hidden, choose=lambda id_, _: np.array([0, 3]))
    with pytest.raises(EngineError, match="request 1: a row was chosen outside of positions 0 to 2"):
        made.collect(ended, replies).result()
    for choice in (lambda id_, _: np.array([1, 2]), None):
        made, ended = row_tap(sizes, hidden, choose=choice)
        made.staging.reading[2].norm[made.staging.given + 4] = -1.0
        if choice is None:
            with pytest.raises(EngineError, match="layer 2: 1 rows that left the device were never written"):
                made.collect(ended, replies).result()
        else:
            made.collect(ended, replies).result()


@pytest.mark.parametrize("lost", [False, True])
def test_rows_kept_exactly_find_their_sequence(lost: bool, rng: np.random.Generator) -> None:
    sizes, big = [4, 3, 4], [2, 7, 10]  # of slots 0 to 2; rows of 11: one of slot 0, the ends of slot 2
    hidden = torch.from_numpy(rng.standard_normal((sum(sizes), 64)).astype(np.float32))
    hidden[big] *= 100
    tap = RowTap(
        (1,), Codec.named("int8", 64), RowRange.parse("all"), rows_per_slot=4, sink_norm={1: 100.0},
        device=torch.device("cpu"),
    )  # fmt: skip
    tap.allocate(3, steps=3, given=9)
    tap.open([0, 1, 2], [0, 1, 2], [1, 1, 1], sizes)
    tap.decodes([0, 1, 2], 4, 1)
    position = torch.cat([torch.arange(size) for size in sizes])
    tap(1, hidden, torch.repeat_interleave(torch.arange(3), torch.tensor(sizes)), position)
    tap.look(decoded=True)
    ended = tap.settle([2, 0, 1], [4, 4, 3])
    if lost:
        del tap._slots[2].exact[1]
    nothing = [(id_, np.zeros(0, np.int32)) for id_ in (2, 0, 1)]
    rows = tap.collect(ended, nothing)
    if lost:
        with pytest.raises(EngineError, match="layer 1: a row that must be kept exactly is missing"):
            rows.result()
        return
    collected = [each[1] for _, each in rows.result()]
    assert [kept.nbytes for kept in ended] == [rows.nbytes for rows in collected]
    assert [rows.exact_index.tolist() for rows in collected] == [[0, 3], [2], []]
    for rows, start in zip(collected, (7, 0, 4), strict=True):
        assert np.allclose(rows.norm, hidden[start : start + len(rows.norm)].norm(dim=1))
        assert (rows.exact == bf16_bits(hidden[start + rows.exact_index].numpy())).all()


def test_a_slot_can_be_opened_again_before_its_rows_have_come(rng: np.random.Generator) -> None:
    """The rows are those of the sequence that ended, whatever the slot holds when they are put together."""
    sizes = [5, 3, 4]
    hidden = rng.standard_normal((12, 64)).astype(np.float32)
    made, ended = row_tap(sizes, hidden)
    goes_on = threading.Event()
    made._outbox.call(goes_on.wait)
    collected = made.collect(ended, [(id_, np.zeros(0, np.int32)) for id_ in range(3)])
    made.open([0, 1, 2], [3, 4, 5], sizes, sizes)
    made.drain()
    made.reads([(slot, 0, size) for slot, size in enumerate(sizes)])
    for tensor in made.staging.all.tensors:
        tensor.fill_(-1 if tensor is made.staging.all.norm else 7)
    goes_on.set()
    for (positions, rows), size, start in zip(collected.result(), sizes, (0, 5, 8), strict=True):
        assert positions.tolist() == list(range(size))
        for layer, held in ((1, hidden), (2, hidden[::-1])):
            true = held[start : start + size]
            np.testing.assert_allclose(rows[layer].norm, np.linalg.norm(true, axis=1), rtol=1e-2)
            np.testing.assert_allclose(rows[layer].decode(made.codec), true, atol=0.05 * np.abs(true).max())


def test_rows_kept_exactly_are_taken_once_in_order_and_make_room_for_others(rng: np.random.Generator) -> None:
    """In each turn as many as may come, some of them after the look."""
    layers, slots, steps, given = (Site(0), Site(3)), 3, 2, 5
    staging = Staging(
        layers,
        Codec.named("int8", 64),
        slots=slots,
        longest=8,
        steps=steps,
        given=given,
        device=torch.device("cpu"),
    )
    most = {"decoding": slots * (steps + 1), "reading": given}
    written = {(kind, layer): 0 for kind in most for layer in layers}
    taken: dict[tuple[str, Site], list[int]] = {key: [] for key in written}

    def write(kind: str, layer: Site, count: int) -> None:
        stage = getattr(staging, kind)[layer]
        for _ in range(count):
            at, number = int(stage.exact_count), written[kind, layer]
            stage.exact[at], stage.exact_dest[at] = number, number * 2 + (kind == "reading")
            stage.exact_count.add_(1)
            written[kind, layer] += 1

    def take() -> None:
        for layer, parts in staging.take_exact().items():
            for part in parts:
                assert (part.bits == (part.place // 2)[:, None]).all()
                for place in part.place.tolist():
                    taken["reading" if place % 2 else "decoding", layer].append(place // 2)

    late = dict.fromkeys(written, 0)  # rows that come after a look
    for _ in range(60):
        soon = {key: int(rng.integers(0, most[key[0]] - late[key] + 1)) for key in written}
        for key, count in soon.items():
            write(*key, count)
        staging.look()
        late = {key: int(rng.integers(0, most[key[0]] - soon[key] - late[key] + 1)) for key in written}
        for key, count in late.items():
            write(*key, count)
        take()
    staging.look()
    take()
    assert taken == {key: list(range(count)) for key, count in written.items()}
    assert min(written.values()) > 60
