"""Sequences end in any order and leave in the order of their requests; the memory of those that wait is bounded."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping

from nla_engine.engine.request import Completion, Request

#: Parts of the limit that may be fetched at once, and that may wait. The rest covers memory that is rounded up.
_PORTION_PART, _WAITING_PART = 1 / 4, 1 / 2


class InOrder:
    """Holds completions back until every earlier request has left, within `limit` bytes.

    A caller that fetches what `portion` says stays within the limit. If not even one sequence fits, it takes one at a
    time.
    """

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

    def portion(self, ended: Mapping[int, int]) -> list[int]:
        """Which ended sequences to fetch now. ended: bytes by request id.

        First those whose turn it is, then others that may wait. Together they take at most a part of the limit, except
        for a single sequence whose turn it is.
        """
        chosen: list[int] = []
        left = self._limit * _PORTION_PART
        for id_ in self._asked:
            if id_ in self._waiting:
                continue  # leaves together with those before it
            if id_ not in ended:
                break
            if chosen and ended[id_] > left:
                return chosen
            chosen.append(id_)
            left -= ended[id_]
        room, turn = self._limit * _WAITING_PART - self.bytes, set(chosen)
        for id_, size in ended.items():
            if id_ not in turn and size <= min(left, room):
                chosen.append(id_)
                left, room = left - size, room - size
        return chosen

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
