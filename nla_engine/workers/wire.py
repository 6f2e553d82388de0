"""Messages between a run and its own worker processes, over a pair of sockets that no other process can reach.

A message is pickled, which is safe because both ends are this package in processes that it started. Large arrays are
not copied into the pickle: their bytes stand before it. Messages that wait for each other are sent as one bundle, which
is received in one call: each call has to wait for the interpreter's lock.
"""

from __future__ import annotations

import pickle
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

#: Arrays of fewer bytes lie inside the pickle: a place of their own would cost more than the copy.
_SMALL = 1 << 15
#: Of a bundle: its bytes, and how many messages it has.
_BUNDLE = struct.Struct("<QQ")
#: Of a message: bytes of its pickle, and how many arrays stand before that.
_HEAD = struct.Struct("<QQ")
#: Messages and arrays start at multiples of this.
_ALIGNED = 16


@dataclass(frozen=True)
class Packed:
    """A message ready to be sent, with copies of its arrays."""

    data: bytes

    @classmethod
    def of(cls, message: Any) -> Packed:
        """Of anything that can be pickled."""
        large: list[memoryview] = []

        def inside(buffer: pickle.PickleBuffer) -> bool:
            raw = buffer.raw()
            if raw.nbytes < _SMALL:
                return True
            large.append(raw)
            return False

        pickled = pickle.dumps(message, protocol=5, buffer_callback=inside)
        sizes = struct.pack(f"<{len(large)}Q", *(raw.nbytes for raw in large))
        parts: list[bytes | memoryview] = [_HEAD.pack(len(pickled), len(large)) + sizes, *large, pickled]
        return cls(b"".join(piece for part in parts for piece in (part, bytes(-len(part) % _ALIGNED))))

    @property
    def nbytes(self) -> int:
        """Its size."""
        return len(self.data)

    @staticmethod
    def opened(data: memoryview) -> tuple[Any, int]:
        """The message that begins there, whose arrays stay in this memory, and its bytes."""
        pickled, count = _HEAD.unpack_from(data)
        sizes = struct.unpack_from(f"<{count}Q", data, _HEAD.size)
        at = _aligned(_HEAD.size + 8 * count)
        large = []
        for size in sizes:
            large.append(data[at : at + size])
            at += _aligned(size)
        return pickle.loads(data[at : at + pickled], buffers=large), at + _aligned(pickled)


class Wire:
    """One end. Any thread may send; one thread receives."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._sending = threading.Lock()

    def send(self, message: Any) -> None:
        """OSError if the other end is closed."""
        self.send_packed([Packed.of(message)])

    def send_packed(self, messages: Sequence[Packed]) -> None:
        """The same, of messages that are packed already."""
        with self._sending:
            self._socket.sendall(_BUNDLE.pack(sum(each.nbytes for each in messages), len(messages)))
            for each in messages:
                self._socket.sendall(each.data)

    def receive(self, reserve: Callable[[int], None] = lambda size: None) -> list[tuple[Any, int]]:
        """The messages of the next bundle, each with its bytes. EOFError if the other end is closed.

        reserve: called with the bytes of all before they take memory; it may wait
        """
        total, count = _BUNDLE.unpack(self._read(_BUNDLE.size))
        reserve(total)
        rest, messages = self._read(total), []
        for _ in range(count):
            message, size = Packed.opened(rest)
            messages.append((message, size))
            rest = rest[size:]
        return messages

    def _read(self, size: int) -> memoryview:
        """So many bytes, in memory of their own."""
        out = rest = np.empty(size, np.uint8).data
        while rest:
            try:
                got = self._socket.recv_into(rest, 0, socket.MSG_WAITALL)
            except OSError:
                got = 0
            if not got:
                raise EOFError
            rest = rest[got:]
        return out

    def hang_up(self) -> None:
        """Nothing is sent or received any more; a thread that waits for either is woken."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # the other end was first

    def close(self) -> None:
        """Free the socket, once no thread uses it."""
        self._socket.close()


def _aligned(size: int) -> int:
    return size + -size % _ALIGNED
