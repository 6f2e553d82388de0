"""Items are handed out once, in shares, and again when their worker died."""

import numpy as np
import pytest

from nla_engine.errors import EngineError
from nla_engine.workers.handing import MOST_DEATHS, Handing


def test_a_random_life(rng: np.random.Generator) -> None:
    """Workers take, return and die in any order: every item ends once, none is with two workers."""
    items = np.sort(rng.choice(5000, 300, replace=False))
    handing, have, ended = Handing(items, 3), [set(), set(), set()], []
    while not handing.finished:
        worker = int(rng.integers(3))
        mine, what = have[worker], rng.random()
        if what < 0.5:
            taken = handing.take(worker)
            assert not set(taken) & set().union(*have)
            assert taken or any(have), "nobody has anything, and nothing is handed out"
            mine |= set(taken)
        elif what < 0.99 and mine:
            item = int(rng.choice(sorted(mine)))
            handing.end(worker, item)
            mine.remove(item)
            ended.append(item)
        elif what >= 0.998:
            lost, _ = handing.died(worker)
            assert lost == sorted(mine)
            mine.clear()
    assert sorted(ended) == items.tolist()


def test_nobody_takes_more_than_a_share() -> None:
    handing, taken = Handing(range(100), 4), 0
    while got := handing.take(0):
        taken += len(got)
    assert taken == 25
    assert handing.take(1)


@pytest.mark.parametrize("most", [8, 1000])
def test_ranges_shrink_towards_the_end(most: int) -> None:
    handing, sizes = Handing(range(1000), 2, most=most), []
    while not handing.finished:
        got = handing.take(0)
        sizes.append(len(got))
        for item in got:
            handing.end(0, item)
    assert sizes[0] == min(most, 125) and sizes[-1] == 1 and sizes == sorted(sizes, reverse=True)


def test_results_on_their_way_do_not_count() -> None:
    """A worker whose lanes have all ended gets as many again, before its results have arrived."""
    handing = Handing(range(200), 4)
    lanes = {worker: [item for _ in range(3) for item in handing.take(worker)] for worker in range(4)}
    again: list[int] = []
    while got := handing.take(0, unfinished=len(again)):
        again += got
    assert len(again) >= len(lanes[0]) == 36
    for item in lanes[0]:
        handing.end(0, item)
    assert handing.died(0)[0] == sorted(again)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_what_is_asked_for_ahead_leaves_enough(workers: int) -> None:
    """As long as more than one round of all lanes waits, a worker may have some of it before it needs them."""
    lanes = 40
    handing = Handing(range(4 * lanes * workers), workers)
    have = [0] * workers
    for worker in range(workers):
        while have[worker] < lanes:
            have[worker] += len(handing.take(worker, unfinished=have[worker])[: lanes - have[worker]])
    ahead = 0
    while got := handing.take(0, unfinished=lanes + ahead, ahead=True):
        ahead += len(got)
    left = len(handing.take(0, unfinished=0))
    assert ahead and left, "others would have to wait"


def test_items_together() -> None:
    handing = Handing(range(64), 2, together=8)
    first = handing.take(0)
    assert first[-1] % 8 == 7


def test_lost_too_often() -> None:
    handing = Handing(range(10), 1)
    for death in range(MOST_DEATHS):
        taken = handing.take(0)
        lost, over = handing.died(0)
        assert lost == taken and over == (lost if death == MOST_DEATHS - 1 else [])
    assert handing.again == MOST_DEATHS * len(taken)


def test_what_a_worker_did_not_have() -> None:
    handing = Handing(range(10), 2)
    taken = handing.take(0)
    with pytest.raises(EngineError, match="did not have"):
        handing.end(1, taken[0])
