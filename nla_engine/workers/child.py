"""The main program of a worker process: opens its job, asks the run for items, sends the results.

It ends when its socket closes, so it cannot outlive the run, however that ends.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any

from nla_engine import errors
from nla_engine.errors import EngineError, NLAError
from nla_engine.workers.job import Job, Stopped, Told, Waited, unfinished_of
from nla_engine.workers.outgoing import Outgoing
from nla_engine.workers.wire import Wire

#: Seconds between two reports of how far the worker is.
_REPORT_SECONDS = 0.5


class Line:
    """The worker's end of the wire. Implements `workers.job.Parent`."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self._inbox: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._reported = 0.0
        self._last: Callable[[], Any] | None = None
        self.results: Outgoing | None = None
        self.items: Items | None = None
        threading.Thread(target=self._read, name="orders", daemon=True).start()

    def _read(self) -> None:
        """Reads at all times, so that the end of the run is noticed during any work."""
        while True:
            try:
                messages = self.wire.receive()
            except EOFError:
                os._exit(0)
            except BaseException:  # a message that cannot be read here, such as a job of an unknown module
                self.wire.send(("crash", *_described(sys.exc_info()[1])))
                os._exit(1)
            for message, _ in messages:
                if message[0] == "stop":
                    self._stopped.set()
                self._inbox.put(message)

    def receive(self) -> tuple[Any, ...]:
        """The next message. Stopped if the run is over."""
        message = self._inbox.get()
        if message[0] == "stop":
            raise Stopped
        return message

    def announce(self, text: str) -> None:
        """See `Parent`."""
        self.wire.send(("say", text))

    def state(self, make: Callable[[], Any]) -> None:
        """See `Parent`."""
        if self._stopped.is_set():
            raise Stopped
        self._last = make
        now = time.monotonic()
        if now - self._reported >= _REPORT_SECONDS:
            self._reported = now
            self.wire.send(("state", make()))

    def waited(self) -> Waited:
        """The seconds that the work stood still here."""
        if self.items is None or self.results is None:
            return Waited()
        return Waited(0.0, self.items.waited, self.results.waited, self.items.waited_at_end)

    def report(self) -> None:
        """The last state, whenever the one before was sent."""
        if self._last is not None:
            self.wire.send(("state", self._last()))


class Items:
    """What the run hands out to this worker, as `Worker.run` takes it. It asks for more before there is none left.

    waited: seconds without an item here, and at the end without one anywhere
    """

    def __init__(self, line: Line) -> None:
        self._line, self._here = line, deque[Told]()
        self._unfinished = self._low = 0
        self._asked = self._ended = False
        self.waited = self.waited_at_end = 0.0

    def __iter__(self) -> Items:
        return self

    def __next__(self) -> Told | None:
        if not self._here and not self._ended:
            self._wait()
        if self._here:
            item = self._here.popleft()
            if len(self._here) < self._low and not self._asked:
                self._ask(ahead=True)
            return item
        if self._ended:
            raise StopIteration
        return None

    def _wait(self) -> None:
        """For the answer to what was asked before, and if that was empty for another.

        With nothing to do, that may take long: it waits for work of others that die, or for the end.
        """
        began = time.monotonic()
        if self._asked:
            self._take()
        if not self._here and not self._ended:
            self._ask()
            self._take()
        if self._ended:
            self.waited_at_end += time.monotonic() - began
        else:
            self.waited += time.monotonic() - began

    def _ask(self, ahead: bool = False) -> None:
        """The run answers at once, unless there is nothing to do. ahead: there are items here."""
        self._line.wire.send(("ask", self._unfinished, ahead))  # results on their way do not count
        self._asked = True

    def _take(self) -> None:
        kind, *more = self._line.receive()
        self._asked = False
        if kind == "end":
            self._ended = True
        else:
            self._here.extend(more[0])
            self._unfinished += len(more[0])
            self._low = (len(more[0]) + 1) // 2

    def end(self) -> None:
        """A result is on its way."""
        self._unfinished -= 1

    def check(self) -> None:
        """EngineError if an item has no result."""
        if self._unfinished or not self._ended:
            raise EngineError(f"a worker ended, and {self._unfinished} of its items have no result")


def main() -> None:
    """Work until there is nothing more to do. The socket's number is the last argument."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run hears Ctrl-C, and stops its workers
    faulthandler.enable()
    line = Line(Wire(socket.socket(fileno=int(sys.argv[-1]))))
    code = 0
    try:
        try:
            _work(line)
        finally:
            if line.results is not None:
                line.results.flush()
        line.wire.send(("bye", line.waited()))
    except OSError as error:
        if not isinstance(error, BrokenPipeError | ConnectionError):
            _tell(line, ("crash", *_described(error)))
        code = 1
    except NLAError as error:
        _tell(line, ("error", _known(type(error)), *_described(error)))
        code = 1
    except BaseException as error:
        _tell(line, ("crash", *_described(error)))
        code = 1
    sys.stderr.flush()
    os._exit(code)  # threads and devices may be in any state


def _work(line: Line) -> None:
    try:
        while True:
            kind, *more = line.receive()
            if kind == "work":
                break
            importlib.import_module(more[0])  # what the job will need, while the run still prepares
        job: Job = more[0]
        line.results = results = Outgoing(line.wire, more[2])
        worker = job.open(more[1], line)
    except Stopped:
        return
    line.wire.send(("ready",))
    items = line.items = Items(line)
    try:
        for item, result in worker.run(items):
            results.put(("result", item, result))
            items.end()
        items.check()
        line.report()
    except Stopped:
        for left in unfinished_of(worker):
            line.wire.send(("left", left))


def _described(error: BaseException | None) -> tuple[str, str]:
    """What went wrong in a line, and where."""
    name = "" if isinstance(error, NLAError) else f"{type(error).__name__}: "
    text = " ".join(f"{name}{error}".split())
    return text, "".join(traceback.format_exception(error))


def _known(kind: type[BaseException]) -> str:
    """The name of the nearest class in `nla_engine.errors`."""
    return next(base.__name__ for base in kind.__mro__ if getattr(errors, base.__name__, None) is base)


def _tell(line: Line, message: tuple[Any, ...]) -> None:
    try:
        line.wire.send(message)
    except OSError:
        return  # the run is gone
