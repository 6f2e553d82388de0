"""The free list, without tensors: played at random against what it must hold."""

from __future__ import annotations

import numpy as np

from nla_engine.engine.blocks import Blocks


def test_blocks_are_held_by_one_slot_or_shared_and_none_is_lost(rng) -> None:
    count, size, slots = 23, 5, 6
    blocks, places = Blocks(count, size, slots), [0] * slots
    follower = Blocks(count, size, slots)  # of another rank
    table = np.full((slots, count), count)
    for _ in range(2000):
        slot = int(rng.integers(slots))
        if not places[slot] and rng.random() < 0.3:
            source = int(rng.integers(slots))
            if source != slot:
                shared = int(rng.integers(0, places[source] + 1))
                blocks.share(source, slot, shared)
                places[slot] = shared // size * size
        elif rng.random() < 0.3:
            blocks.release(slot)
            places[slot] = 0
        else:
            wanted = places[slot] + int(rng.integers(0, 12))
            if blocks.of(wanted) - blocks.of(places[slot]) <= blocks.free:
                blocks.grow(slot, wanted)
                places[slot] = max(wanted, places[slot])
        held = [blocks.held(slot) for slot in range(slots)]
        assert [len(each) for each in held] == [blocks.of(each) for each in places]
        assert blocks.free + len({block for each in held for block in each}) == count
        assert all(len(set(each)) == len(each) for each in held)
        if rng.random() < 0.2:
            changes = blocks.changes()
            table[changes[0], changes[1]] = changes[2]
            follower.follow(changes)
            assert [follower.held(slot) for slot in range(slots)] == held
            for row, each in zip(table, held, strict=True):
                assert row.tolist() == each + [count] * (count - len(each))
    for slot in range(slots):
        blocks.release(slot)
    assert blocks.free == count
