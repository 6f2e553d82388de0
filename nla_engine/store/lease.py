"""The right to write under a name, for one process at a time, on one machine or several.

A lease is a small file that names its holder, with a lock on it that ends with the process. Some file systems (NFS, as
it may be mounted) show a lock only to its own machine, or have none. So a holder also touches its file every few
seconds. The lease of another machine is taken over only after its file has not been touched for long. A live holder
whose lease was taken over finds out in `check`, which runs before every commit. `WriterWatch` looks for a writer
without taking the lease.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import struct
import threading
import time
from functools import cache
from pathlib import Path
from types import TracebackType

from nla_engine.errors import HeldError, StoreError, WriteError
from nla_engine.store.objects import CHECK_SECONDS, LOCK_NAME

#: A holder touches its file this often.
BEAT_SECONDS = 5.0
#: A holder on another machine is taken for dead when its file has not been touched for this long.
SILENT_SECONDS = 30.0
#: After this long, two processes that take over the same file at once both see whose it is.
SETTLE_SECONDS = 1.0
_LOOK_SECONDS = 0.5
#: Errors of a file system without locks.
_NO_LOCKS = (errno.ENOLCK, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
#: `struct flock` of 64-bit Linux: type, whence, start, length, process.
_FLOCK = "@hhqqi0q"


class Lease:
    """Held from construction to `release`, or as a context manager. A killed holder holds nothing."""

    def __init__(self, file: Path) -> None:
        """file: see `of_directory` and `beside`.

        StoreError, naming the holder, if there is one; WriteError if the file cannot be made. Waits for SILENT_SECONDS
        if a process of another machine held it last and did not release it.
        """
        self._file = file
        self._data = _record()
        self._checked = time.monotonic()
        self._fd = self._take()
        self._ended = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="store-lease", daemon=True)
        self._beating.start()

    @classmethod
    def of_directory(cls, directory: Path) -> Lease:
        """The right to write in a directory. The file lies in it, so it moves with the directory."""
        return cls(directory / LOCK_NAME)

    @classmethod
    def beside(cls, path: Path) -> Lease:
        """The right to write a file."""
        return cls(path.with_name(f".{path.name}{LOCK_NAME}"))

    def moved(self, directory: Path) -> None:
        """Note that the directory has another name now."""
        self._file = directory / self._file.name

    @property
    def file(self) -> Path:
        """The file of this lease."""
        return self._file

    def is_in_place(self) -> bool:
        """Whether the file is still in its place and names this holder."""
        try:
            return self._file.read_bytes() == self._data
        except FileNotFoundError:
            return False
        except OSError as error:
            raise _cannot_write(self._file, error) from error

    def check(self) -> None:
        """WriteError if the lease was taken away, so that a writer that was taken for dead commits nothing."""
        self._checked = time.monotonic()
        if not self.is_in_place():
            raise WriteError(
                f"{self._file}: deleted or replaced while this process was writing: nothing more is committed"
            )

    def check_sometimes(self) -> None:
        """`check`, unless the last check was less than CHECK_SECONDS ago."""
        if time.monotonic() - self._checked >= CHECK_SECONDS:
            self.check()

    def release(self) -> None:
        """Let another writer in. A second call does nothing."""
        if self._fd < 0:
            return
        self._ended.set()
        self._beating.join()
        with contextlib.suppress(OSError, WriteError):  # if the file stays, its lock still ends
            if self.is_in_place():
                self._file.unlink()
        os.close(self._fd)
        self._fd = -1

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def _take(self) -> int:
        """Make and lock the file; its descriptor."""
        taken_over = False
        while True:
            try:
                fd = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            except FileExistsError:
                taken_over |= self._remove_abandoned()
                continue
            except OSError as error:
                raise _cannot_write(self._file, error) from error
            try:
                _lock(fd)
                os.write(fd, self._data)
                os.fsync(fd)
                if taken_over:
                    time.sleep(SETTLE_SECONDS)
                if not self.is_in_place():
                    raise BlockingIOError
            except BaseException as error:
                if not isinstance(error, BlockingIOError) and _is_at(self._file, fd):
                    with contextlib.suppress(OSError):
                        self._file.unlink()
                os.close(fd)
                if isinstance(error, BlockingIOError):
                    raise self._held_by(_read(self._file)) from None
                if isinstance(error, OSError):
                    raise _cannot_write(self._file, error) from error
                raise
            return fd

    def _remove_abandoned(self) -> bool:
        """Remove the file of a holder that has gone; True if it was on another machine. StoreError if it lives."""
        try:
            fd = os.open(self._file, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise _cannot_write(self._file, error) from error
        try:
            locked = _lock(fd)
            found = _read(self._file)
            foreign = not (locked and _machine(found) == this_machine())
            if foreign:
                self._wait_while_silent(found)
            if _is_at(self._file, fd) and _read(self._file) == found:
                self._file.unlink(missing_ok=True)
            return foreign
        except BlockingIOError:
            raise self._held_by(_read(self._file)) from None
        except OSError as error:
            raise _cannot_write(self._file, error) from error
        finally:
            os.close(fd)

    def _wait_while_silent(self, found: bytes) -> None:
        """Wait; StoreError once the holder on another machine shows that it lives. An empty file has no holder yet."""
        since, beat = time.monotonic(), _beat_of(self._file)
        while time.monotonic() - since < (SILENT_SECONDS if found else SETTLE_SECONDS):
            time.sleep(min(_LOOK_SECONDS, SETTLE_SECONDS / 2))
            if (_read(self._file), _beat_of(self._file)) != (found, beat):
                if not _read(self._file) and _beat_of(self._file) is None:
                    return  # it was just released
                raise self._held_by(_read(self._file))

    def _held_by(self, found: bytes) -> StoreError:
        holder = _parsed(found)
        who = f" (process {holder['process']} on {holder['host']})" if holder else ""
        return HeldError(f"{self._file.parent}: another process is writing here{who}: wait for it or end it")

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):
                now = time.time_ns()
                os.utime(self._fd, ns=(now, now))


class WriterWatch:
    """Tells whether a directory has a writer, each time it is asked. Takes no lock, so it never blocks a writer."""

    def __init__(self, directory: Path) -> None:
        self._file = directory / LOCK_NAME
        self._seen: tuple[bytes, int | None] = b"", None
        self._since = 0.0

    def has_writer(self) -> bool:
        """Whether a process of this machine holds it, or another machine touched it in the last SILENT_SECONDS."""
        found = _read(self._file)
        if _machine(found) == this_machine():
            with contextlib.suppress(OSError):
                fd = os.open(self._file, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    return _is_locked(fd)
                finally:
                    os.close(fd)
        seen = (found, _beat_of(self._file))
        if seen[1] is None:
            return False
        if seen != self._seen:
            self._seen, self._since = seen, time.monotonic()
        return time.monotonic() - self._since < SILENT_SECONDS


@cache
def this_machine() -> str:
    """An id of this machine since it was started."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()} {Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"
    return socket.gethostname()


def _record() -> bytes:
    holder = {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "machine": this_machine(),
        "token": os.urandom(8).hex(),
    }
    return json.dumps(holder).encode()


def _parsed(found: bytes) -> dict[str, object]:
    with contextlib.suppress(ValueError):
        holder = json.loads(found)
        if isinstance(holder, dict) and {"host", "process", "machine"} <= holder.keys():
            return holder
    return {}


def _machine(found: bytes) -> object:
    return _parsed(found).get("machine")


def _read(file: Path) -> bytes:
    """The contents of the file; empty if it does not exist."""
    try:
        return file.read_bytes()
    except OSError:
        return b""


def _is_at(file: Path, fd: int) -> bool:
    """Whether an open file still has this name."""
    try:
        here, ours = file.stat(), os.fstat(fd)
    except FileNotFoundError:
        return False
    return (here.st_dev, here.st_ino) == (ours.st_dev, ours.st_ino)


def _beat_of(file: Path) -> int | None:
    """When the file was last touched, by the clock of the machine that did; None if it does not exist."""
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)  # opening makes NFS ask its server again
    except OSError:
        return None
    try:
        return os.fstat(fd).st_mtime_ns
    finally:
        os.close(fd)


def _lock(fd: int) -> bool:
    """Lock an open file; False on a file system without locks. BlockingIOError if another process holds the lock."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise BlockingIOError from None
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True


def _is_locked(fd: int) -> bool:
    """Whether another process has locked an open file. OSError on a file system without locks."""
    asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    found = struct.unpack(_FLOCK, fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))
    return bool(found[0] != fcntl.F_UNLCK)


def _cannot_write(file: Path, error: OSError) -> WriteError:
    return WriteError(f"{file}: cannot be written: {error.strerror or error}")
