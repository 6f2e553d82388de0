"""Errors of the Hub and of the way to it, in one line that says what to do."""

from __future__ import annotations

import errno

from nla_engine.errors import CheckpointError, HubError, NLAError, WriteError, first_line

_LOG_IN = "log in (`hf auth login`, or HF_TOKEN)"


def unreachable(error: Exception) -> str | None:
    """Why the Hub cannot answer now, so that the cache may be used instead; None if it did answer."""
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    error = _cause(error)
    status = _status(error)
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if status == 429:
        return f"the Hub takes no more requests for now (429: wait a few minutes, or {_LOG_IN})"
    if status is not None:
        return f"the Hub fails for now ({status}: try again later)" if status >= 500 else None
    if isinstance(error, HTTPError | ConnectionError | TimeoutError):
        return f"the Hub cannot be reached ({first_line(error)}: is there a network, a proxy, HF_ENDPOINT?)"
    return None


def explained(error: Exception, name: str, revision: str | None, near: str = "") -> NLAError:
    """The error to raise for one of huggingface_hub's. near: a hint at a directory with a similar name."""
    from huggingface_hub import constants, errors, get_token

    error = _cause(error)
    page, status = f"{constants.ENDPOINT}/{name}", _status(error)
    if isinstance(error, errors.GatedRepoError):
        return CheckpointError(
            f"{name}: is gated: accept its licence at {page}, and {_LOG_IN} as the user who did"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return CheckpointError(
            f"{name}: has no revision {revision!r}: give a branch, tag or commit of {page}"
        )
    if isinstance(error, errors.DisabledRepoError):
        return CheckpointError(f"{name}: its access is disabled on the Hub: see {page}")
    stranger = status == 401 and get_token() is None  # the Hub hides private models from anonymous users
    if stranger or isinstance(error, errors.RepositoryNotFoundError):
        return CheckpointError(
            f"{name}: no such directory{near}, and no such model on the Hub: mend the path or the id; "
            f"if the model is private, {_LOG_IN}"
        )
    if status == 401:
        return CheckpointError(f"{name}: the Hub does not take your token (401): {_LOG_IN} again")
    if status == 403:
        return CheckpointError(
            f"{name}: your token may not read it (403): allow that in the token's settings, or {_LOG_IN}"
        )
    if why := unreachable(error):
        return HubError(f"{name}: {why}; the same command continues with the files that are whole by now")
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT):
        return WriteError(
            f"{name}: the disk of {constants.HF_HUB_CACHE} is full: free some, or set HF_HOME to a directory "
            "on a larger one"
        )
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return WriteError(
            f"{name}: {constants.HF_HUB_CACHE} cannot be written ({first_line(error)}): "
            "set HF_HOME to a directory that can"
        )
    return HubError(
        f"{name}: was not fetched whole ({first_line(error)}): run the same command again, "
        "it continues with the files that are whole by now"
    )


def _cause(error: Exception) -> Exception:
    """The Hub's error, if the library's own only says that the cache lacks the file."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    cause = error.__cause__
    return cause if isinstance(error, LocalEntryNotFoundError) and isinstance(cause, Exception) else error


def _status(error: Exception) -> int | None:
    """The status of the Hub's answer, if it gave one."""
    return getattr(getattr(error, "response", None), "status_code", None)
