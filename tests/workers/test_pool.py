"""Every item gets one result, whatever happens to the workers; what cannot be mended stops the run and says why."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from pool_jobs import Squares, until

from nla_engine.errors import EngineError
from nla_engine.workers.child import Items
from nla_engine.workers.handing import Handing
from nla_engine.workers.pool import Lost, Pool

#: Items that no pool is done with while a test runs.
MANY = range(10**6)


class Ran:
    """A pool that has run: results by item, what it said."""

    def __init__(self, job: Squares, items: object, workers: int = 2, **how: object) -> None:
        self.lines: list[str] = []
        self.got: dict[int, tuple[object, ...]] = {}
        self.states: list[list[int]] = []
        options = {key: how.pop(key) for key in ("waiting_bytes", "unit") if key in how}
        with Pool(["cpu"] * workers, imports="pool_jobs", announce=self.lines.append, **options) as pool:
            self.pool = pool
            for group in pool.run(
                job, items, watch=lambda now, before: self.states.append(now + before), **how
            ):
                for item, result in group:
                    assert item not in self.got
                    self.got[item] = result
            self.lost = pool.lost
        assert not pool.pids

    def check(self, items: object, size: int = 3) -> None:
        """Each item has its own result."""
        assert sorted(self.got) == list(items)
        for item, (square, array, *_) in self.got.items():
            assert square == item * item
            np.testing.assert_array_equal(array, np.full(size, item))
            assert array.flags.writeable or size < 1000


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.parametrize("workers", [1, 3])
def test_all_items_once(workers: int, tmp_path: Path, rng: np.random.Generator) -> None:
    items = np.sort(rng.choice(10_000, 200, replace=False))
    ran = Ran(Squares(tmp_path, held=7, meet=workers), items, workers)
    ran.check(items.tolist())
    assert len({result[3] for result in ran.got.values()}) == workers
    assert ran.lines == ["opened"], "a line that several workers say is said once"
    assert ran.lost == Lost() and sum(ran.states[-1]) == 200


def test_large_arrays_and_little_room(tmp_path: Path) -> None:
    """A worker waits while what it has sent is not taken; one result larger than all room passes alone."""
    size = 40_000
    items = list(range(12))
    got = []
    with Pool(["cpu", "cpu"], imports="pool_jobs", waiting_bytes=size * 8 + 1000) as pool:
        for group in pool.run(Squares(tmp_path, size=size), items):
            assert pool._bytes <= size * 8 + 1000 or len(group) == 1
            got += group
            time.sleep(0.01)
    assert sorted(item for item, _ in got) == items
    assert all((result[1] == item).all() and result[1].flags.writeable for item, result in got)


class Answers:
    """The run's end of a line, for `Items`: what was asked, and the answers that are left."""

    def __init__(self, *answers: tuple[object, ...]) -> None:
        self.asked: list[tuple[object, ...]] = []
        self.answers = list(answers)
        self.wire = SimpleNamespace(send=self.asked.append)

    def receive(self) -> tuple[object, ...]:
        return self.answers.pop(0)


def test_a_worker_asks_before_it_has_none_left() -> None:
    line = Answers(("items", [1, 2, 3, 4]), ("items", [5]), ("items", []), ("items", [6]), ("end",))
    items = Items(line)  # type: ignore[arg-type]
    assert next(items) == 1 and next(items) == 2 and line.asked == [("ask", 0, False)]
    items.end()
    assert next(items) == 3 and line.asked[1:] == [("ask", 3, True)]
    assert next(items) == 4 and len(line.asked) == 2, "one question at a time"
    assert next(items) == 5 and line.asked[2:] == [("ask", 4, True)]
    assert next(items) == 6, "an empty answer to an earlier question is no answer to this one"
    assert line.asked[3:] == [("ask", 4, False), ("ask", 5, True)]
    for _ in range(5):
        items.end()
    with pytest.raises(StopIteration):
        next(items)
    items.check()


def test_nothing_just_now() -> None:
    line = Answers(("items", [1]), ("items", []), ("items", []))
    items = Items(line)  # type: ignore[arg-type]
    assert [next(items), next(items)] == [1, None] and line.asked[-1] == ("ask", 1, False)


def test_how_long_workers_stood_still(tmp_path: Path) -> None:
    """One worker has the last item for long: the other one has nothing more to do."""
    began = time.monotonic()
    with Pool(["cpu"] * 2, imports="pool_jobs") as pool:
        for group in pool.run(Squares(tmp_path, meet=2, at={1: "wait"}), range(2)):
            if group[0][0] == 0:
                until(lambda: any(worker.waits for worker in pool._workers.values()))
                time.sleep(0.3)
                (tmp_path / "go").touch()
        waited, whole = pool.waited, time.monotonic() - began
    assert 0.1 < waited.end < whole and waited.start + waited.items + waited.results < whole, waited


def test_no_items(tmp_path: Path) -> None:
    Ran(Squares(tmp_path), []).check([])


def test_replies_of_a_prompt_stay_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Except where a worker has its whole share."""
    take, ranges, cut = Handing.take, [], []

    def whole(handing: Handing, worker: int, unfinished: int | None, ahead: bool) -> list[int]:
        taken = take(handing, worker, unfinished, ahead)
        ranges.append(taken)
        if taken and (following := handing._next()) is not None and following // 6 == taken[-1] // 6:
            more = take(handing, worker, handing._unfinished[worker], ahead)
            cut.extend(more)
            taken += more
        return taken

    monkeypatch.setattr(Handing, "take", whole)
    ran = Ran(Squares(tmp_path, held=64, meet=2), range(120), workers=2, together=6)
    ran.check(range(120))
    assert len(ranges) > 4 and not cut, "there was room for the rest of a prompt"


@pytest.mark.parametrize("how", ["kill", "segfault", "exception", "exit"])
def test_a_death_costs_nothing(how: str, tmp_path: Path) -> None:
    ran = Ran(Squares(tmp_path, held=5, at={20: how}), range(60), unit="sequences")
    ran.check(range(60))
    assert ran.lost.workers == 1 and ran.lost.items >= 1
    [line] = [line for line in ran.lines if "died" in line]
    told = {
        "kill": "killed by SIGKILL",
        "segfault": "killed by SIGSEGV",
        "exception": "RuntimeError: CUDA error: an illegal memory access",
        "exit": "ended with code 7",
    }
    assert told[how] in line and f"{ran.lost.items} sequences that it had are done again" in line


def test_the_same_item_three_times(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"13.*3 workers.*illegal memory access") as raised:
        Ran(Squares(tmp_path, at={13: "exception"}, always=True), range(40))
    assert any("SquaresWorker" in note or "happen" in note for note in raised.value.__notes__)


def test_a_failure_of_the_run_stops_it(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="layer 3: 2 rows") as raised:
        Ran(Squares(tmp_path, at={13: "failed"}), range(40))
    assert str(raised.value) == "layer 3: 2 rows were never written"


@pytest.mark.parametrize("how", ["kill", "exception"])
def test_workers_that_never_start(how: str, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="every worker died"):
        Ran(Squares(tmp_path, at_open=how), range(4), workers=1)


def test_an_item_returned_twice_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="which it did not have"):
        Ran(Squares(tmp_path), range(4), told=lambda item: 0)


def test_leaving_ends_the_processes(tmp_path: Path) -> None:
    with Pool(["cpu"] * 2, imports="pool_jobs") as pool:
        next(pool.run(Squares(tmp_path, seconds=0.05), MANY))
        pids = pool.pids
        assert all(map(alive, pids))
    assert len(pids) == 2 and not any(map(alive, pids))


def test_what_is_unfinished(tmp_path: Path) -> None:
    with Pool(["cpu"] * 2, imports="pool_jobs") as pool:
        runs = pool.run(Squares(tmp_path, seconds=0.1, held=4), MANY)
        done = [item for item, _ in next(runs)]
        left = pool.unfinished(200.0)
    assert left and not set(left) & set(done)


@pytest.mark.parametrize("number", range(int(os.environ.get("NLA_KILL_ROUNDS", "2"))))
def test_killed_at_random(number: int, tmp_path: Path, rng: np.random.Generator) -> None:
    """A process is killed at a random time, twice, so that no item can be lost three times.

    NLA_KILL_ROUNDS: how often this is done. Every other time the results are large, so a bundle of them is cut.
    """
    size = (3, 40_000)[number % 2]
    delays, victims = rng.uniform(0, 0.8, 2), rng.integers(3, size=2)
    got: dict[int, int] = {}
    lines: list[str] = []
    with Pool(["cpu"] * 3, imports="pool_jobs", announce=lines.append) as pool:

        def kill() -> None:
            for delay, victim in zip(delays, victims, strict=True):
                time.sleep(delay)
                with contextlib.suppress(ProcessLookupError, IndexError):
                    os.kill(pool.pids[victim], signal.SIGKILL)

        thread = threading.Thread(target=kill)
        thread.start()
        for group in pool.run(Squares(tmp_path, size=size, seconds=0.01, held=8), range(150)):
            for item, result in group:
                assert item not in got and (result[1] == item).all() and len(result[1]) == size
                got[item] = result[0]
        thread.join()
    assert got == {n: n * n for n in range(150)}, lines


PROGRAM = """
import sys, time
from pathlib import Path
from pool_jobs import Squares, until
from nla_engine.workers.pool import Pool
with Pool(["cpu", "cpu"], imports="pool_jobs") as pool:
    print(*pool.pids, flush=True)
    for group in pool.run(Squares(Path(sys.argv[1]), seconds=float(sys.argv[2])), range(10**6)):
        print("some", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_no_process_outlives_the_run(number: int, tmp_path: Path) -> None:
    """Also while a worker computes, and tells the run nothing."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path), "0.1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        restore_signals=True,
    )
    assert process.stdout is not None
    with process.stdout:
        pids = [int(word) for word in process.stdout.readline().split()]
        assert process.stdout.readline()
        process.send_signal(number)
        process.wait(120)
    end = time.monotonic() + 120
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    assert len(pids) == 2 and not any(map(alive, pids))
