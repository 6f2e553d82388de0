"""stdout and stderr of a command, for a reader that has gone, an encoding that lacks a character, and a full disk."""

from __future__ import annotations

import io
import os
import sys
from typing import Any

from nla_engine.errors import WriteError

#: Exit code when the reader of the output has closed it: what a shell gives for a command that SIGPIPE ended.
READER_GONE = 141


class _Output(io.FileIO):
    """A raw output stream. If its reader has closed it, the command ends silently, as SIGPIPE would end it.

    SIGPIPE itself stays ignored: it would also end a run whose connection to an object store breaks.
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
    """From now on, characters that the encoding lacks are written as escapes, and a closed pipe ends the command."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if type(stream) is io.TextIOWrapper:  # else it belongs to a test or a notebook
            stream.flush()
            setattr(sys, name, _watched(stream, prompt=name == "stderr"))


def _watched(stream: io.TextIOWrapper, prompt: bool) -> io.TextIOWrapper:
    """prompt: write each line as soon as it is complete."""
    return io.TextIOWrapper(
        io.BufferedWriter(_Output(stream.fileno(), "w", closefd=False)),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=prompt or stream.line_buffering or stream.write_through,
    )


def _drop(descriptor: int) -> None:
    """Discard what is written to it from now on, so that flushing it at exit does not fail again."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
