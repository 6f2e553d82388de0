"""One directory takes another's name. Whatever stops it, the whole old one or the whole new one stands there.

Two names are exchanged in one step where the system can. Elsewhere the old directory is put aside first; whoever next
asks for the name puts it back if the new one never came.
Knows nothing of what a directory holds.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
from pathlib import Path

from nla_engine.store.interrupt import interrupt_held
from nla_engine.store.lease import Lease
from nla_engine.store.objects import Place
from nla_engine.store.shards import fsync_directory, writing

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
#: What a kernel or a file system says that cannot exchange names.
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


def staging_name(path: Path) -> Path:
    """Where a directory is filled that is to be `path`, and where the old one lies when it has the name."""
    return path.with_name(f".{path.name}.nla-new")


def aside_name(path: Path) -> Path:
    """Where the old directory lies between two renames."""
    return path.with_name(f".{path.name}.nla-old")


def put_in_place(path: Path, replaces: bool) -> None:
    """The directory at `staging_name(path)` is `path` from now on, durably; what it replaces lies where it lay.

    The caller holds the leases of both, and nothing has the name `aside_name(path)`. Raises OSError: then neither is
    gone, and one of the two stands under the name `path`, or will at the next look.
    """
    staging, aside = staging_name(path), aside_name(path)
    with interrupt_held():
        if not replaces:
            os.rename(staging, path)
        elif not exchange(staging, path):
            os.rename(path, aside)
            try:
                os.rename(staging, path)
            except BaseException:
                os.rename(aside, path)
                raise
            fsync_directory(path.parent)
            os.rename(aside, staging)
        fsync_directory(path.parent)


def exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step; False if this system or this file system cannot. Raises OSError."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    names = [argument for path in (first, second) for argument in (_AT_FDCWD, os.fsencode(path))]
    if renameat2(*names, _RENAME_EXCHANGE) == 0:
        return True
    error = ctypes.get_errno()
    if error in _CANNOT:
        return False
    raise OSError(error, os.strerror(error), str(second))


def exists(root: Place) -> bool:
    """Whether there is anything under this name; a directory that a killed process had put aside gets it back.

    StoreError while the process that put it aside still lives, WriteError if it cannot be given its name.
    """
    if not isinstance(root, Path):
        return root.exists()
    if root.exists():
        return True
    aside = aside_name(root)
    if root.is_symlink() or not aside.is_dir():
        return False
    with writing(root), Lease.of_directory(aside) as lease:
        if not root.exists():
            os.rename(aside, root)
            lease.moved(root)
            fsync_directory(root.parent)
    return True


def remove_directory(path: Path, lease: Lease) -> None:
    """Remove a directory and let its lease go; nothing of it is removed before its name is settled. OSError."""
    fsync_directory(path.parent)  # a power cut must not give it back the name of what replaced it
    try:
        for name in os.listdir(path):
            if (path / name).is_dir() and not (path / name).is_symlink():
                shutil.rmtree(path / name)
            elif path / name != lease.file:
                (path / name).unlink()
    finally:
        lease.release()
    with contextlib.suppress(OSError):  # another process has begun to write there
        path.rmdir()
