"""stdout and stderr of a command: a reader may have gone, an encoding may lack a sign, a disk may be full."""

from __future__ import annotations

import io
import os
import sys
from typing import Any

from nla_engine.errors import WriteError

#: Exit code where the reader of the output closed it: what a shell says of a command that SIGPIPE ended.
READER_GONE = 141


class _Output(io.FileIO):
    """Where output goes. A reader that closed it ends the command without a word, as the signal would.

    The signal itself stays off: it would also end a run whose connection to an object store breaks.
    """

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            _drop(self.fileno())
            raise SystemExit(READER_GONE) from None
        except OSError as error:
            _drop(self.fileno())
            raise WriteError(f"the output could not be written: {error.strerror}") from error


def watch_streams() -> None:
    """From now on: signs that an encoding lacks are written as escapes, and a closed pipe ends the command."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if type(stream) is io.TextIOWrapper:  # else somebody else's, such as a test's or a notebook's
            stream.flush()
            setattr(sys, name, _watched(stream, prompt=name == "stderr"))


def _watched(stream: io.TextIOWrapper, prompt: bool) -> io.TextIOWrapper:
    """prompt: a line is written as soon as it is whole."""
    return io.TextIOWrapper(
        io.BufferedWriter(_Output(stream.fileno(), "w", closefd=False)),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=prompt or stream.line_buffering or stream.write_through,
    )


def _drop(descriptor: int) -> None:
    """Let what is written to it from now on vanish, so that nothing fails a second time at the end of the process."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
