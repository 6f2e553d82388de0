"""The parts of one run, made by `capture --shard`: whether they are all there, each once and finished."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nla_engine.errors import StoreError
from nla_engine.shard import Shard
from nla_engine.store.views.capture_store import CaptureStore

SHARD = "shard"
#: Numbers of missing parts that an error lists.
_SHOWN = 10


def part_of(store: CaptureStore) -> Shard | None:
    """Which part of its run a store is; None: it is no part."""
    told = store.options.get(SHARD)
    return None if told is None else Shard.parse(told)


def parts_in_order(stores: Sequence[CaptureStore]) -> list[CaptureStore] | None:
    """The parts of a run, first part first; None if none of the stores is a part.

    Raises StoreError, naming the part, if one is missing, given twice, unfinished or of another run.
    """
    found: dict[Shard, CaptureStore] = {}
    whole = [store for store in stores if part_of(store) is None]
    if len(whole) == len(stores):
        return None
    for store in stores:
        shard = part_of(store)
        if shard is None:
            continue
        if whole:
            raise StoreError(
                f"{whole[0].path}: is no part of a run, and {store.path} is part {shard}: merge the parts alone first"
            )
        if shard in found:
            raise StoreError(f"part {shard} is given twice: {found[shard].path} and {store.path}")
        first = next(iter(found), shard)
        if shard.of != first.of:
            raise StoreError(
                f"{store.path}: is part {shard}, and {found[first].path} is part {first}: give the parts of one run"
            )
        found[shard] = store
    of = next(iter(found)).of
    if missing := [str(shard) for n in range(1, of + 1) if (shard := Shard(n, of)) not in found]:
        listed = ", ".join(missing[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
        are = "part {} is" if len(missing) == 1 else "parts {} are"
        raise StoreError(f"{are.format(listed)} missing: give all parts of the run")
    parts = [found[shard] for shard in sorted(found)]
    for shard, store in sorted(found.items()):
        asked = store.provenance.get("sequences_asked", store.sequences)
        if not store.complete:
            raise StoreError(f"{store.path}: part {shard} is not finished: start its job again")
        if store.sequences != asked:
            raise StoreError(
                f"{store.path}: part {shard} has {store.sequences} of its {asked} sequences: make it again with "
                "--overwrite"
            )
    numbers = np.sort(np.concatenate([store.numbers for store in parts]))
    if not np.array_equal(numbers, np.arange(len(numbers))):
        wrong = int(np.argmax(numbers != np.arange(len(numbers))))
        raise StoreError(
            f"sequence {wrong} is in no part, or in two: make the parts again from the same prompts"
        )
    return parts
