"""One worker process as the run sees it: started, sent messages, asked why it died."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from typing import Any

from nla_engine.workers.job import Waited
from nla_engine.workers.wire import Wire

_PROGRAM = "from nla_engine.workers.child import main; main()"
#: Seconds that a process has to end by itself once its socket is closed.
_PATIENCE = 5.0


class WorkerProcess:
    """A new process. threads: of its computation on the CPU.

    It is no fork, and does not run the caller's main module: neither threads nor an open GPU of the caller matter.
    ready: when its job was open, 0 before that; waits: it has nothing to do and asked for more; ended: as it should
    waited: what it told at its end; cause: why it failed
    """

    def __init__(self, number: int, device: str, threads: int) -> None:
        self.number, self.device = number, device
        self.waits = self.ended = self.gone = False
        self.ready = 0.0
        self.waited: Waited | None = None
        self.fruitful = False  # it has returned a result
        self.unfinished = 0  # items that it had when it last asked for more
        self.state: Any = None
        self.cause, self.trace = "", ""
        mine, its = socket.socketpair()
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "OMP_NUM_THREADS": str(threads),
        }
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        with its:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _PROGRAM, str(its.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=self._stderr,
                stderr=self._stderr,
                pass_fds=[its.fileno()],
                process_group=0,  # Ctrl-C goes to the run alone
                env=environment,
            )
        self.wire = Wire(mine)

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, *message: Any) -> None:
        """A process that has died does not get it; who reads its socket notices."""
        with suppress(OSError):
            self.wire.send(message)

    def why(self) -> str:
        """Waits for the end of the process. What it ended by, in words."""
        code = self._process.wait()
        if self.cause:
            return self.cause
        if code < 0:
            name = signal.Signals(-code).name
            return f"killed by {name}{' (out of host memory?)' if name == 'SIGKILL' else ''}"
        self._stderr.seek(max(os.fstat(self._stderr.fileno()).st_size - 4096, 0))
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        return f"ended with code {code}{f': {lines[-1].strip()}' if lines else ''}"

    def stop(self) -> None:
        """End the process, if it has not ended. No thread may use its socket afterwards, other than to receive."""
        self.wire.hang_up()
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()

    def close(self) -> None:
        """Free what is held here, once the process has ended and no thread uses its socket."""
        self.wire.close()
        self._stderr.close()
