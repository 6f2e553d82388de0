"""Checkpoints by name: a local directory, or a repository of the Hugging Face Hub in the library's own cache."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Any

from nla_engine.errors import CheckpointError, HubError, NLAError, RequestError
from nla_engine.models.checkpoint import ADAPTER, CONFIG, check_form, read_json
from nla_engine.models.hub.faults import explained, unreachable
from nla_engine.models.hub.fetch import fetch, progress_bar, say
from nla_engine.models.hub.files import choose, is_whole, need_checkpoint

_COMMIT = re.compile("[0-9a-f]{40}")
#: The commit of a name and revision when this process first asked, so that sidecar and weights are of one commit.
_commits: dict[tuple[str, str | None], str] = {}


class _Gap(Exception):
    """Why the cache cannot be used."""


def find_directory(name: str, revision: str | None = None, *, remote_code: bool = False) -> Path:
    """The local directory of a checkpoint: `name` itself, or the snapshot of the Hub repository `name`, fetched whole.

    remote_code: fetch the repository's Python files as well
    Raises CheckpointError if there is none or it holds no weights that can be read, RequestError for a revision of a
    directory, HubError if the Hub cannot be reached or fails, WriteError if the cache cannot be written.
    """
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        if revision is not None:
            raise RequestError(f"{name}: is a directory, and has no revisions: leave --revision out")
        return Path(path)
    if os.path.exists(path) or not _is_id(name):
        raise CheckpointError(
            f"{name}: no such directory{_near(name)} (give a local directory or a Hub id like owner/name)"
        )
    asked = (name, revision)
    directory = _snapshot(name, _commits.get(asked, revision), remote_code)
    _commits[asked] = directory.name
    return directory


def commit_of(directory: Path) -> str | None:
    """The Hub commit of a snapshot directory (.../snapshots/<commit>); None for any other directory."""
    is_snapshot = directory.parent.name == "snapshots" and _COMMIT.fullmatch(directory.name)
    return directory.name if is_snapshot else None


def _snapshot(name: str, revision: str | None, remote_code: bool) -> Path:
    if _COMMIT.fullmatch(revision or ""):  # a commit never changes: a whole snapshot needs no network
        try:
            return _cached(name, revision, remote_code)
        except _Gap:
            pass
    try:
        directory, files = _listing(name, revision)
    except NLAError:
        raise
    except Exception as error:
        why = unreachable(error)
        if why is None:
            raise explained(error, name, revision, _near(name)) from error
        try:
            directory = _cached(name, revision, remote_code)
        except _Gap as gap:
            raise HubError(
                f"{name}: no such directory{_near(name)}; as a Hub id: {why}, and {gap}"
            ) from error
        say(f"{name}: {why}: taking commit {directory.name[:12]} from the cache")
        return directory
    check_form(directory, name)
    try:
        return fetch(name, directory, files, remote_code)
    except NLAError:
        raise
    except Exception as error:
        raise explained(error, name, revision) from error


def _listing(name: str, revision: str | None) -> tuple[Path, dict[str, int]]:
    """The snapshot directory of a revision, and the bytes of every file that its repository has."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.hf_api import RepoFile

    api = HfApi()
    info = api.model_info(name, revision=revision)  # the call below would silently fall back to the cache
    need_checkpoint(name, [file.rfilename for file in info.siblings or []])
    # This leaves the revision's commit and the list of files in the cache: they tell later whether a snapshot is whole.
    directory = Path(
        snapshot_download(
            name,
            revision=revision,
            allow_patterns=[CONFIG, ADAPTER],
            tqdm_class=progress_bar(shown=False),
        )
    )
    tree = api.list_repo_tree(name, recursive=True, revision=directory.name)
    return directory, {file.path: file.size for file in tree if isinstance(file, RepoFile)}


def _cached(name: str, revision: str | None, remote_code: bool) -> Path:
    """The snapshot in the cache, if every file that is loaded exists and has its size; else raises _Gap."""
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, LocalEntryNotFoundError

    try:
        directory = Path(
            snapshot_download(
                name, revision=revision, allow_patterns=[CONFIG, ADAPTER], local_files_only=True
            )
        )
        files = {file.path: file.size for file in get_cached_repo_tree(name, revision=directory.name)}
    except LocalEntryNotFoundError:
        raise _Gap("the cache has no whole snapshot of it: give a directory, or fetch it first") from None
    except CachedRepoTreeNotFoundError:
        raise _Gap(
            f"nothing in the cache says whether its snapshot is whole: if it is, give the directory {directory}"
        ) from None

    def read(file: str) -> dict[str, Any]:
        if not is_whole(directory / file, files[file]):
            raise _Gap(f"its snapshot in the cache lacks {file}: fetch the rest first")
        return read_json(directory / file)

    chosen = choose(name, files, read, remote_code=remote_code)
    missing = [file for file in chosen if not is_whole(directory / file, files[file])]
    if missing:
        raise _Gap(
            f"its snapshot in the cache lacks {missing[0]} ({len(missing)} of {len(chosen)} files): "
            "fetch the rest first"
        )
    return directory


def _is_id(name: str) -> bool:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def _near(name: str) -> str:
    """Directories with a name like that of a path that does not exist, for the error message."""
    path = Path(name)
    try:
        beside = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    except (OSError, ValueError):
        return ""
    return "".join(
        f"; there is {path.parent / near}" for near in difflib.get_close_matches(path.name, beside, 1)
    )
