"""Sequences end in any order and leave in the order they were asked for; what waits is bounded. Knows no payload."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

from nla_engine.engine.request import Completion, Request


class InOrder:
    """Holds completions back until every earlier request has left. `size` gives the bytes one takes while it waits."""

    def __init__(self, limit: int, size: Callable[[Completion], int]) -> None:
        self._limit, self._size = limit, size
        self._asked: deque[int] = deque()
        self._waiting: dict[int, Completion] = {}
        self._bytes = 0

    def asked(self, request: Request) -> Request:
        """Note that this request comes next; returns it."""
        self._asked.append(request.id)
        return request

    @property
    def is_full(self) -> bool:
        """Whether more than `limit` bytes wait: nothing new should be started."""
        return self._bytes > self._limit

    def add(self, completion: Completion) -> Iterator[Completion]:
        """Take one; yield every completion whose turn it now is."""
        self._waiting[completion.request.id] = completion
        self._bytes += self._size(completion)
        while self._asked and (ended := self._waiting.pop(self._asked[0], None)) is not None:
            self._asked.popleft()
            self._bytes -= self._size(ended)
            yield ended
