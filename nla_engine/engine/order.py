"""Sequences end in any order and leave in the order of their requests; the memory of those that wait is bounded."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from nla_engine.engine.request import Completion, Request


class InOrder:
    """Holds completions back until every earlier request has left. limit: bytes that should wait at most."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._asked: deque[int] = deque()
        self._waiting: dict[int, Completion] = {}
        self.bytes = 0

    def asked(self, request: Request) -> Request:
        """Record that this request comes next; returns it."""
        self._asked.append(request.id)
        return request

    @property
    def is_full(self) -> bool:
        """Whether more than `limit` bytes wait: nothing new should be started."""
        return self.bytes > self._limit

    def add(self, group: Iterable[Completion]) -> list[Completion]:
        """Take completions that ended together; returns every completion whose turn it now is.

        The others are copied, because one that waits must not keep the memory of its whole group.
        """
        new = {completion.request.id: completion for completion in group}
        leaving = []
        while self._asked:
            id_ = self._asked[0]
            if (ended := new.pop(id_, None)) is None:
                if (ended := self._waiting.pop(id_, None)) is None:
                    break
                self.bytes -= ended.nbytes
            self._asked.popleft()
            leaving.append(ended)
        for id_, completion in new.items():
            self._waiting[id_] = completion.copy()
            self.bytes += completion.nbytes
        return leaving
