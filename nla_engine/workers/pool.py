"""A pool of worker processes: hands out items, receives results in any order, replaces workers that die.

The run's own thread does all that a caller sees: it says lines, tells how far the work is, and yields results. One
thread per worker receives, and answers its questions at once.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np

from nla_engine import errors
from nla_engine.errors import EngineError, NLAError
from nla_engine.workers.devices import cores, with_work
from nla_engine.workers.handing import MOST_DEATHS, RANGE, Handing
from nla_engine.workers.job import Job, Waited
from nla_engine.workers.process import WorkerProcess

#: Bytes of results that may wait in memory.
_WAITING_BYTES = 1 << 28
#: Seconds that workers have to take their leave once all results are there.
_LEAVE_SECONDS = 20.0

Results = list[tuple[int, Any]]


@dataclass(frozen=True)
class Lost:
    """What a run lost on the way, and did again. workers: how many died; items: those that these had."""

    workers: int = 0
    items: int = 0


class Pool:
    """Processes on `devices`, one each, started at once so that they load their modules while the caller prepares.

    imports: a module that the job will need
    announce: called with lines of workers, and of the pool; unit: what items are, for these lines
    waiting_bytes: of results that were received and not taken; workers wait while there are more
    outgoing_bytes: of results that wait in a worker to be sent; None: in all workers together half of waiting_bytes
    A context manager: leaving it ends the processes.
    """

    def __init__(
        self,
        devices: Sequence[str],
        *,
        imports: str,
        announce: Callable[[str], None] = lambda text: None,
        unit: str = "items",
        waiting_bytes: int = _WAITING_BYTES,
        outgoing_bytes: int | None = None,
    ) -> None:
        self.devices = tuple(devices)
        self._imports, self._announce, self._unit = imports, announce, unit
        self._most = waiting_bytes
        self._outgoing = outgoing_bytes or waiting_bytes // (2 * len(devices))
        self._threads = max(_threads() // len(devices), 1)
        self._lock = threading.Condition()
        self._handing = Handing([], 1)
        self._job: Job | None = None
        self._told: Callable[[int], Any] = lambda item: item
        self._arrived: Results = []
        self._bytes = self._arrived_bytes = 0
        self._lines: list[str] = []
        self._said: set[str] = set()
        self._left: list[Any] = []
        self._states: list[Any] = []  # of workers that died
        self._died: list[WorkerProcess] = []  # to be replaced
        self._fruitless = dict.fromkeys(range(len(devices)), 0)
        self._news = self._stopping = self._closing = False
        self._error: NLAError | None = None
        self._deaths = 0
        self._readers: list[tuple[threading.Thread, WorkerProcess]] = []
        self._workers: dict[int, WorkerProcess] = {}
        try:
            for number, device in enumerate(devices):
                self._start(number, device)
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        """The processes that run now."""
        return [worker.pid for worker in list(self._workers.values()) if not worker.gone]

    @property
    def lost(self) -> Lost:
        """What was lost and done again so far."""
        return Lost(self._deaths, self._handing.again)

    @property
    def waited(self) -> Waited:
        """How long the workers that are there at the end stood still, on average."""
        with self._lock:
            told = [(each.ready, each.waited) for each in self._workers.values() if each.waited is not None]
        first = min((ready for ready, _ in told), default=0.0)
        each = [astuple(replace(waited, start=ready - first)) for ready, waited in told]
        return Waited(*(round(sum(seconds) / len(told), 3) for seconds in zip(*each, strict=True)))

    def keep_for(self, items: int) -> int:
        """Let processes go that so many items leave without work, before they load anything for it. Returns how many
        stay, at least one. Call it before `run`."""
        kept = with_work(len(self.devices), items)
        if kept < len(self.devices):
            self._say(f"{items:,} {self._unit}: {kept} of {len(self.devices)} workers have work")
        with self._lock:
            for number in range(kept, len(self.devices)):
                worker = self._workers.pop(number)
                worker.ended = True
                worker.wire.hang_up()
            self._died = [worker for worker in self._died if worker.number < kept]
            self.devices = self.devices[:kept]
        return kept

    def run(
        self,
        job: Job,
        items: Sequence[int] | np.ndarray,
        *,
        told: Callable[[int], Any] = lambda item: item,
        together: int = 1,
        most: int = RANGE,
        watch: Callable[[list[Any], list[Any]], None] = lambda now, before: None,
    ) -> Iterator[Results]:
        """Yield the results of all items, those that have arrived together in one list, each item once. Call it once.

        items: ascending numbers, each once; told: what a worker is told of an item, called by one thread at a time,
            while this generator may be suspended
        together: items with the same number // together are best done by one worker
        most: items that a worker gets at once. It asks for more before it has none left
        watch: called with the last state of each worker, and with those of workers that died, whenever one has changed
            or a worker begins
        Raises the error of a worker if it is one of `nla_engine.errors`, and EngineError if an item was lost too often,
        or no worker is left.
        """
        with self._lock:
            self._handing = Handing(items, len(self._workers), together, most)
            self._told, self._job = told, job
            for worker in self._workers.values():
                worker.send("work", job, worker.device, self._outgoing)
            self._lock.notify_all()
        while True:
            with self._lock:
                while not self._has_news():
                    self._lock.wait()
                lines, self._lines = self._lines, []
                arrived, self._arrived = self._arrived, []
                size, self._arrived_bytes = self._arrived_bytes, 0
                died, self._died = self._died, []
                news, self._news = self._news, False
                error, over = self._error, self._over
            for line in lines:
                self._say(line)
            if error is not None:
                raise error
            if not over:
                for worker in died:
                    self._start(worker.number, worker.device)
            if news:
                watch(*self._all_states())
            if arrived:
                yield arrived
                arrived = []  # freed before more may be received
                self._release(size)
            elif over:
                break
        self._leave()
        watch(*self._all_states())

    def _all_states(self) -> tuple[list[Any], list[Any]]:
        """The last state of each worker that reported one, and those of workers that died."""
        with self._lock:
            now = [worker.state for worker in self._workers.values() if worker.state is not None]
            return now, list(self._states)

    def unfinished(self, seconds: float) -> list[Any]:
        """Stop the workers, and return what they say is unfinished, for so many seconds at most."""
        with self._lock:
            self._stopping = True
            for worker in self._workers.values():
                worker.send("stop")
            self._lock.notify_all()
            end = time.monotonic() + seconds
            while self._running(ready=True) and (wait := end - time.monotonic()) > 0:
                self._lock.wait(wait)
            return self._left

    def close(self) -> None:
        """End all processes. A second call does nothing."""
        with self._lock:
            self._stopping = self._closing = True
            self._lock.notify_all()
            readers, self._readers = self._readers, []
        for _, worker in readers:
            worker.wire.hang_up()
        for thread, worker in readers:
            worker.stop()
            thread.join()
            worker.close()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _has_news(self) -> bool:
        news = self._news or self._lines or self._arrived or self._died or self._error
        return bool(news) or self._over

    @property
    def _over(self) -> bool:
        """Whether all results are there."""
        return self._job is not None and self._handing.finished

    def _say(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self._announce(line)

    def _start(self, number: int, device: str) -> None:
        """Start a process, in place of one that died or as the first on its device."""
        worker = WorkerProcess(number, device, self._threads)
        thread = threading.Thread(target=self._receive, args=[worker], name=f"worker-{number}", daemon=True)
        with self._lock:
            self._workers[number] = worker
            self._readers.append((thread, worker))
            worker.send("import", self._imports)
            if self._job is not None:
                worker.send("work", self._job, device, self._outgoing)
        thread.start()

    def _receive(self, worker: WorkerProcess) -> None:
        """Of one worker, until its process has ended."""
        failed: Exception | None = None
        try:
            while True:
                messages = worker.wire.receive(self._reserve)
                with self._lock:
                    for message, size in messages:
                        if message[0] != "result":
                            self._bytes -= size
                        self._took(worker, message, size)
                    self._lock.notify_all()
                del messages, message  # what they hold is freed once it is taken
        except EOFError:
            pass
        except Exception as error:
            failed = error
            worker.kill()
        why = worker.why()
        with self._lock:
            worker.gone = True
            if failed is not None and not self._stopping:
                self._fail(failed if isinstance(failed, NLAError) else EngineError(f"worker: {failed}"))
            elif not (worker.ended or self._stopping or self._over):
                self._lost(worker, why)
            self._lock.notify_all()

    def _reserve(self, size: int) -> None:
        """Wait until a message of so many bytes may take memory."""
        with self._lock:
            while not self._stopping and self._bytes and self._bytes + size > self._most:
                self._lock.wait()
            self._bytes += size

    def _release(self, size: int) -> None:
        with self._lock:
            self._bytes -= size
            self._lock.notify_all()

    def _took(self, worker: WorkerProcess, message: tuple[Any, ...], size: int) -> None:
        """Act on a message. The lock is held."""
        kind, *more = message
        if kind == "result":
            if self._stopping:
                return  # nothing more is taken
            item, result = more
            self._handing.end(worker.number, item)
            worker.fruitful = True
            self._arrived.append((item, result))
            self._arrived_bytes += size
            if self._handing.finished:
                self._answer_waiting()
        elif kind == "ask":
            worker.unfinished, ahead = more
            worker.waits = not worker.unfinished
            self._answer(worker, ahead)
        elif kind == "state":
            worker.state, self._news = more[0], True
        elif kind == "say":
            self._lines.append(more[0])
        elif kind == "left":
            self._left.append(more[0])
        elif kind == "ready":
            worker.ready, self._news = time.monotonic(), True
        elif kind == "bye":
            worker.ended, worker.waited = True, more[0]
        elif kind == "crash":
            worker.cause, worker.trace = more
        elif kind == "error":
            name, text, trace = more
            worker.ended = True
            error: NLAError = getattr(errors, name)(text)
            error.add_note(f"in the worker on {worker.device}:\n{trace}")
            self._fail(error)

    def _answer(self, worker: WorkerProcess, ahead: bool = False) -> None:
        """Give a worker that asked the next items, or say that there are none. The lock is held."""
        if self._handing.finished:
            worker.waits = False
            worker.send("end")
            return
        items = self._handing.take(worker.number, worker.unfinished, ahead)
        if items or not worker.waits:  # one that waits is answered later
            worker.waits = False
            worker.send("items", [self._told(item) for item in items])

    def _answer_waiting(self) -> None:
        for worker in self._workers.values():
            if worker.waits and not worker.gone:
                self._answer(worker)

    def _lost(self, worker: WorkerProcess, why: str) -> None:
        """A worker has died: its items go to others, and it is started again. The lock is held."""
        self._deaths += 1
        if worker.state is not None:
            self._states.append(worker.state)
            worker.state = None
        lost, too_often = self._handing.died(worker.number)
        number = self._fruitless[worker.number] = 0 if worker.fruitful else self._fruitless[worker.number] + 1
        told = f"worker {worker.number} on {worker.device} died: {why}"
        if too_often:
            named = ", ".join(map(str, too_often[:5])) + (", ..." if len(too_often) > 5 else "")
            self._fail(
                EngineError(
                    f"{self._unit} {named} (counted from 0): {MOST_DEATHS} workers that had them died, the last one: "
                    f"{why}: mend the cause, or leave them out"
                ),
                worker.trace,
            )
            return
        what = f"{len(lost):,} {self._unit} that it had are done again" if lost else "it had no work"
        if number < MOST_DEATHS:
            self._lines.append(f"{told}; {what}; it is started again")
            self._died.append(worker)
        else:
            del self._workers[worker.number]
            self._handing.workers -= 1
            self._lines.append(
                f"{told}; {what}; it died {number} times without a result, so others go on without it"
            )
            if not self._workers:
                self._fail(
                    EngineError(f"every worker died, the last one: {why}: mend the cause"), worker.trace
                )
        self._answer_waiting()

    def _fail(self, error: NLAError, trace: str = "") -> None:
        """The run stops with the first of these errors. The lock is held."""
        if trace:
            error.add_note(trace)
        self._error = self._error or error

    def _running(self, *, ready: bool) -> list[WorkerProcess]:
        """The workers whose process has neither taken its leave nor ended. ready: only those whose job is open."""
        return [
            worker
            for worker in self._workers.values()
            if not (worker.ended or worker.gone) and (worker.ready or not ready)
        ]

    def _leave(self) -> None:
        """All results are there: wait for the last states, but not for workers that are still starting."""
        end = time.monotonic() + _LEAVE_SECONDS
        with self._lock:
            while self._running(ready=True) and (wait := end - time.monotonic()) > 0:
                self._lock.wait(wait)


def _threads() -> int:
    """Threads that this process may compute with."""
    with suppress(ValueError):
        if asked := int(os.environ.get("OMP_NUM_THREADS", "0")):
            return asked
    return cores()
