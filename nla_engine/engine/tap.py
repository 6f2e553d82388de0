"""The engine's side of a tap: what is called inside every pass, and what the generator calls.

The generator calls `allocate` once, and `prepare` before a run. In every turn it calls `drain` and `open`, then `reads`
before a pass over given tokens and `decodes` before decode steps, then `look` and `settle`, and `collect` for sequences
that ended. `collect` takes what `settle` returned, so the two cannot be called in the wrong order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from nla_engine.sites import Site

#: Of each ended sequence the positions that have rows, int64 [k], ascending, and these rows by site.
Collected = Sequence[tuple[np.ndarray, Mapping[Site, Any]]]


@dataclass(frozen=True)
class KeptRows:
    """Rows of an ended sequence. size: tokens of the sequence; nbytes: most bytes on the host."""

    slot: int
    size: int
    nbytes: int


class Tap(Protocol):
    """Keeps rows of some sites."""

    @property
    def layers(self) -> tuple[Site, ...]:
        """The sites that are tapped."""

    @property
    def reads_prompts(self) -> bool:
        """Whether it keeps rows of prompts. If so, every prompt has to be read, even one that was read before."""

    def allocate(self, slots: int, *, steps: int, given: int, step_by_step: bool = False) -> int:
        """Allocate the device memory, before any pass. Between two calls of `drain` there are at most `steps` decode
        steps, at most half of them after the look, and one pass over given tokens. Returns how many of these it may
        read at most, up to `given`.

        step_by_step: whether decode steps read given tokens too
        """

    def prepare(self) -> None:
        """Allocate the host memory. Called last before a run, after graphs are captured."""

    def drain(self) -> None:
        """Make room for the rows of a turn. Waits only if the host is too slow to take what leaves the device."""

    def open(self, slots: list[int], ids: list[int], prompt_sizes: list[int], totals: list[int]) -> None:
        """Start new sequences in these slots, each of at most `total` tokens, `prompt_size` of them given.

        What a slot held before is forgotten, also if its sequence had not ended. ids: of their requests.
        """

    def reads(self, runs: Sequence[tuple[int, int, int]], size: int | None = None) -> None:
        """The next pass reads these runs of given tokens: slot, first position, how many. No synchronisation.

        size: of a pass that is filled up to so many tokens, none of which has a row; `padded` announces it
        """

    def padded(self, size: int) -> None:
        """Called in a pass of `size` tokens, just before its sites are computed, also where it is captured in a graph:
        its rows go where the last `reads` of that size says, then and whenever the graph is replayed."""

    def decodes(self, slots: list[int], steps: int, after_look: int) -> None:
        """The sequences in these slots take so many decode steps next, unless they end before. The last `after_look` of
        them come after the next look."""

    def __call__(self, layer: Site, hidden: torch.Tensor, slot: torch.Tensor, position: torch.Tensor) -> None:
        """Called inside every pass, once this site is computed. No synchronisation.

        hidden [T, d]; slot, position int64 [T]
        """

    def look(self, *, decoded: bool) -> None:
        """Queue a look at what `settle` must fetch. decoded: after decode steps, else prompts. No synchronisation."""

    def settle(self, slots: list[int], sizes: list[int]) -> list[KeptRows]:
        """Called before more passes: fetch what must not wait. Returns the rows of these sequences, which had ended
        with `size` tokens at the last look. Waits for that look only."""

    def collect(
        self, ended: Sequence[KeptRows], replies: Sequence[tuple[int, np.ndarray]]
    ) -> Future[Collected]:
        """Fetch the rows of these sequences. Waits only if the host is too slow to take what leaves the device.

        replies: of each, the id of its request and what it generated, int32 [n]. Their slots may be opened again.
        """

    def close(self) -> None:
        """Free what it holds on the host."""


class NoTap:
    """Keeps nothing."""

    layers: tuple[Site, ...] = ()
    reads_prompts = False

    def allocate(self, slots: int, *, steps: int, given: int, step_by_step: bool = False) -> int:
        """Any number of tokens may be read."""
        return given

    def prepare(self) -> None:
        """Nothing to do."""

    def drain(self) -> None:
        """Nothing to do."""

    def open(self, slots: list[int], ids: list[int], prompt_sizes: list[int], totals: list[int]) -> None:
        """Nothing to do."""

    def reads(self, runs: Sequence[tuple[int, int, int]], size: int | None = None) -> None:
        """Nothing to do."""

    def padded(self, size: int) -> None:
        """Nothing to do."""

    def decodes(self, slots: list[int], steps: int, after_look: int) -> None:
        """Nothing to do."""

    def __call__(self, layer: Site, hidden: torch.Tensor, slot: torch.Tensor, position: torch.Tensor) -> None:
        """Nothing to do."""

    def look(self, *, decoded: bool) -> None:
        """Nothing to do."""

    def settle(self, slots: list[int], sizes: list[int]) -> list[KeptRows]:
        """Each sequence has 0 bytes of rows."""
        return [KeptRows(slot, size, 0) for slot, size in zip(slots, sizes, strict=True)]

    def collect(
        self, ended: Sequence[KeptRows], replies: Sequence[tuple[int, np.ndarray]]
    ) -> Future[Collected]:
        """Each sequence has rows of no site."""
        rows: Future[Collected] = Future()
        rows.set_result([(np.zeros(0, np.int64), {}) for _ in ended])
        return rows

    def close(self) -> None:
        """Nothing to do."""


class Elsewhere(NoTap):
    """On a rank that keeps no rows: the model runs as it does where the sites are tapped."""

    def __init__(self, layers: tuple[Site, ...]) -> None:
        self.layers = layers
