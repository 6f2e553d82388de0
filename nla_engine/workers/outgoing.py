"""Results on their way out of a worker: a thread sends them, so that the work goes on meanwhile."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from typing import Any

from nla_engine.workers.wire import Packed, Wire

#: Bytes of results that are sent together, if as many wait. One larger result is sent alone.
_BUNDLE_BYTES = 1 << 23


class Outgoing:
    """Sends messages in their order. Other messages of the same wire may overtake them.

    most: bytes that may wait; `put` waits while there are more, except that one message always may
    waited: seconds that `put` has waited so far
    """

    def __init__(self, wire: Wire, most: int) -> None:
        self._wire, self._most = wire, most
        self._changed = threading.Condition()
        self._waiting: deque[Packed] = deque()
        self._bytes = 0  # of those that wait, and of those that are being sent
        self.waited = 0.0
        threading.Thread(target=self._send, name="results", daemon=True).start()

    def put(self, message: Any) -> None:
        """Send it soon. Its arrays are copied."""
        packed = Packed.of(message)
        began = time.monotonic()
        with self._changed:
            while self._bytes and self._bytes + packed.nbytes > self._most:
                self._changed.wait()
            self.waited += time.monotonic() - began
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
                bundle, size = [self._waiting.popleft()], 0
                size = bundle[0].nbytes
                while self._waiting and size + self._waiting[0].nbytes <= _BUNDLE_BYTES:
                    bundle.append(self._waiting.popleft())
                    size += bundle[-1].nbytes
            try:
                self._wire.send_packed(bundle)
            except OSError:
                os._exit(1)  # the run is gone
            bundle.clear()
            with self._changed:
                self._bytes -= size
                self._changed.notify_all()
