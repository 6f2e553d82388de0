"""Appends finished sequences to the store, with each row's token, next token and flags, and counts them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np

from nla_engine.engine.generator import Generator, Portion
from nla_engine.engine.request import Completion
from nla_engine.errors import EngineError
from nla_engine.models.prompt_set import Prompt
from nla_engine.sites import Site
from nla_engine.store import SequenceRows, StoreWriter, row_flags
from nla_engine.store.format import NO_TOKEN

#: The part of the host memory that the rows fetched at once may take. The rest covers those that are being written.
_FETCHED_PART = 1 / 4
#: Sequences per batch. A large batch is checked at once; a small one lets threads write while the next is prepared.
_TOGETHER = 64

_T = TypeVar("_T")


class Appender:
    """Appends the sequences of a run to a store as they end, and counts them. prompts: by request id."""

    def __init__(self, writer: StoreWriter, prompts: Sequence[Prompt]) -> None:
        self._writer, self._prompts = writer, prompts
        self.sequences = self.rows = self.tokens_generated = 0

    def add(self, ended: Sequence[Completion]) -> None:
        """Append these sequences, by number. Raises WriteError, or EngineError if one lacks rows.

        Some that together fill the last shards come first, if there are such: a store that is joined with others shares
        its files with the result up to such a place (`store.exchange.link`).

        A commit that is due because a shard filled comes first: the full shards of
        earlier calls are on disk by now. An overdue commit comes last, to include these sequences: the next ones may
        take long.
        """

        def rows(completion: Completion) -> SequenceRows:
            return sequence_rows(self._prompts[completion.request.id], completion, self._writer.sink_norm)

        ended = sorted(ended, key=lambda completion: completion.request.id)
        self._add(self._filling_first(ended, [len(each.positions) for each in ended]), rows)

    def add_rows(self, ended: Sequence[SequenceRows]) -> None:
        """The same, of sequences that are rows already."""
        ended = sorted(ended, key=lambda rows: rows.number or 0)
        self._add(self._filling_first(ended, [len(each.position) for each in ended]), lambda rows: rows)

    def _filling_first(self, ended: Sequence[_T], sizes: Sequence[int]) -> list[_T]:
        first = filling(sizes, self._writer.room)
        return [ended[i] for i in sorted(first)] + [each for i, each in enumerate(ended) if i not in first]

    def _add(self, ended: Sequence[_T], rows: Callable[[_T], SequenceRows]) -> None:
        overdue = self._writer.is_overdue
        if not overdue:
            self._writer.commit_if_due()
        try:
            for at in range(0, len(ended), _TOGETHER):
                self._append(ended[at : at + _TOGETHER], rows)
        finally:
            self._writer.wait_until_copied()
        if overdue:
            self._writer.commit()

    def _append(self, ended: Sequence[_T], rows: Callable[[_T], SequenceRows]) -> None:
        sequences: list[SequenceRows] = []
        try:
            sequences.extend(map(rows, ended))
        finally:
            self._writer.append_many(sequences, wait=False)
        self.sequences += len(sequences)
        self.rows += sum(len(each.position) for each in sequences)
        self.tokens_generated += sum(len(each.tokens) - each.prompt_size for each in sequences)


def filling(sizes: Sequence[int], room: int) -> set[int]:
    """Places of some of these sizes whose sum is `room`, which is not 0; none if there are no such."""
    if not 0 < room <= sum(sizes):
        return set()
    mask, sums = (1 << (room + 1)) - 1, [1]  # bit s: some of the sizes so far have the sum s
    for size in sizes:
        sums.append((sums[-1] | sums[-1] << size) & mask)
        if sums[-1] >> room & 1:
            break
    else:
        return set()
    chosen = set()
    for place in range(len(sums) - 2, -1, -1):
        if not sums[place] >> room & 1:
            chosen.add(place)
            room -= sizes[place]
    return chosen


def fetched_bytes(host_memory: float) -> int:
    """Most bytes of rows that are fetched at once. host_memory: for sequences that have ended, in bytes"""
    return int(host_memory * _FETCHED_PART)


def portion_of(host_memory: float) -> Portion:
    """Chooses which ended sequences to fetch now: in the order in which they ended, at most `fetched_bytes`.

    A sequence that is larger than that is fetched alone.
    """

    def portion(ended: Mapping[int, int]) -> list[int]:
        chosen: list[int] = []
        left = fetched_bytes(host_memory)
        for id_, size in ended.items():
            if chosen and size > left:
                break
            chosen.append(id_)
            left -= size
        return chosen

    return portion


def sequence_rows(prompt: Prompt, completion: Completion, sink_norm: Mapping[Site, float]) -> SequenceRows:
    """The store's record of a finished sequence. EngineError if a layer lacks rows."""
    given, generated = np.asarray(prompt.token_ids, np.int32), completion.generated
    with_end = np.concatenate([given, generated, np.asarray([NO_TOKEN], np.int32)])
    tokens, prompt_size = with_end[:-1], len(given)
    position, layers = completion.positions.astype(np.int32), completion.rows
    for layer, rows in layers.items():
        if len(rows.norm) != len(position):
            raise EngineError(f"{layer.label}: {len(rows.norm)} rows for {len(position)} positions")
    sink = np.zeros(len(position), bool)
    nonfinite = np.zeros(len(position), bool)
    for layer, rows in layers.items():
        sink |= rows.norm > sink_norm[layer]
        nonfinite |= ~np.isfinite(rows.norm)
    return SequenceRows(
        token_id=with_end[position],
        next_token_id=with_end[position + 1],
        position=position,
        flags=row_flags(position, prompt_size, len(tokens), sink, nonfinite),
        layers=layers,
        tokens=tokens,
        prompt_size=prompt_size,
        finish=completion.finish,
        source=prompt.source,
        next_tokens=completion.next_tokens,
        number=completion.request.id,
    )


def unfinished_rows(
    generator: Generator, prompts: Mapping[int, Prompt] | Sequence[Prompt], sink_norm: Mapping[Site, float]
) -> Iterator[SequenceRows]:
    """Of a generator that was stopped, the sequences that have rows and have not ended. prompts: by request id."""
    for each in generator.unfinished():
        if len(each.positions):
            yield sequence_rows(prompts[each.request.id], each, sink_norm)
