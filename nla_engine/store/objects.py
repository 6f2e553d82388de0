"""A store's place on an object store (S3 and the like), reached through zarr's own store interface.

An object is put whole or not at all, and is durable when the call returns. So a commit is one put of the root's
zarr.json. There is no rename, and no lock that ends with its process.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Coroutine
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from nla_engine.errors import HeldError, StoreError, WriteError, first_line

if TYPE_CHECKING:  # a store on a disk is read without importing zarr
    from zarr.abc.store import Store
    from zarr.core.buffer import Buffer

LOCK_NAME = ".nla-writer"
#: Between commits, a writer checks this often that it still holds the store.
CHECK_SECONDS = 2.0
#: Most characters of a library's error that are repeated.
_LONGEST_REASON = 300
_T = TypeVar("_T")


class ObjectPath:
    """A key of an object store, with the few methods of `pathlib.Path` that a store needs. Errors are OSErrors."""

    def __init__(self, store: Store, url: str, key: str = "") -> None:
        """store: its keys are relative to `url`."""
        self._store, self._url, self._key = store, url, key

    @classmethod
    def open(cls, url: str) -> ObjectPath:
        """The place that `url` names; region, credentials and endpoint come from the environment (AWS_...).

        Raises StoreError when it cannot be reached that way.
        """
        try:
            import obstore.store
            from zarr.storage import ObjectStore
        except ImportError:
            raise StoreError(
                f"{url}: object stores need obstore: pip install '.[s3]' in a checkout"
            ) from None
        try:
            return cls(ObjectStore(obstore.store.from_url(url)), url.rstrip("/"))
        except Exception as error:  # obstore's own, and ValueError for a scheme it does not know
            raise StoreError(f"{url}: cannot be reached: {first_line(error)[:_LONGEST_REASON]}") from None

    def __truediv__(self, key: str) -> ObjectPath:
        return type(self)(self._store, self._url, f"{self._key}/{key}".lstrip("/"))

    def __str__(self) -> str:
        return f"{self._url}/{self._key}".rstrip("/")

    def read_bytes(self) -> bytes:
        """The whole object."""
        return self._get()

    def size(self) -> int:
        """Bytes of the object."""
        return self._run(self._store.getsize(self._key))

    def read_range(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop), fewer if the object ends before."""
        return self._get((start, stop))

    def write_bytes(self, data: bytes | memoryview) -> None:
        """Put the object, whole or not at all."""
        self._run(self._store.set(self._key, _buffer(data)))

    def create(self, data: bytes) -> bool:
        """Put the object unless one exists; False if another one does. One conditional request."""
        self._run(self._store.set_if_not_exists(self._key, _buffer(data)))
        return self.read_bytes() == data

    def unlink(self) -> None:
        """Delete the object if it exists."""
        self._run(self._store.delete(self._key))

    def names(self) -> list[str]:
        """The keys below this one, relative to it, sorted."""

        async def collect() -> list[str]:
            return [key async for key in self._store.list_prefix(self._prefix)]

        return sorted(key.removeprefix(self._prefix) for key in self._run(collect()))

    @property
    def name(self) -> str:
        """The last part of the key or URL."""
        return str(self).rsplit("/", 1)[-1]

    def exists(self) -> bool:
        """Whether there is anything here or below: one request. StoreError if the object store cannot be reached."""

        async def first() -> str | None:
            async for key in self._store.list_prefix(self._prefix):
                return key
            return None

        try:
            return self._run(first()) is not None
        except OSError as error:
            raise StoreError(
                f"{self}: cannot be reached: {error.strerror}: are AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, "
                "AWS_REGION and, beside Amazon's own, AWS_ENDPOINT_URL set?"
            ) from error

    @property
    def _prefix(self) -> str:
        """What the keys below this one begin with."""
        return f"{self._key}/" if self._key else ""

    def _get(self, part: tuple[int, int] | None = None) -> bytes:
        from zarr.abc.store import RangeByteRequest
        from zarr.core.buffer import default_buffer_prototype

        request = RangeByteRequest(*part) if part else None
        found = self._run(self._store.get(self._key, default_buffer_prototype(), request))
        if found is None:
            raise FileNotFoundError(errno.ENOENT, "there is no such object", str(self))
        return found.to_bytes()

    def _run(self, request: Coroutine[Any, Any, _T]) -> _T:
        from zarr.core.sync import sync

        try:
            return sync(request)
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, "there is no such object or bucket", str(self)) from None
        except Exception as error:  # each kind of object store has its own errors
            raise OSError(errno.EIO, first_line(error)[:_LONGEST_REASON], str(self)) from error


#: Where a store's files are.
Place = Path | ObjectPath


def place(path: str | os.PathLike[str] | ObjectPath) -> Place:
    """A directory, or with a scheme (s3://bucket/run.zarr) a place on an object store."""
    if isinstance(path, ObjectPath):
        return path
    name = os.fspath(path)
    return ObjectPath.open(name) if "://" in name else Path(name)


class ObjectLock:
    """The right to write a store: an object that only one writer can create. A killed writer leaves it behind."""

    def __init__(self, root: ObjectPath) -> None:
        """Raises StoreError, naming the holder, if there is one. An OSError is left to the caller."""
        self._object = root / LOCK_NAME
        holder = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
            "token": os.urandom(8).hex(),
        }
        self._data = json.dumps(holder).encode()
        self._checked = time.monotonic()
        self._held = self._object.create(self._data)
        if not self._held:
            remove = (
                f"aws s3 rm {self._object}" if str(root).startswith("s3://") else f"delete {self._object}"
            )
            raise HeldError(
                f"{root}: another process is writing this store, or was killed: {_holder(self._object.read_bytes())}: "
                f"wait for it; if it is dead, remove its lock: {remove}"
            )

    def check(self) -> None:
        """WriteError if the lock was taken away, so that a writer that was taken for dead commits nothing."""
        self._checked = time.monotonic()
        try:
            self._held = self._object.read_bytes() == self._data
        except FileNotFoundError:
            self._held = False
        if not self._held:
            raise WriteError(
                f"{self._object}: deleted or replaced while this process was writing: nothing is committed"
            )

    def check_sometimes(self) -> None:
        """`check`, which is a request, unless the last check was less than CHECK_SECONDS ago."""
        if time.monotonic() - self._checked >= CHECK_SECONDS:
            self.check()

    def release(self) -> None:
        with contextlib.suppress(OSError, WriteError):  # if it stays, the next writer's error names it
            if self._held:
                self.check()
                self._object.unlink()
        self._held = False


def _holder(lock: bytes) -> str:
    """In words, who holds a lock, and since when."""
    try:
        holder = json.loads(lock)
        who = f"process {holder['process']} on {holder['host']}"
    except (ValueError, TypeError, KeyError):
        return f"the lock says {lock[:_LONGEST_REASON].decode(errors='replace')!r}"
    try:  # by the clocks of two machines
        minutes = (datetime.now(UTC) - datetime.fromisoformat(holder["since"])).total_seconds() / 60
    except (ValueError, TypeError, KeyError):
        return who
    return f"{who}, for {minutes:.0f} minutes" if minutes < 120 else f"{who}, for {minutes / 60:.0f} hours"


def _buffer(data: bytes | memoryview) -> Buffer:
    from zarr.core.buffer import default_buffer_prototype

    return default_buffer_prototype().buffer.from_bytes(bytes(data))
