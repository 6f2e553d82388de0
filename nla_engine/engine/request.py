"""What the engine is asked for, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from nla_engine.errors import EngineError
from nla_engine.sites import Site

if TYPE_CHECKING:
    import torch


class Finish(IntEnum):
    """Why a sequence ended. The values are those of a store's `sequences/finish`."""

    EOS = 0
    LENGTH = 1
    STOP = 2
    GIVEN = 3
    PARTIAL = 4


@dataclass(frozen=True)
class Request:
    """One sequence to run.

    id: unique and >= 0. token_ids: the prompt after the shared prefix, at
    least one token. max_new_tokens: 0 = only read the prompt.
    vectors: what enters at the tokens `places` of these (ascending): [n, d] at scale, of any float dtype, best on the
    model's device.
    again: token_ids and vectors equal those of the request before, so the prompt need not be read again. Such a request
    has no rows of its prompt for a tap.
    draw: selects the sequence's random numbers, int64; None: its id does
    """

    id: int
    token_ids: tuple[int, ...]
    max_new_tokens: int
    vectors: torch.Tensor | None = None
    places: tuple[int, ...] = ()
    again: bool = False
    draw: int | None = None

    @property
    def draws(self) -> int:
        """What selects its random numbers."""
        return self.id if self.draw is None else self.draw

    def check(self, *, shared: int, room: int, where: str, new: int, vectors: int) -> None:
        """EngineError if it cannot run with `shared` tokens before its prompt and `room` for all its tokens, where at
        most `new` tokens are generated and `vectors` vectors enter. where: what has the room, for the message."""
        prompt = len(self.token_ids)
        if not prompt or shared + prompt + self.max_new_tokens > room or self.max_new_tokens > new:
            raise EngineError(
                f"request {self.id}: {prompt} prompt and {self.max_new_tokens} new tokens do not fit {where}"
            )
        entering, places = 0 if self.vectors is None else len(self.vectors), (-1, *self.places, prompt)
        if entering != len(self.places) or any(a >= b for a, b in pairwise(places)):
            raise EngineError(f"request {self.id}: {entering} vectors for the tokens {list(self.places)}")
        if entering > vectors:
            raise EngineError(f"request {self.id}: {entering} vectors, a slot has room for {vectors}")


@dataclass(frozen=True)
class NextTokens:
    """What the model said of the token behind each of n rows, by its own distribution: temperature 1, nothing cut.

    next_logprob: float32 [n], natural log-probability of the token that follows, NaN where none does
    top_id: int32 [n, K], the likeliest tokens, likeliest first; top_logprob: float32 [n, K]
    """

    next_logprob: np.ndarray
    top_id: np.ndarray
    top_logprob: np.ndarray

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        return sum(array.nbytes for array in vars(self).values())

    def copy(self) -> NextTokens:
        """A copy with memory of its own."""
        return NextTokens(**{name: array.copy() for name, array in vars(self).items()})


@dataclass(frozen=True)
class Completion:
    """One finished sequence. generated: int32 [n]; rows: what the tap kept of it, by site (none without a tap);
    positions: int64 [k], ascending: where in the sequence these rows are, at every site; next_tokens: of these rows,
    if they were asked for.

    The rows of all sites share one memory. Sequences that end together share that of what they generated.
    """

    request: Request
    generated: np.ndarray
    finish: Finish
    rows: Mapping[Site, Any] = field(default_factory=dict)
    positions: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    next_tokens: NextTokens | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        rows = sum(rows.nbytes for rows in self.rows.values())
        told = 0 if self.next_tokens is None else self.next_tokens.nbytes
        return self.generated.nbytes + self.positions.nbytes + rows + told

    def copy(self) -> Completion:
        """A copy with memory of its own."""
        rows = {layer: kept.copy() for layer, kept in self.rows.items()}
        told = None if self.next_tokens is None else self.next_tokens.copy()
        return replace(
            self,
            generated=self.generated.copy(),
            positions=self.positions.copy(),
            rows=rows,
            next_tokens=told,
        )
