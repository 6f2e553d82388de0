"""Prompt passes of small models in CUDA graphs, captured for a few numbers of tokens.

The host needs longer to launch such a pass, kernel by kernel, than the device to compute it. A pass is filled up to the
next of the sizes that there are graphs for. What fills it up changes nothing that is read: its tokens belong to the
spare slot, whose keys go to a block of their own or to the one that nobody holds; the tap has no places for their rows;
lanes that are left over work on the spare slot, which is never active.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cache
from itertools import chain
from typing import Any

import numpy as np
import torch

from nla_engine.engine.attention import counted, cut
from nla_engine.engine.graph import OPERATIONS, Graph
from nla_engine.engine.runner import Runner
from nla_engine.engine.slots import SlotCache
from nla_engine.engine.transfer import to_device
from nla_engine.ops.attention import Tiles, tile_rows

#: 0: no pass is captured.
SWITCH = "NLA_PASS_GRAPHS"
#: What the host needs to launch a block of a pass, about nine kernels and the modules around them.
_LAUNCH_SECONDS = 1.5e-4
#: The sizes, as parts of the largest pass.
_PARTS = (1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1)
#: Most tokens that fill a pass up as one run of the spare slot.
_RUN = 64

#: A part of a pass: slot, first position, token ids.
Part = tuple[int, int, Sequence[int]]


class PaddedPass:
    """What a pass of `size` tokens reads, in tensors that stay where they are.

    tokens: int64 [3, size]: id, slot and position; wanted: int64 [lanes], tokens whose states are wanted; lanes: int64
    [lanes], the slots that these generate for. Before the first `fill`, and where it leaves some over, they are those
    of the spare slot.
    """

    def __init__(self, size: int, lanes: int, cache: SlotCache) -> None:
        self.size, self._cache = size, cache
        self._all = torch.zeros(3 * size + 2 * lanes, dtype=torch.int64, device=cache.table.device)
        self.tokens = self._all[: 3 * size].view(3, size)
        self.wanted, self.lanes = self._all[3 * size :].view(2, lanes)
        self._tiles: dict[int, torch.Tensor] = {}  # by query heads per key/value head, once asked for
        self.fill([], [])

    def fill(self, parts: Sequence[Part], lanes: Sequence[tuple[int, int]]) -> None:
        """The next pass reads these parts. lanes: token of the pass whose state is wanted, and slot. No
        synchronisation."""
        kept, spare = self._cache, self._cache.spare
        runs = [(slot, start, len(ids)) for slot, start, ids in parts]
        used = sum(length for _, _, length in runs)
        most = min(_RUN, kept.size)
        runs += [(spare, kept.prefix_size, min(most, self.size - at)) for at in range(used, self.size, most)]
        self._runs = np.array(runs, np.int64)
        slot, start, length = self._runs.T
        values = np.zeros(len(self._all), np.int64)
        tokens, ends = values[: 3 * self.size].reshape(3, -1), values[3 * self.size :].reshape(2, -1)
        tokens[0, :used] = np.fromiter(chain.from_iterable(ids for _, _, ids in parts), np.int64, used)
        tokens[1], tokens[2] = np.repeat(slot, length), np.repeat(start, length) + counted(length)
        ends[1] = spare
        ends[:, : len(lanes)] = np.array(lanes, np.int64).reshape(-1, 2).T
        self._all.copy_(to_device(values, self._all.device))
        for group in self._tiles:
            self._cut(group)

    def tiles(self, group: int) -> Tiles:
        """The tiles of the pass, which has as many of them whatever it reads. Some have no query."""
        if group not in self._tiles:
            step = self._rows(group)[1]
            most = self.size // step + -(-self.size // min(_RUN, self._cache.size)) + self._cache.slots + 1
            most += most == self.size  # one for each query would be those of a decode step
            self._tiles[group] = torch.empty((4, most), dtype=torch.int64, device=self._all.device)
            self._cut(group)
        token, count, slot, position = self._tiles[group]
        longest = self._cache.prefix_size + self._cache.size
        return Tiles(token, count, slot, position, self.tokens[2], self._rows(group)[0], longest)

    def _rows(self, group: int) -> tuple[int, int]:
        """Query rows of a tile, and its tokens."""
        rows = tile_rows(self.size, group)
        return rows, max(rows // group, 1)

    def _cut(self, group: int) -> None:
        tiles = self._tiles[group]
        columns = np.zeros(tuple(tiles.shape), np.int64)
        columns[2], columns[3] = self._cache.spare, self._cache.prefix_size
        found = cut(self._runs, self._rows(group)[1])
        columns[:, : found.shape[1]] = found
        tiles.copy_(to_device(columns, tiles.device))


class PassGraph:
    """The graph of passes of up to `size` tokens."""

    def __init__(self, given: PaddedPass, graph: Graph) -> None:
        self.size, self._given, self._graph = given.size, given, graph

    def run(self, parts: Sequence[Part], lanes: Sequence[tuple[int, int]]) -> None:
        """Queue the pass, as `PaddedPass.fill` takes it, and the choice of the next token of each lane."""
        self._given.fill(parts, lanes)
        self._graph.replay()


class PassGraphs:
    """The graphs of the passes of a runner, of at most `most` tokens; 0: no pass has one.

    advance: called in each pass with the slots that generate, int64 [lanes], and their states [lanes, d]; it leaves
    the spare slot as it is
    """

    def __init__(
        self,
        runner: Runner,
        most: int,
        advance: Callable[[torch.Tensor, torch.Tensor], None],
        pool: Any,
    ) -> None:
        self._runner, self._advance, self._pool = runner, advance, pool
        self.sizes = _sizes(runner, most)
        self._graphs: dict[int, PassGraph] = {}
        runner.at_close.append(self._graphs.clear)

    def prepare(self) -> None:
        """Capture all of them."""
        for size in self.sizes:
            self.fitting(size)

    def fitting(self, tokens: int) -> PassGraph | None:
        """The smallest for a pass of so many tokens; None: there is none, so its kernels are launched one by one.

        It may be captured now. Call before the tap is told of the pass.
        """
        at = bisect_left(self.sizes, tokens)
        if at == len(self.sizes):
            return None
        size = self.sizes[at]
        if size not in self._graphs:
            given = PaddedPass(size, self._runner.cache.slots, self._runner.cache)
            self._runner.tap.reads([], size)
            graph = Graph(lambda: self._work(given), self._runner.device, self._pool)
            self._graphs[size] = PassGraph(given, graph)
        return self._graphs[size]

    def _work(self, given: PaddedPass) -> None:
        self._runner.tap.padded(given.size)
        ids, slot, position = given.tokens  # new views: the tap takes them for those of a new pass
        states = self._runner.read_packed(ids, slot, position, cache(given.tiles), given.wanted)
        self._advance(given.lanes, states)


def _sizes(runner: Runner, most: int) -> list[int]:
    """Tokens of the passes that take longer to launch than to run. None where a pass does what no graph can hold."""
    held = runner.graphable and runner.whole and runner.ranks is None
    if not most or not held or os.environ.get(SWITCH) == "0":
        return []
    weights = sum(weight.numel() for weight in runner.lm.blocks.parameters()) / len(runner.lm.blocks)
    largest = _LAUNCH_SECONDS * OPERATIONS / (2 * weights)
    return sorted({max(int(most * part), 1) for part in _PARTS if most * part <= largest})
