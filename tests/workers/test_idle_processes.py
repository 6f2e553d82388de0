"""Processes of a pool for which there are no items: they end before they load anything."""

import os
import signal
import time
from pathlib import Path

from pool_jobs import Squares

from nla_engine.workers.pool import Lost, Pool


def alive(pid: int) -> bool:
    """Whether a process runs, or has not been waited for."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_processes_without_work_end_before_the_job_is_opened(tmp_path: Path) -> None:
    lines: list[str] = []
    with Pool(["cpu"] * 4, imports="pool_jobs", announce=lines.append, unit="sequences") as pool:
        pids = pool.pids
        assert pool.keep_for(9) == 4 and not lines
        assert pool.keep_for(2) == 2 and lines == ["2 sequences: 2 of 4 workers have work"]
        assert pool.devices == ("cpu", "cpu") and pool.pids == pids[:2]
        got = [each for group in pool.run(Squares(tmp_path, seconds=0.2), range(2)) for each in group]
        assert sorted(item for item, _ in got) == [0, 1] and pool.lost == Lost()
        assert {result[3] for _, result in got} <= set(pids[:2])
        end = time.monotonic() + 20
        while any(map(alive, pids[2:])) and time.monotonic() < end:
            time.sleep(0.01)
        assert not any(map(alive, pids[2:]))


def test_one_process_stays_without_items(tmp_path: Path) -> None:
    with Pool(["cpu"] * 2, imports="pool_jobs") as pool:
        assert pool.keep_for(0) == 1
        assert list(pool.run(Squares(tmp_path), [])) == []


def test_a_process_that_has_died_and_is_not_needed_is_not_started_again(tmp_path: Path) -> None:
    lines: list[str] = []
    with Pool(["cpu"] * 2, imports="pool_jobs", announce=lines.append) as pool:
        os.kill(pool.pids[1], signal.SIGKILL)
        end = time.monotonic() + 20
        while len(pool.pids) > 1 and time.monotonic() < end:
            time.sleep(0.01)
        pool.keep_for(1)
        assert [result[0] for group in pool.run(Squares(tmp_path), [3]) for _, result in group] == [9]
        assert len(pool.pids) <= 1 and len(pool._readers) == 2
