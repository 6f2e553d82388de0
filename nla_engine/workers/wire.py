"""Messages between a run and its own worker processes, over a pair of sockets that no other process can reach.

A message is pickled, which is safe because both ends are this package in processes that it started. Large arrays are
not copied into the pickle: their bytes follow it, and are received in the memory of the new arrays.
"""

from __future__ import annotations

import pickle
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

#: Arrays of fewer bytes lie inside the pickle: a call of their own would cost more than the copy.
_SMALL = 1 << 15
#: Bytes of the pickle, and how many arrays follow.
_HEAD = struct.Struct("<QQ")


class Wire:
    """One end. Any thread may send; one thread receives."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._sending = threading.Lock()

    def send(self, message: Any) -> None:
        """OSError if the other end is closed."""
        large: list[memoryview] = []

        def inside(buffer: pickle.PickleBuffer) -> bool:
            raw = buffer.raw()
            if raw.nbytes < _SMALL:
                return True
            large.append(raw)
            return False

        pickled = pickle.dumps(message, protocol=5, buffer_callback=inside)
        sizes = struct.pack(f"<{len(large)}Q", *(raw.nbytes for raw in large))
        with self._sending:
            self._socket.sendall(_HEAD.pack(len(pickled), len(large)) + sizes + pickled)
            for raw in large:
                self._socket.sendall(raw)

    def receive(self, reserve: Callable[[int], None] = lambda size: None) -> tuple[Any, int]:
        """The next message and its bytes. EOFError if the other end is closed.

        reserve: called with these bytes before they take memory; it may wait
        """
        pickled, count = _HEAD.unpack(self._read(_HEAD.size))
        sizes = struct.unpack(f"<{count}Q", self._read(8 * count))
        total = pickled + sum(sizes)
        reserve(total)
        text = self._read(pickled)
        return pickle.loads(text, buffers=[self._read(size) for size in sizes]), total

    def _read(self, size: int) -> memoryview:
        """So many bytes, in memory of their own."""
        out = rest = np.empty(size, np.uint8).data
        while rest:
            try:
                got = self._socket.recv_into(rest)
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
