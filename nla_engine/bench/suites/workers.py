"""The way of rows from worker processes to the store, without GPUs: how long simulated ones stand still.

A simulated worker computes nothing. It takes prompts in turns like those of the engine, waits as long as an H100 takes
for the 7B shape, and hands over real encoded rows. All sequences are of one length, so those of all lanes end at once,
which is the worst case. The limit is that no GPU ever waits.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from nla_engine.bench.session import Prepared, Session, expect
from nla_engine.bench.workload import encoded_sequences
from nla_engine.capture.appender import Appender
from nla_engine.capture.workers import Captured, waiting_room
from nla_engine.codec.rows import Codec
from nla_engine.config import CaptureOptions
from nla_engine.sites import Site
from nla_engine.store import StoreWriter
from nla_engine.workers.job import Parent
from nla_engine.workers.pool import Pool

_SITE = Site(20)
#: Processes that stand for GPUs.
_WORKERS = (1, 2, 4)
#: Lanes, prompts of a pass, decode steps of a sequence, and steps of a turn.
_LANES, _PASS, _STEPS, _TURN = 512, 128, 128, 8
#: Seconds of a pass of 128 prompts of 64 tokens, and of a step: for itself, and more for each lane.
_PASS_SECONDS, _STEP_SECONDS, _LANE_SECONDS = 0.15, 0.0045, 19e-6
#: Rounds of all lanes, and bytes that a worker fetches at once.
_ROUNDS, _FETCHED = 4, 96 << 20


def run(session: Session) -> None:
    """One worker, and several."""
    for workers in _WORKERS:
        count = workers * _ROUNDS * _LANES
        told: dict[str, float] = {}
        session.measure(
            "workers",
            f"{workers} simulated GPUs, {count} x 64+{_STEPS}, {session.d_model} channels to disk",
            "tok/s",
            _simulated(session, workers, count, told),
            warmups=0,
            limit=count * _STEPS / (_ROUNDS * _round_seconds()),
            detail=lambda p50, told=told: ", ".join(f"{name} {s:.2f} s" for name, s in told.items()),  # type: ignore[misc]
        )


def _round_seconds() -> float:
    return _LANES / _PASS * _PASS_SECONDS + _STEPS * _step_seconds(_LANES)


def _step_seconds(lanes: int) -> float:
    return _STEP_SECONDS + lanes * _LANE_SECONDS


@dataclass(frozen=True)
class SimulatedWork:
    """A job whose workers wait instead of generating. together: so many begin at once; here: a directory for their
    marks."""

    d_model: int
    together: int
    here: Path

    def open(self, device: str, parent: Parent) -> SimulatedWorker:
        """No model is loaded."""
        return SimulatedWorker(self, parent)


class SimulatedWorker:
    """See `workers.job.Worker`. Its state is when it began, and until when its GPU has work."""

    def __init__(self, work: SimulatedWork, parent: Parent) -> None:
        codec = Codec.named("int8", work.d_model)
        self.parent = parent
        self.sequences = encoded_sequences(codec, _SITE.layer, 16 * _STEPS)
        self.fetched = max(_FETCHED // (_STEPS * codec.row_bytes), 1)
        self.lanes: list[tuple[list[int], int]] = []  # those that entered together, and their steps left
        self.back: deque[list[int]] = deque()  # ended, not fetched
        self.busy = 0.0  # until then the GPU has work
        (work.here / str(os.getpid())).touch()
        while len(os.listdir(work.here)) < work.together:
            time.sleep(0.001)

    def run(self, items: Iterator[int | None]) -> Iterator[tuple[int, Captured]]:
        """Turns: prompts enter free lanes, a few steps, and what has ended is handed over meanwhile."""
        began, over, ready = time.monotonic(), False, list[int]()
        while not over or ready or self.lanes or self.back:
            entered, held = list[int](), over
            most = min(self._free(), _PASS) if not self.lanes or self._free() >= _LANES / 16 else 0
            while not held and len(entered) < most:
                item = next(items, ...)
                over, held = item is ..., item is None or item is ...
                if isinstance(item, int):
                    entered.append(item)
            if entered:
                self._works(_PASS_SECONDS * len(entered) / _PASS)
                self.lanes.append((entered, _STEPS))
            filling = entered and self._free() and not held
            steps = 0 if filling else min([_TURN, *(left for _, left in self.lanes)])
            if self.lanes:
                self._works(steps * _step_seconds(sum(len(each) for each, _ in self.lanes)))
            for item in ready:
                sequence = self.sequences[item % len(self.sequences)]
                yield item, Captured(replace(sequence, number=item), None)
            time.sleep(max(self.busy - time.monotonic() - _step_seconds(_LANES), 0))
            ready = self._ended(steps)
        self.parent.state(lambda: (began, self.busy))

    def _free(self) -> int:
        return _LANES - sum(len(each) for each, _ in self.lanes) - sum(map(len, self.back))

    def _works(self, seconds: float) -> None:
        self.busy = max(self.busy, time.monotonic()) + seconds

    def _ended(self, steps: int) -> list[int]:
        """Those of the sequences that have ended that are fetched now, after so many steps."""
        self.lanes = [(each, left - steps) for each, left in self.lanes]
        ended = [item for each, left in self.lanes if not left for item in each]
        self.lanes = [(each, left) for each, left in self.lanes if left]
        self.back.extend(ended[at : at + self.fetched] for at in range(0, len(ended), self.fetched))
        return self.back.popleft() if self.back else []


@contextmanager
def _simulated(session: Session, workers: int, count: int, told: dict[str, float]) -> Iterator[Prepared]:
    """The part of a capture that is not the workers'. Tokens per second from the common start to the last commit."""
    codec = Codec.named("int8", session.d_model)

    def once() -> float:
        here = Path(tempfile.mkdtemp(dir=session.directory))
        work = SimulatedWork(session.d_model, workers, here)
        states: list[list[tuple[float, float]]] = []
        waiting, outgoing = waiting_room(CaptureOptions.host_memory, workers)
        with (
            Pool(["cpu"] * workers, imports=__name__, waiting_bytes=waiting, outgoing_bytes=outgoing) as pool,
            StoreWriter.create(
                session.directory / "workers.zarr",
                layers=[_SITE],
                codec=codec,
                sink_norm={_SITE: math.inf},
                vocabulary=[b"a"],
                provenance={},
                options={},
                overwrite=True,
            ) as writer,
        ):
            appender = Appender(writer, [])
            spent = time.process_time()
            for group in pool.run(work, range(count), watch=lambda now, before: states.append(now)):
                appender.add_rows([captured.rows for _, captured in group])
                del group
            writer.close()
            ended, spent = time.monotonic(), time.process_time() - spent
        expect("sequences", appender.sequences, count)
        told.update(asdict(pool.waited))
        began, stopped = zip(*states[-1], strict=True)
        told["after the last step"] = ended - max(stopped)
        told["of the processor in this process"] = spent
        return count * _STEPS / (ended - min(began))

    yield Prepared(once)
