"""The errors that nla_engine raises. Each message names the thing, what is wrong with it and what to do.

The command line prints the message as one line and exits with `exit_code`.
"""

import errno


class NLAError(Exception):
    """Base of every error raised on purpose. The work failed (exit code 1)."""

    exit_code = 1

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows: the line that a command would print."""
        return [f"{type(self).__name__}: {self}"]


class EngineError(NLAError):
    """Generation or capture cannot continue: what was committed stays valid."""


class UnsupportedModel(EngineError):
    """The engine's own attention or blocks cannot run an architecture. transformers' own forward may (`library`)."""


class WriteError(NLAError):
    """A file could not be written (disk full, read-only directory): what was committed stays valid."""


class HubError(NLAError):
    """The Hub or the network failed, and the cache lacks the files: the same request may succeed later."""


class ReadError(NLAError):
    """An existing file could not be read: the disk or the network failed."""


class RequestError(NLAError):
    """The request itself is wrong: a bad option, file, checkpoint or layer (exit code 2)."""

    exit_code = 2


class CheckpointError(RequestError):
    """A model directory or its sidecar does not hold what its role needs."""


class PromptError(RequestError):
    """A prompt file or one of its records cannot be used."""


class StoreError(RequestError):
    """A store is missing, foreign, damaged, or does not fit the request."""


class HeldError(StoreError):
    """Another process is writing there."""


class DamageError(StoreError):
    """A store's bytes are not those that were written: `nla-engine verify` gives details (exit code 1)."""

    exit_code = 1


class FieldError(StoreError):
    """A name is no field of a store's rows."""


class RecordFieldError(FieldError):
    """No prompt record of the store has a field (yet)."""


class WhereError(RequestError):
    """A `--where` expression cannot be parsed or names an unknown field."""


class WhereRecordError(WhereError):
    """A `--where` expression asks for something that no prompt record of the store has (yet)."""


def already_there(path: object) -> str:
    """The message for a result that exists, if the run may neither resume nor replace it."""
    return f"{path}: exists; pass --resume to continue it or --overwrite to replace it"


def first_line(error: Exception) -> str:
    """The first line of a library's error message; its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


#: errno values for which the request is to blame. None: a library's own error about what a file holds.
_OF_THE_REQUEST = (
    None,
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EINVAL,
)


def is_failure(error: Exception) -> bool:
    """Whether a disk, a network or memory failed. False if a file is missing, forbidden or of the wrong kind."""
    return isinstance(error, OSError) and error.errno not in _OF_THE_REQUEST
