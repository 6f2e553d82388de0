"""A store's place as a whole: one writer at a time; a directory is created and replaced in one step.

Nothing is ever deleted that might not be a store of ours.
Knows nothing of what lies inside beyond the names that a store may hold.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from nla_engine.errors import DamageError, StoreError, WriteError
from nla_engine.store.manifest import METADATA_NAME, read_attributes
from nla_engine.store.objects import LOCK_NAME, ObjectLock, ObjectPath
from nla_engine.store.shards import TEMPORARY_SUFFIX, fsync_directory, make_directory, writing

GROUP_NAMES = ("rows", "sequences", "vocabulary")


class DirectoryLock:
    """The right to write a store: `flock` on its directory. No lock file; a dead writer holds nothing."""

    def __init__(self, path: Path) -> None:
        """Raises StoreError when another process (or another writer of this one) holds it."""
        with writing(path):
            self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found = os.stat(path)
            ours = os.fstat(self._fd)
            if (found.st_dev, found.st_ino) != (ours.st_dev, ours.st_ino):
                raise BlockingIOError  # it was replaced between open and lock
        except (BlockingIOError, FileNotFoundError):
            self.release()
            raise StoreError(
                f"{path}: another process is writing this store: wait for it or end it"
            ) from None
        except OSError as error:
            self.release()
            raise WriteError(f"{path}: cannot be locked: {error.strerror}") from error

    def release(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def has_writer(path: Path) -> bool:
    """Whether a process holds the right to write the store at this moment."""
    with writing(path):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def check_outside_stores(path: Path) -> None:
    """Raises StoreError if `path` would lie in a directory that is a store: it would be no part of it."""
    for parent in path.resolve().parents:
        if _is_store(parent):
            raise StoreError(f"{path}: lies inside the store {parent}: choose a place outside")


def _is_store(path: Path) -> bool:
    try:
        read_attributes(path)
    except DamageError:
        return True
    except StoreError:
        return False
    return True


@contextlib.contextmanager
def staged(path: Path, overwrite: bool) -> Iterator[tuple[Path, DirectoryLock]]:
    """A new locked directory beside `path`, to be filled inside; on leaving it takes the name `path`.

    An existing store is replaced only at that moment and only with `overwrite`; when the body raises, it is
    untouched and the new directory is gone. Raises StoreError when what `path` holds may not be replaced, or it
    lies in another store.
    """
    check_outside_stores(path)
    replaced = _lock_replaceable(path, overwrite)
    staging, aside = path.with_name(f".{path.name}.nla-new"), path.with_name(f".{path.name}.nla-old")
    try:
        _remove_leftover(staging)
        try:
            with writing(staging):
                make_directory(staging)
            lock = DirectoryLock(staging)
        except BaseException:
            with contextlib.suppress(OSError):
                staging.rmdir()  # empty ones alone: without the lock it may be another process's by now
            raise
        try:
            yield staging, lock
            with writing(path):
                if replaced is not None:
                    _remove_leftover(aside)
                    os.rename(path, aside)
                os.rename(staging, path)
                fsync_directory(path.parent)
        except BaseException:
            lock.release()
            shutil.rmtree(staging, ignore_errors=True)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        if replaced is not None:
            replaced.release()


@contextlib.contextmanager
def emptied(root: ObjectPath, overwrite: bool) -> Iterator[ObjectLock]:
    """The lock of a place on an object store, to be filled inside; the lock is still held on leaving normally.

    There is no rename there: an old store is removed before the new one is written, its zarr.json first.
    Raises StoreError when what is there may not be replaced.
    """
    lock = ObjectLock(root)
    try:
        names = [name for name in root.names() if name != LOCK_NAME]
        if names and not overwrite:
            raise StoreError(f"{root} exists: pass --overwrite to replace it")
        if foreign := _foreign({name.split("/")[0] for name in names}):
            raise StoreError(
                f"{root}: holds '{foreign[0]}', which is no part of a store: not overwritten, move it first"
            )
        for name in sorted(names, key=lambda name: name != METADATA_NAME):
            (root / name).unlink()
        yield lock
    except BaseException:
        lock.release()
        raise


def _lock_replaceable(path: Path, overwrite: bool) -> DirectoryLock | None:
    """The lock of the store that is to be replaced; None when nothing is there."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return None
    if not path.is_dir():
        raise StoreError(f"{path}: a file is in the way: choose another name")
    if not overwrite:
        raise StoreError(f"{path} exists: pass --overwrite to replace it")
    try:
        read_attributes(path)
    except StoreError as error:
        raise StoreError(f"{error}; not overwritten: choose another name") from None
    if foreign := _foreign_names(path):
        raise StoreError(
            f"{path}: holds '{foreign[0]}', which is no part of a store: not overwritten, move it first"
        )
    return DirectoryLock(path)


def _foreign_names(path: Path) -> list[str]:
    return _foreign(os.listdir(path))


def _foreign(names: Iterable[str]) -> list[str]:
    """Those of the names in a root that no store holds."""
    known = {*GROUP_NAMES, METADATA_NAME, METADATA_NAME + TEMPORARY_SUFFIX}
    return sorted(name for name in names if name not in known and not name.startswith("layer_"))


def _remove_leftover(path: Path) -> None:
    """Remove what a killed process left under one of our own temporary names."""
    if path.exists():
        if foreign := _foreign_names(path):
            raise StoreError(
                f"{path}: in the way, and holds '{foreign[0]}', which is no part of a store: move it"
            )
        DirectoryLock(path).release()  # refuse while another process is still at it
        with writing(path):
            shutil.rmtree(path)
