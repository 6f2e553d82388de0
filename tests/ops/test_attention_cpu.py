"""Attention on a CPU against the slow reference in float64, with runs and lanes drawn at random."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from nla_engine.engine.attention import decode_tiles, prefill_tiles
from nla_engine.ops import attention_cpu
from nla_engine.ops.attention import Shape, Tiles, attend_reference, attend_torch
from nla_engine.ops.attention_cpu import attend_cpu
from nla_engine.ops.key_values import KeyValues

SLOTS, ROOM = 7, 400
#: (query heads, key heads, head size)
HEADS = [(4, 2, 16), (9, 3, 64), (2, 2, 24), (5, 1, 8)]


def cached(rng, groups: int, size: int, prefix: int, dtype: torch.dtype, block: int = ROOM) -> KeyValues:
    """Blocks of some places, or of all of a slot, in random order."""
    shapes = ((SLOTS, ROOM),) * 2 + ((prefix,),) * 2
    kv = [torch.from_numpy(rng.normal(size=(*s, groups, size))).to(dtype) for s in shapes]
    columns = ROOM // block
    table = torch.from_numpy(rng.permutation(SLOTS * columns).astype(np.int32).reshape(SLOTS, columns))
    kv[:2] = (held.reshape(-1, block, groups, size) for held in kv[:2])
    return KeyValues(*kv, table)


def wide(kv: KeyValues) -> KeyValues:
    return replace(
        kv, **{name: held.double() for name, held in vars(kv).items() if held.dtype.is_floating_point}
    )


def drawn_lanes(rng, prefix: int, count: int) -> Tiles:
    slot = torch.from_numpy(np.sort(rng.choice(SLOTS, count, replace=False)))
    position = torch.from_numpy(prefix + rng.integers(0, ROOM - 1, count))
    return decode_tiles(slot, position, 1, int(position.max()) + 1)


def drawn_runs(rng, prefix: int, group: int) -> Tiles:
    """Runs of one to three slots, from the start of the slot or behind it; some are longer than a chunk."""
    parts = []
    for slot in rng.choice(SLOTS, int(rng.integers(1, 4)), replace=False):
        length = int(rng.integers(2, 300))
        parts.append((slot, prefix + int(rng.choice([0, rng.integers(0, ROOM - length)])), length))
    runs = np.array(parts, np.int64)
    own = np.concatenate([np.arange(start, start + length) for _, start, length in parts])
    return prefill_tiles(runs, group, torch.from_numpy(own))


def close(found: torch.Tensor, kv: KeyValues, query: torch.Tensor, tiles: Tiles, shape: Shape) -> None:
    """Against float64, no further off than twice the reference at this dtype."""
    truth = attend_reference(query.double(), wide(kv), tiles, shape)
    rounding = (attend_torch(query, kv, tiles, shape).double() - truth).abs().max()
    assert (found.double() - truth).abs().max() <= 2 * rounding + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("window", "chunked"), [(0, False), (3, False), (90, False), (7, True), (90, True)])
@pytest.mark.parametrize("prefix", [0, 11])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("block", [16, ROOM])
def test_equals_the_reference(
    rng, block: int, heads: tuple[int, int, int], prefix: int, window: int, chunked: bool, dtype
) -> None:
    count, groups, size = heads
    kv = cached(rng, groups, size, prefix, dtype, block)
    shape = Shape(size**-0.5, window, chunked=chunked)
    lanes = [drawn_lanes(rng, prefix, n) for n in (1, 2, SLOTS - 1, SLOTS)]
    for tiles in (*lanes, drawn_runs(rng, prefix, count // groups), drawn_runs(rng, prefix, count // groups)):
        query = torch.from_numpy(rng.normal(size=(len(tiles.own), count, size))).to(dtype)
        found = attend_cpu(query, kv, tiles, shape)
        close(found, kv, query, tiles, shape)
        assert torch.equal(found, attend_cpu(query, kv, tiles, shape))  # the second layer of a pass


def test_lanes_in_any_order_and_twice_in_a_slot(rng) -> None:
    kv = cached(rng, 2, 16, 0, torch.float32)
    for slot in ([3, 1, 2], [4, 4], [0, 6], [6, 0, 5]):
        position = torch.from_numpy(rng.integers(0, ROOM - 1, len(slot)))
        tiles = decode_tiles(torch.tensor(slot), position, 2, int(position.max()) + 1)
        query = torch.from_numpy(rng.normal(size=(len(slot), 4, 16))).float()
        close(attend_cpu(query, kv, tiles, Shape(0.25)), kv, query, tiles, Shape(0.25))


def test_a_soft_cap(rng) -> None:
    kv, shape = cached(rng, 2, 16, 0, torch.float32), Shape(0.25, 0, 1.5)
    for tiles in (drawn_lanes(rng, 0, 4), drawn_runs(rng, 0, 2)):
        query = torch.from_numpy(rng.normal(size=(len(tiles.own), 4, 16))).float()
        found = attend_cpu(query, kv, tiles, shape)
        close(found, kv, query, tiles, shape)
        assert not torch.allclose(found, attend_cpu(query, kv, tiles, replace(shape, softcap=0.0)))


def test_sinks(rng) -> None:
    kv = cached(rng, 2, 16, 11, torch.float32)
    shape = Shape(0.25, 30, sinks=torch.from_numpy(rng.normal(size=4) * 3).float())
    for tiles in (drawn_lanes(rng, 11, 4), drawn_runs(rng, 11, 2)):
        query = torch.from_numpy(rng.normal(size=(len(tiles.own), 4, 16))).float()
        found = attend_cpu(query, kv, tiles, shape)
        close(found, kv, query, tiles, shape)
        assert not torch.allclose(found, attend_cpu(query, kv, tiles, replace(shape, sinks=None)))


def test_what_an_earlier_sequence_left_in_a_slot_changes_nothing(rng) -> None:
    """Not even NaN, where no query may see it."""
    kv = cached(rng, 2, 16, 0, torch.float32)
    tiles = drawn_lanes(rng, 0, SLOTS)
    query = torch.from_numpy(rng.normal(size=(SLOTS, 4, 16))).float()
    before = attend_cpu(query, kv, tiles, Shape(0.25))
    for slot, position in zip(tiles.slot.tolist(), tiles.position.tolist(), strict=True):
        block = kv.table[slot, 0]
        kv.keys[block, position + 1 :] = float("nan")
        kv.values[block, position + 1 :] = float("inf")
    after = attend_cpu(query, kv, tiles, Shape(0.25))
    assert after.isfinite().all()
    torch.testing.assert_close(after, before)


def test_a_long_document_is_read_in_one_piece(rng, monkeypatch) -> None:
    """From its start no mask is made, however many tiles a GPU would cut it into."""
    kv = cached(rng, 2, 16, 0, torch.float32)
    tiles = prefill_tiles(np.array([[2, 0, 390]]), 2, torch.arange(390))
    assert len(tiles.token) > 5
    calls = []
    own = attention_cpu.scaled_dot_product_attention
    monkeypatch.setattr(
        attention_cpu,
        "scaled_dot_product_attention",
        lambda *a, **k: calls.append((k["attn_mask"], k["is_causal"])) or own(*a, **k),
    )
    query = torch.from_numpy(rng.normal(size=(390, 4, 16))).float()
    close(attend_cpu(query, kv, tiles, Shape(0.25)), kv, query, tiles, Shape(0.25))
    assert calls == [(None, True)]
