"""Checkpoints by name: a local directory, or a repository of the Hugging Face Hub in the library's own cache."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Any

from nla_engine.errors import CheckpointError, HubError, NLAError, RequestError
from nla_engine.models.adapters.form import AR_META, find_adapter
from nla_engine.models.checkpoint import ADAPTER, CONFIG, check_form, is_heads_alone, read_json
from nla_engine.models.hub.faults import explained, unreachable
from nla_engine.models.hub.fetch import fetch, progress_bar, say
from nla_engine.models.hub.files import choose, is_whole, need_checkpoint
from nla_engine.models.hub.place import Place

_COMMIT = re.compile("[0-9a-f]{40}")
#: The commit of a name and revision when this process first asked, so that sidecar and weights are of one commit.
_commits: dict[tuple[str, str | None], str] = {}


class _Gap(Exception):
    """Why the cache cannot be used."""


def find_directory(name: str, revision: str | None = None, *, remote_code: bool = False) -> Path:
    """The local directory of a checkpoint: `name` itself, or that of a Hub repository or of a folder in one.

    From the Hub, every file that is loaded is fetched, of a folder only that folder's.
    remote_code: fetch the repository's Python files as well
    Raises CheckpointError if there is none or it holds no weights that can be read, RequestError for a revision of a
    directory, HubError if the Hub cannot be reached or fails, WriteError if the cache cannot be written.
    """
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        if revision is not None:
            raise RequestError(f"{name}: is a directory, and has no revisions: leave --revision out")
        return Path(path)
    place = Place.parse(name)
    if place is not None and place.folder and os.path.isdir(place.repository):
        place = None  # a local path with a typing error
    if os.path.exists(path) or place is None:
        raise CheckpointError(
            f"{name}: no such directory{_near(name)} (give a local directory or a Hub id like owner/name)"
        )
    asked = (place.repository, revision)
    root = _snapshot(place, _commits.get(asked, revision), remote_code)
    _commits[asked] = root.name
    return root / place.folder


def commit_of(directory: Path) -> str | None:
    """The Hub commit of a directory in a snapshot (.../snapshots/<commit>/...); None for any other directory."""
    for place in (directory, *directory.parents):
        if place.parent.name == "snapshots" and _COMMIT.fullmatch(place.name):
            return place.name
    return None


def listed(directory: Path) -> tuple[str | None, list[str]]:
    """The repository of a directory in a snapshot, None for any other, and the files there, fetched or not."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    commit = commit_of(directory)
    if commit is None:
        return None, os.listdir(directory)
    root = next(place for place in (directory, *directory.parents) if place.name == commit)
    repository = root.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
    folder = directory.relative_to(root).as_posix()
    place = Place(repository, "" if folder == "." else folder)
    try:
        tree = get_cached_repo_tree(repository, revision=commit)
    except CachedRepoTreeNotFoundError:
        return repository, os.listdir(directory)
    return repository, list(place.inside({file.path: file.size for file in tree}))


def _snapshot(place: Place, revision: str | None, remote_code: bool) -> Path:
    name = str(place)
    if _COMMIT.fullmatch(revision or ""):  # a commit never changes: a whole snapshot needs no network
        try:
            return _cached(place, revision, remote_code)
        except _Gap:
            pass
    try:
        root, files = _listing(place, revision)
    except NLAError:
        raise
    except Exception as error:
        why = unreachable(error)
        if why is None:
            raise explained(error, place.repository, revision, _near(name)) from error
        try:
            root = _cached(place, revision, remote_code)
        except _Gap as gap:
            raise HubError(
                f"{name}: no such directory{_near(name)}; as a Hub id: {why}, and {gap}"
            ) from error
        say(f"{name}: {why}: taking commit {root.name[:12]} from the cache")
        return root
    if find_adapter(root / place.folder, name, files) is None and not is_heads_alone(files):
        check_form(root / place.folder, name)
    try:
        fetch(place, root, files, remote_code)
    except NLAError:
        raise
    except Exception as error:
        raise explained(error, name, revision) from error
    return root


def _listing(place: Place, revision: str | None) -> tuple[Path, dict[str, int]]:
    """The snapshot of a revision, and the bytes of every file in the place."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.hf_api import RepoFile

    api = HfApi()
    info = api.model_info(
        place.repository, revision=revision
    )  # the call below would silently fall back to the cache
    there = {file.rfilename: 0 for file in info.siblings or []}
    if not (inside := place.inside(there)):
        folders = sorted({file.rpartition("/")[0] for file in there} - {""})
        raise CheckpointError(
            f"{place}: {place.repository} has no folder {place.folder}: "
            + (f"it has {', '.join(folders[:8])}" if folders else "it has none, leave it out")
        )
    need_checkpoint(str(place), list(inside))
    # This leaves the revision's commit and the list of files in the cache: they tell later whether a snapshot is whole.
    root = Path(
        snapshot_download(
            place.repository,
            revision=revision,
            allow_patterns=_small(place),
            tqdm_class=progress_bar(shown=False),
        )
    )
    tree = api.list_repo_tree(place.repository, recursive=True, revision=root.name)
    return root, place.inside({file.path: file.size for file in tree if isinstance(file, RepoFile)})


def _small(place: Place) -> list[str]:
    """The files that say of what form a checkpoint is."""
    return [place.path(file) for file in (CONFIG, ADAPTER, AR_META)]


def _cached(place: Place, revision: str | None, remote_code: bool) -> Path:
    """The snapshot in the cache, if every file that is loaded exists and has its size; else raises _Gap."""
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, LocalEntryNotFoundError

    name = place.repository
    try:
        root = Path(
            snapshot_download(name, revision=revision, allow_patterns=_small(place), local_files_only=True)
        )
        tree = {file.path: file.size for file in get_cached_repo_tree(name, revision=root.name)}
    except LocalEntryNotFoundError:
        raise _Gap("the cache has no whole snapshot of it: give a directory, or fetch it first") from None
    except CachedRepoTreeNotFoundError:
        raise _Gap(
            "nothing in the cache says whether its snapshot is whole: "
            f"if it is, give the directory {root / place.folder}"
        ) from None
    files, directory = place.inside(tree), root / place.folder

    def read(file: str) -> dict[str, Any]:
        if not is_whole(directory / file, files[file]):
            raise _Gap(f"its snapshot in the cache lacks {file}: fetch the rest first")
        return read_json(directory / file)

    chosen = choose(str(place), files, read, remote_code=remote_code)
    missing = [file for file in chosen if not is_whole(directory / file, files[file])]
    if missing:
        raise _Gap(
            f"its snapshot in the cache lacks {missing[0]} ({len(missing)} of {len(chosen)} files): "
            "fetch the rest first"
        )
    return root


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
