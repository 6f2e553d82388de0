"""One directory takes another's name. Whatever interrupts it, the name has the whole old one or the whole new one.

Where the system can, the two names are exchanged in one step. Elsewhere the old directory is put aside first; if the
new one never came, the next `exists` puts it back.
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
#: Errors of a kernel or file system that cannot exchange names.
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


def staging_name(path: Path) -> Path:
    """Where the new directory is filled, and where the old one lies after the exchange."""
    return path.with_name(f".{path.name}.nla-new")


def aside_name(path: Path) -> Path:
    """Where the old directory lies between two renames."""
    return path.with_name(f".{path.name}.nla-old")


def put_in_place(path: Path, replaces: bool) -> None:
    """Give the directory at `staging_name(path)` the name `path`, durably; what it replaces takes the staging name.

    The caller holds the leases of both, and nothing has the name `aside_name(path)`. If it raises OSError, neither is
    lost, and one of the two has the name `path`, or gets it at the next `exists`.
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
    """Whether anything has this name. A directory that a killed process had put aside gets its name back.

    StoreError while the process that put it aside still lives, WriteError if the name cannot be given back.
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
    """Remove a directory and release its lease, once its name is durable. Raises OSError."""
    fsync_directory(path.parent)  # or a power cut could give it back the name of what replaced it
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
