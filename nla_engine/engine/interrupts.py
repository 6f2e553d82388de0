"""Notices Ctrl-C while the main thread waits in a call that Python cannot interrupt, such as a sum over ranks.

Python raises KeyboardInterrupt between two of its own instructions, so never in a call that does not return.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

#: Seconds between two looks at what the main thread does.
_LOOK_SECONDS = 0.1


class Interrupts:
    """Until `close`, calls `act` with the number of each signal, in a thread of its own, beside the usual handler.

    Made in the main thread; in any other it does nothing. Signals without a handler of Python end the process anyway.
    """

    def __init__(self, act: Callable[[int], None]) -> None:
        self._act = act
        self._write = -1
        if threading.current_thread() is not threading.main_thread():
            return
        read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=[read, self._before], name="signals", daemon=True).start()

    def _listen(self, read: int, before: int) -> None:
        """Passes every signal on to whoever listened before, such as an event loop."""
        while numbers := os.read(read, 64):
            if before >= 0:
                with suppress(OSError):
                    os.write(before, numbers)
            for number in numbers:
                self._act(number)
        os.close(read)

    def close(self) -> None:
        """Listen no longer."""
        if self._write < 0 or threading.current_thread() is not threading.main_thread():
            return
        signal.set_wakeup_fd(self._before)
        os.close(self._write)
        self._write = -1


def main_thread_waits(seconds: float, done: threading.Event) -> bool:
    """Whether the main thread stays in one and the same call for so long. False at once if it moves, or once done."""
    first, end = _place(), time.monotonic() + seconds
    while time.monotonic() < end:
        if done.wait(_LOOK_SECONDS) or _place() != first:
            return False
    return True


def _place() -> tuple[int, int]:
    """The frame that the main thread runs, and the instruction in it."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return (0, 0) if frame is None else (id(frame), frame.f_lasti)
