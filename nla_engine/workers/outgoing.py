"""Results on their way out of a worker: a thread sends them, so that the work goes on meanwhile."""

from __future__ import annotations

import os
import threading
from collections import deque
from typing import Any

from nla_engine.workers.wire import Packed, Wire


class Outgoing:
    """Sends messages in their order. Other messages of the same wire may overtake them.

    most: bytes that may wait; `put` waits while there are more, except that one message always may
    """

    def __init__(self, wire: Wire, most: int) -> None:
        self._wire, self._most = wire, most
        self._changed = threading.Condition()
        self._waiting: deque[Packed] = deque()
        self._bytes = 0  # of those that wait, and of the one that is being sent
        threading.Thread(target=self._send, name="results", daemon=True).start()

    def put(self, message: Any) -> None:
        """Send it soon. Its arrays must not change any more."""
        packed = Packed.of(message)
        with self._changed:
            while self._bytes and self._bytes + packed.nbytes > self._most:
                self._changed.wait()
            self._waiting.append(packed)
            self._bytes += packed.nbytes
            self._changed.notify_all()

    def flush(self) -> None:
        """Wait until all have been sent."""
        with self._changed:
            while self._bytes:
                self._changed.wait()

    def _send(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    self._changed.wait()
                packed = self._waiting.popleft()
            try:
                self._wire.send_packed(packed)
            except OSError:
                os._exit(1)  # the run is gone
            with self._changed:
                self._bytes -= packed.nbytes
                self._changed.notify_all()
