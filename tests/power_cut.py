"""What a disk may hold after a power cut, worked out from a log of the calls that changed it (see syscalls.c).

Only what POSIX promises: bytes last once their file was synced, names once their directory was. What was not
synced may be there, be missing, or be there in part; a name whose directory is missing is missing.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

SOURCE = Path(__file__).with_name("syscalls.c")
COMPILER = shutil.which("cc") or shutil.which("gcc")


def build_library(folder: Path) -> Path:
    """The library to name in LD_PRELOAD."""
    library = folder / "syscalls.so"
    command = [str(COMPILER), "-O1", "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl"]
    subprocess.run(command, check=True)
    return library


def watch(folder: Path, log: Path, fail_after: int = -1, error: int = 0) -> None:
    """In a process with the library: log what happens below folder, and fail one call (see syscalls.c)."""
    arguments = [
        ctypes.c_char_p(bytes(folder)),
        ctypes.c_char_p(bytes(log)),
        ctypes.c_long(fail_after),
        error,
    ]
    ctypes.CDLL(None).watch_calls(*arguments)


def note(text: str) -> None:
    """In a process with the library: add a line to the log."""
    ctypes.CDLL(None).note(ctypes.c_char_p(text.encode()))


@dataclass
class File:
    """synced: bytes certain to last. written: the bytes after them, one entry per write."""

    synced: bytes = b""
    written: list[bytes] = field(default_factory=list)


@dataclass
class Directory:
    """names: as running processes see them. synced: those certain to last. changes: (name, node or None) since."""

    names: dict[str, File | Directory] = field(default_factory=dict)
    synced: dict[str, File | Directory] = field(default_factory=dict)
    changes: list[list[tuple[str, File | Directory | None]]] = field(default_factory=list)

    def change(self, *changes: tuple[str, File | Directory | None]) -> None:
        """Names set or removed in one step."""
        self.changes.append(list(changes))
        _apply(self.names, changes)


def _apply(names: dict[str, File | Directory], changes: object) -> None:
    for name, node in changes:
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


class Disk:
    """A directory as the log's calls leave it."""

    def __init__(self) -> None:
        self.root = Directory()
        self._open: dict[str, File | Directory] = {}

    def _find(self, path: str) -> tuple[Directory, str]:
        node: File | Directory = self.root
        *parents, name = path.split("/")
        for parent in parents:
            node = node.names[parent]
        return node, name

    def call(self, line: str) -> None:
        """One line of the log."""
        kind, *words = line.rstrip("\n").split("\t")
        if kind in ("create", "open"):
            parent, name = self._find(words[1])
            if kind == "create" and name not in parent.names:
                parent.change((name, File()))
            node = parent.names[name] if name else parent
            if kind == "create":  # always with O_TRUNC
                assert not node.synced, f"{words[1]}: bytes that were synced are cut off in place"
                node.written = []
            self._open[words[0]] = node
        elif kind == "write":
            self._open[words[0]].written.append(bytes.fromhex(words[1]))
        elif kind == "fsync":
            node = self._open[words[0]]
            if isinstance(node, File):
                node.synced, node.written = b"".join([node.synced, *node.written]), []
            else:
                node.synced, node.changes = dict(node.names), []
        elif kind == "mkdir":
            parent, name = self._find(words[0])
            parent.change((name, Directory()))
        elif kind == "unlink":
            parent, name = self._find(words[0])
            parent.change((name, None))
        elif kind == "rename":
            (parent, old), (target, new) = self._find(words[0]), self._find(words[1])
            assert parent is target, "a rename from one directory to another"
            parent.change((old, None), (new, parent.names[old]))
        elif kind == "exchange":
            (parent, first), (other, second) = self._find(words[0]), self._find(words[1])
            assert parent is other, "an exchange between two directories"
            parent.change((first, parent.names[second]), (second, parent.names[first]))
        else:
            assert kind == "note", line

    def after_power_cut(self, kept: str, rng: np.random.Generator) -> dict[str, bytes | None]:
        """Contents by path (None for a directory) when power fails now.

        kept: what lasts of what was not synced: "nothing", "everything", or "some" (any names, the beginning of files).
        """
        return dict(_survivors(self.root, "", kept, rng))


def _survivors(
    directory: Directory, prefix: str, kept: str, rng: np.random.Generator
) -> Iterator[tuple[str, bytes | None]]:
    names = dict(directory.synced)
    for changes in directory.changes:
        if kept == "everything" or (kept == "some" and rng.random() < 0.5):
            _apply(names, changes)
    for name, node in names.items():
        path = prefix + name
        if isinstance(node, Directory):
            yield path, None
            yield from _survivors(node, path + "/", kept, rng)
        else:
            lost = b"".join(node.written)
            share = {"nothing": 0.0, "everything": 1.0, "some": rng.random()}[kept]
            yield path, node.synced + lost[: int(share * len(lost))]


def lay_out(contents: dict[str, bytes | None], folder: Path, held: dict[str, bytes | None]) -> None:
    """Write such contents into `folder`, which holds `held`. Only what differs is touched."""
    for path in sorted(held, reverse=True):  # the contents of a directory go before it
        if path not in contents:
            (folder / path).rmdir() if held[path] is None else (folder / path).unlink()
    for path, data in contents.items():
        if data is None:
            (folder / path).mkdir(exist_ok=True)
        elif path not in held or held[path] != data:
            (folder / path).write_bytes(data)
