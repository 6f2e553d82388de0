"""Worker processes that start at once: forked from a process that has already imported what they import for seconds.

For tests of what workers do. That a process starts as it does for users is tested in tests/workers, and by the tests
that start the whole command.
"""

from __future__ import annotations

import fcntl
import gc
import importlib
import json
import os
import random
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch

#: What workers import.
MODULES = (
    "transformers.models.auto.modeling_auto",
    "transformers.models.qwen2.modeling_qwen2",
    "nla_engine.capture.run",
    "nla_engine.roundtrip.parallel",
    "nla_engine.engine.follower",
)
_PROGRAM = "import fork_server; fork_server.serve()"
_NUMBER = struct.Struct("q")


class Server:
    """The process that is forked."""

    def __init__(self) -> None:
        self._line, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        paths = [str(Path(__file__).parent), *filter(None, sys.path)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        with its:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, str(its.fileno())], pass_fds=[its.fileno()], env=environment
            )

    def start(self, request: dict[str, Any], files: list[int]) -> socket.socket:
        """Fork. files: that the request names. Returns a line that tells the process's id, and later how it ended."""
        told, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its:
            socket.send_fds(self._line, [json.dumps(request).encode()], [its.fileno(), *files])
        return told

    def close(self) -> None:
        self._line.close()
        self._process.wait(120)


class Forked:
    """What `subprocess.Popen` is to the code that starts a worker."""

    def __init__(
        self,
        server: Server,
        arguments: list[str],
        *,
        env: dict[str, str],
        stdin: Any = None,
        stdout: Any = None,
        stderr: Any = None,
        pass_fds: tuple[int, ...] = (),
        process_group: int | None = None,
        start_new_session: bool = False,
    ) -> None:
        assert arguments[0] == sys.executable and "-c" in arguments
        self.stdin: Any = None
        opened: list[int] = []
        if stdin == subprocess.PIPE:
            reading, writing = os.pipe()
            opened.append(reading)
            self.stdin = os.fdopen(writing, "wb")
        else:
            opened.append(os.open(os.devnull, os.O_RDONLY))
        for number, stream in ((1, stdout), (2, stderr)):
            opened.append(os.dup(number if stream is None else stream.fileno()))
        code, *rest = arguments[arguments.index("-c") + 1 :]
        request = {
            "code": code,
            "arguments": ["-c", *rest],
            "environment": env,
            "directory": os.getcwd(),
            "files": [0, 1, 2, *pass_fds],
            "group": process_group,
            "session": start_new_session,
        }
        self._told = server.start(request, [*opened, *pass_fds])
        for file in opened:
            os.close(file)
        self._lock = threading.Lock()
        self.returncode: int | None = None
        (self.pid,) = _NUMBER.unpack(self._told.recv(_NUMBER.size))

    def __del__(self) -> None:
        if hasattr(self, "_told"):
            self._told.close()

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            left = None if end is None else max(end - time.monotonic(), 0)
            if not select.select([self._told], [], [], left)[0]:
                raise subprocess.TimeoutExpired(["forked"], timeout or 0)
        return code

    def poll(self) -> int | None:
        with self._lock:
            if self.returncode is None and select.select([self._told], [], [], 0)[0]:
                (status,) = _NUMBER.unpack(self._told.recv(_NUMBER.size))
                self.returncode = os.waitstatus_to_exitcode(status)
            return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


def serve() -> None:
    """The program of `Server`: forks until its line closes."""
    line = socket.socket(fileno=int(sys.argv[-1]))
    for name in MODULES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    threads = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
    assert set(threads[1:]) <= {"jemalloc_bg_thd"}, (
        f"{threads}: threads do not survive a fork"
    )  # that one may
    running: dict[int, tuple[int, socket.socket]] = {}  # process and its line, by what tells of its end
    while True:
        for ready in select.select([line, *running], [], [])[0]:
            if ready in running:
                pid, told = running.pop(ready)
                _tell(told, os.waitpid(pid, 0)[1])
                told.close()
                os.close(ready)
                continue
            data, files, _, _ = socket.recv_fds(line, 1 << 20, 64)
            if not data:
                os._exit(0)
            told = socket.socket(fileno=files[0])
            if not (pid := os.fork()):
                for _, its in running.values():
                    its.close()
                line.close()
                told.close()
                _become(json.loads(data), files[1:])
            for file in files[1:]:
                os.close(file)
            running[os.pidfd_open(pid)] = pid, told
            _tell(told, pid)


def _tell(told: socket.socket, number: int) -> None:
    try:
        told.send(_NUMBER.pack(number))
    except OSError:
        return  # nobody asks any more


def _become(request: dict[str, Any], files: list[int]) -> None:
    """Be the process that was asked for. Does not return."""
    code = 1
    try:
        above = max(request["files"]) + 1
        away = [_moved(file, above) for file in files]
        for number, file in zip(request["files"], away, strict=True):
            os.dup2(file, number, inheritable=True)
            os.close(file)
        if request["session"]:
            os.setsid()
        elif request["group"] is not None:
            os.setpgid(0, request["group"])
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["directory"])
        sys.argv[:] = request["arguments"]
        sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        random.seed()
        np.random.seed()  # noqa: NPY002
        exec(compile(request["code"], "<forked>", "exec"), {"__name__": "__main__"})
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _moved(file: int, above: int) -> int:
    """The file under a number that is not needed for another one."""
    moved = fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, above)
    os.close(file)
    return moved
