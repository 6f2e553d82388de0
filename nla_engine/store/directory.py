"""Creating and replacing a whole store: one writer at a time, and a directory changes in one step.

Nothing is deleted unless it is certainly a store of this program.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from nla_engine.errors import DamageError, RequestError, StoreError
from nla_engine.sites import EMBEDDINGS
from nla_engine.store.lease import Lease
from nla_engine.store.manifest import METADATA_NAME, read_attributes
from nla_engine.store.objects import LOCK_NAME, ObjectLock, ObjectPath, Place
from nla_engine.store.shards import TEMPORARY_SUFFIX, make_directory, writing
from nla_engine.store.swap import aside_name, exists, put_in_place, remove_directory, staging_name

GROUP_NAMES = ("rows", "sequences", "vocabulary")


def check_parents(path: Path) -> None:
    """RequestError unless `path` can be made where it would lie: below a directory that this user may write to, and
    outside every store. Makes nothing, so that a command can ask before any work."""
    _check_place(path, path.absolute().parent)


def check_directory(out: Path) -> None:
    """RequestError unless files can be made in `out`, a directory that is there or can be made."""
    if out.exists() and not out.is_dir():
        raise RequestError(f"{out}: a file is in the way; choose another --out")
    _check_place(out, out.absolute())


def _check_place(path: Path, directory: Path) -> None:
    """RequestError unless this user may write to `directory`, or make it, and `path` is outside every store."""
    while not os.path.lexists(directory):
        directory = directory.parent
    if not os.path.isdir(directory):
        raise RequestError(f"{path}: {directory} is no directory: choose another name")
    if not os.access(directory, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise RequestError(f"{path}: no right to write in {directory}: choose another place")
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
def staged(path: Path, overwrite: bool) -> Iterator[tuple[Path, Lease]]:
    """A new directory beside `path`, and its lease. The body fills it; at the end it takes the name `path`.

    An existing store is replaced only then, in one step, and only with `overwrite`. If the body raises, the existing
    store is untouched and the new directory is removed. Raises StoreError if what `path` holds may not be replaced, or
    if it lies in another store.
    """
    check_parents(path)
    replaced = Lease.of_directory(path) if _is_replaced(path, overwrite) else None
    staging = staging_name(path)
    try:
        for leftover in (staging, aside_name(path)):
            _remove_leftover(leftover)
        try:
            with writing(staging):
                make_directory(staging)
            lease = Lease.of_directory(staging)
        except BaseException:
            with contextlib.suppress(OSError):
                staging.rmdir()  # only if it is empty: without the lease another process may own it by now
            raise
        made = staging.stat().st_ino
        try:
            yield staging, lease
            if replaced is not None:
                replaced.check()
            with writing(path):
                put_in_place(path, replaced is not None)
        except BaseException:
            with contextlib.suppress(OSError):
                if staging.exists() and staging.stat().st_ino == made:
                    remove_directory(staging, lease)
                else:  # it already has the name; the old one stays, since the rename may not be on disk yet
                    lease.moved(path)
            lease.release()
            raise
        lease.moved(path)
        if replaced is not None:
            replaced.moved(staging)
            with contextlib.suppress(OSError):
                remove_directory(staging, replaced)
    finally:
        if replaced is not None:
            replaced.release()


@contextlib.contextmanager
def emptied(root: ObjectPath, overwrite: bool) -> Iterator[ObjectLock]:
    """The lock of a place on an object store, which the body fills. The lock is still held after a normal exit.

    An object store has no rename: an old store is removed before the new one is written, its zarr.json first.
    Raises StoreError if what is there may not be replaced.
    """
    lock = ObjectLock(root)
    try:
        names = [name for name in root.names() if name != LOCK_NAME]
        _check_names(root, names, overwrite)
        for name in sorted(names, key=lambda name: name != METADATA_NAME):
            (root / name).unlink()
        yield lock
    except BaseException:
        lock.release()
        raise


def check_place(root: Place, overwrite: bool) -> None:
    """StoreError unless a new store may be written at `root`. For before any work: `staged`, `emptied` ask again."""
    if isinstance(root, Path):
        check_parents(root)
        _is_replaced(root, overwrite)
    elif root.exists():
        _check_names(root, [name for name in root.names() if name != LOCK_NAME], overwrite)


def _is_replaced(path: Path, overwrite: bool) -> bool:
    """Whether `path` holds a store to replace. StoreError if what it holds may not be replaced."""
    if not exists(path) or (path.is_dir() and not any(path.iterdir())):
        return False
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
    return True


def _check_names(root: ObjectPath, names: Sequence[str], overwrite: bool) -> None:
    """StoreError unless these names below `root` may be replaced."""
    if names and not overwrite:
        raise StoreError(f"{root} exists: pass --overwrite to replace it")
    if foreign := _foreign({name.split("/")[0] for name in names}):
        raise StoreError(
            f"{root}: holds '{foreign[0]}', which is no part of a store: not overwritten, move it first"
        )


def _foreign_names(path: Path) -> list[str]:
    return _foreign(os.listdir(path))


def _foreign(names: Iterable[str]) -> list[str]:
    """The names in a root that no store has."""
    known = {*GROUP_NAMES, EMBEDDINGS, METADATA_NAME, METADATA_NAME + TEMPORARY_SUFFIX, LOCK_NAME}
    return sorted(name for name in names if name not in known and not name.startswith("layer_"))


def _remove_leftover(path: Path) -> None:
    """Remove what a killed process left under a temporary name."""
    if path.exists():
        if foreign := _foreign_names(path):
            raise StoreError(
                f"{path}: in the way, and holds '{foreign[0]}', which is no part of a store: move it"
            )
        with writing(path):
            remove_directory(path, Lease.of_directory(path))  # refused while another process still uses it
