"""Files of one commit into the cache: what that costs is said before, room is asked for, a bar is shown."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from nla_engine.errors import HubError, WriteError
from nla_engine.models.checkpoint import read_json
from nla_engine.models.hub.files import choose, is_whole
from nla_engine.models.hub.place import Place

#: A bar by its unit: yields progress(done, total).
Progress = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]
_THREADS = 8

_announce: Callable[[str], None] = lambda text: None  # noqa: E731
_progress: Progress | None = None


class _Stopped(Exception):
    """Ends a download that is no longer wanted."""


def tell(announce: Callable[[str], None], progress: Progress) -> None:
    """Announce downloads and show their progress with these. Without them huggingface_hub shows its own bars."""
    global _announce, _progress
    _announce, _progress = announce, progress


def say(text: str) -> None:
    """One line for people."""
    _announce(text)


def fetch(place: Place, root: Path, files: Mapping[str, int], remote_code: bool) -> Path:
    """Fetch every file that is loaded into the snapshot `root`: the directory of `place`. Announces the size first.

    files: bytes by path, from the place on
    """
    from huggingface_hub import hf_hub_download

    name, directory = str(place), root / place.folder

    def get(file: str, **how: Any) -> Any:
        broken = (directory / file).exists() and not is_whole(directory / file, files[file])
        return hf_hub_download(
            place.repository, place.path(file), revision=root.name, force_download=broken, **how
        )

    chosen = choose(
        name,
        files,
        lambda file: read_json(Path(get(file, tqdm_class=progress_bar(shown=False)))),
        remote_code=remote_code,
    )
    absent = [file for file in chosen if not is_whole(directory / file, files[file])]
    if not absent:
        return directory
    with ThreadPoolExecutor(_THREADS) as pool:  # the cache may have the same bytes from another commit
        plan = pool.map(lambda file: get(file, dry_run=True), absent)
        needed = sum(files[file] for file, planned in zip(absent, plan, strict=True) if planned.will_download)
    _check_room(name, needed)
    whole = sum(files[file] for file in chosen)
    _announce(
        f"{name} (commit {root.name[:12]}): {len(chosen)} files, {_size(whole)}; "
        f"{_size(needed)} to fetch, {_size(whole - needed)} in the cache"
    )
    _download(get, absent, needed)
    for file in chosen:
        if not is_whole(directory / file, files[file]):
            raise HubError(f"{directory / file}: is not {files[file]:,} bytes long: delete it, and run again")
    return directory


def _download(get: Callable[..., Any], files: list[str], needed: int) -> None:
    """Fetch several files at a time. An error or Ctrl-C stops all of them; whole files stay."""
    stop = threading.Event()
    with nullcontext() if _progress is None else _progress("MiB") as update:
        bar = progress_bar(shown=update is None, stop=stop, update=update, needed=needed)
        pool = ThreadPoolExecutor(_THREADS)
        try:
            for done in as_completed([pool.submit(get, file, tqdm_class=bar) for file in files]):
                done.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def progress_bar(
    *,
    shown: bool,
    stop: threading.Event | None = None,
    update: Callable[[int, int], None] | None = None,
    needed: int = 0,
) -> type:
    """A class of progress bars for huggingface_hub, one for each file: shown, or adding up to `update(MiB, MiB)`."""
    from huggingface_hub.utils import tqdm

    lock, fetched = threading.Lock(), 0

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options if shown else {**options, "disable": True})
            self._count(options.get("initial") or 0)  # bytes that an earlier run left

        def _count(self, size: float) -> None:
            nonlocal fetched
            if stop is not None and stop.is_set():
                raise _Stopped
            if update is not None:
                with lock:
                    fetched += int(size)
                    update(fetched >> 20, needed >> 20)

        def update(self, n: float | None = 1) -> bool | None:
            self._count(n or 0)
            return super().update(n)

        def update_transfer(self, n: float | None = 1) -> None:
            """Bytes received. `update` counts them once they are on the disk."""

        def set_transfer_postfix_str(self, text: str, refresh: bool = False) -> None:
            """The transfer rate; not shown."""

    return Bar


def _check_room(name: str, needed: int) -> None:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    free = shutil.disk_usage(next(place for place in (cache, *cache.parents) if place.is_dir())).free
    if needed > free:
        raise WriteError(
            f"{name}: {_size(needed)} to fetch, {_size(free)} free on the disk of {cache}: "
            "free some, or set HF_HOME to a directory on a larger one"
        )


def _size(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 1 << 30 else f"{size / 2**20:.1f} MiB"
