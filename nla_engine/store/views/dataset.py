"""Rows of a layer as torch datasets: one by number, one shuffled stream for training.

The stream is shuffled by shard and then within a buffer. It depends only on (seed, epoch) and on the number of
consumers (ranks times workers). Each consumer takes its own span of one shuffled order, so every row comes exactly
once, and a consumer can resume after any batch without reading what came before.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from nla_engine.errors import RequestError, StoreError
from nla_engine.sites import Site
from nla_engine.store.manifest import differences
from nla_engine.store.views.capture_store import CaptureStore
from nla_engine.store.views.tensors import checked_dtype

Row = Tensor | tuple[Tensor, Tensor]


class RowDataset(Dataset[Row]):
    """Map-style: item i is the vector [d] of the i-th chosen row; with `numbers`, (row number int64 [], vector).

    A DataLoader's batch is read at once: each chunk of the store is read only once. An item is chosen by one integer:
    others raise IndexError outside, TypeError for another type.
    """

    def __init__(
        self,
        store: CaptureStore,
        layer: int | Site | None = None,
        *,
        where: str | None = None,
        dtype: torch.dtype = torch.float32,
        numbers: bool = False,
    ) -> None:
        """layer: None for the store's only one; where: None for every row. StoreError, WhereError, RequestError."""
        self.layer = store.layer(store.chosen_layer(layer))
        self.rows = ChosenRows.of(store, where)
        self.dtype = checked_dtype(dtype)
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Row]:
        rows = self.rows.take(np.array([operator.index(place) for place in indices], np.int64))
        vectors = self.layer.torch(rows, dtype=self.dtype)
        if not self.numbers:
            return list(vectors)
        return list(zip(torch.from_numpy(rows), vectors, strict=True))


class ShuffledRows(IterableDataset[Row]):
    """Iterable: batches [b, d] of the chosen rows, each row once per epoch; with `numbers`, (int64 [b], [b, d]).

    For a DataLoader pass batch_size=None: batches are made here. Call `set_epoch` before each epoch, as for a
    DistributedSampler. `state_dict` and `load_state_dict` resume after a batch, with the same number of workers.
    """

    def __init__(
        self,
        store: CaptureStore,
        layer: int | Site | None = None,
        *,
        batch_size: int,
        where: str | None = None,
        seed: int = 0,
        buffer_rows: int = 16_384,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        numbers: bool = False,
        even: bool = False,
        rank: int | None = None,
        ranks: int | None = None,
    ) -> None:
        """layer: None for the store's only one; where: None for every row
        buffer_rows: rows in memory at once, from which batches are drawn
        device: where rows are decoded; leave it at cpu when a DataLoader has workers
        even: every worker of every rank gets the same number of full batches; the rest is dropped (other rows in
            each epoch)
        rank, ranks: None for those of torch.distributed, or 0 and 1 without it

        Raises RequestError for unfit arguments, StoreError, WhereError.
        """
        super().__init__()
        self._layer = store.layer(store.chosen_layer(layer))
        self._rows = ChosenRows.of(store, where)
        self._parts = self._rows.shards(self._layer.shard_rows)
        self._rank, self._ranks = _place_in_group(rank, ranks)
        for name, value in (("batch_size", batch_size), ("buffer_rows", buffer_rows)):
            if value < 1:
                raise RequestError(f"{name} is {value}: it must be 1 or more")
        self._batch, self._buffer = batch_size, buffer_rows
        self._seed, self._even, self._numbers = seed, even, numbers
        self._dtype, self._device = checked_dtype(dtype), torch.device(device)
        # A state is of this stream only if all of these agree.
        self._same = {
            "store": store.attributes["store_id"],
            "rows": len(self._rows),
            "batch_size": batch_size,
            "buffer_rows": buffer_rows,
            "seed": seed,
            "even": even,
            "ranks": self._ranks,
        }
        # Epoch, batches done, workers (0: not known). Shared memory, so that a DataLoader's workers see it as well.
        with torch.inference_mode(False):
            self._place = torch.zeros(3, dtype=torch.int64, device="cpu").share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Start the shuffled order of another epoch. Setting the current epoch again changes nothing."""
        if epoch != self._place[0]:
            self._place.copy_(torch.tensor([epoch, 0, 0]))

    def batches(self, workers: int = 1) -> int:
        """Batches of this rank per epoch, through a DataLoader with that many workers (0 counts as 1)."""
        return sum(self._batch_counts(max(workers, 1)))

    def state_dict(self, batches: int | None = None, workers: int = 0) -> dict[str, Any]:
        """Where this rank stands, as JSON-able values.

        batches, workers: for a DataLoader with workers, the batches taken from it since the epoch began, and the number
            of workers; without workers the dataset counts itself
        """
        epoch, done, _ = self._place.tolist()
        done = done if batches is None else batches
        return {**self._same, "epoch": epoch, "batches": done, "workers": max(workers, 1)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume there: the next iteration gives what would have come next. StoreError for another stream's state."""
        if changed := differences({key: state.get(key) for key in self._same}, self._same):
            raise StoreError(
                f"a state of another stream: {'; '.join(changed)}: make the dataset as it was then"
            )
        self._place.copy_(torch.tensor([state["epoch"], state["batches"], state["workers"]]))

    def __iter__(self) -> Iterator[Row]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        epoch, done, before = self._place.tolist()
        if before not in (0, workers):
            raise RequestError(
                f"the state is of {before} workers, not {workers}: give the DataLoader as many"
            )
        if not any(counts := self._batch_counts(workers)):
            raise RequestError(
                f"{len(self._rows):,} rows give none of {self._ranks * workers} workers a whole batch of "
                f"{self._batch}: lower batch_size, or leave even out"
            )
        stream, done = _turns(counts, done)[worker]
        for numbers, vectors in self._stream(epoch, self._span(stream, workers), done):
            if info is None:
                self._place[1] += 1
            yield (torch.from_numpy(numbers), vectors) if self._numbers else vectors
        if info is None:
            self._place[1] = 0

    def _batch_counts(self, workers: int) -> list[int]:
        """Batches of each worker of this rank."""
        return [-(-len(self._span(worker, workers)) // self._batch) for worker in range(workers)]

    def _span(self, worker: int, workers: int) -> range:
        """The part of the shuffled order that belongs to one worker of this rank."""
        consumers, place, total = self._ranks * workers, self._rank * workers + worker, len(self._rows)
        if self._even:
            each = total // consumers // self._batch * self._batch
            return range(place * each, (place + 1) * each)
        return range(place * total // consumers, (place + 1) * total // consumers)

    def _stream(self, epoch: int, span: range, done: int) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Batches of a span from number `done` on: row numbers int64 [b], vectors [b, d]."""
        skip = min(done * self._batch, len(span))
        if skip == len(span):
            return
        turn = np.random.default_rng((self._seed, epoch)).permutation(len(self._parts) - 1)
        ends = np.cumsum(np.diff(self._parts)[turn])
        rest: tuple[np.ndarray, Tensor] | None = None
        for first in range(span.start + skip // self._buffer * self._buffer, span.stop, self._buffer):
            numbers, vectors = self._read(turn, ends, first, min(first + self._buffer, span.stop))
            order = np.random.default_rng((self._seed, epoch, first)).permutation(len(numbers))
            order = order[max(span.start + skip - first, 0) :]
            cuts = np.arange(self._batch - (len(rest[0]) if rest else 0), len(order), self._batch)
            for part in np.split(order, cuts):
                batch = numbers[part], vectors[torch.from_numpy(part)]
                if rest is not None:
                    batch = np.concatenate([rest[0], batch[0]]), torch.cat([rest[1], batch[1]])
                rest = batch
                if len(batch[0]) == self._batch:
                    rest = None
                    yield batch
        if rest is not None:
            yield rest

    def _read(self, turn: np.ndarray, ends: np.ndarray, start: int, stop: int) -> tuple[np.ndarray, Tensor]:
        """Places [start, stop) of the shuffled order: their row numbers and vectors.

        turn: int64, the shards in the epoch's order; ends: int64, where in the shuffled order each of them ends
        """
        numbers, vectors = [], []
        for place in range(np.searchsorted(ends, start, "right"), np.searchsorted(ends, stop) + 1):
            shard, end = turn[place], int(ends[place])
            last = int(self._parts[shard + 1])
            size = last - int(self._parts[shard])
            part = self._rows.between(max(last - size, last - end + start), min(last, last - end + stop))
            whole = part[-1] - part[0] + 1 == len(part)
            wanted = slice(int(part[0]), int(part[-1]) + 1) if whole else part
            numbers.append(part)
            vectors.append(self._layer.torch(wanted, self._device, self._dtype))
        return np.concatenate(numbers), torch.cat(vectors)


class ChosenRows:
    """Row numbers, ascending: those that an expression chose, kept in memory, or all rows of a store, which are not."""

    def __init__(self, count: int, numbers: np.ndarray | None = None) -> None:
        """numbers: int64 [count], None for 0 to count - 1."""
        self._count, self._numbers = count, numbers

    @classmethod
    def of(cls, store: CaptureStore, where: str | None) -> ChosenRows:
        """where: None for every row. Raises StoreError if there are none, WhereError."""
        numbers = None if where is None else store.where(where)
        chosen = cls(store.rows if numbers is None else len(numbers), numbers)
        if not len(chosen):
            raise StoreError(
                f"{store.path}: " + ("holds no rows" if where is None else f"no row fits {where!r}: widen it")
            )
        return chosen

    def __len__(self) -> int:
        return self._count

    def between(self, start: int, stop: int) -> np.ndarray:
        """int64 [stop - start]: the row numbers at places [start, stop)."""
        return np.arange(start, stop) if self._numbers is None else self._numbers[start:stop]

    def take(self, places: np.ndarray) -> np.ndarray:
        """int64 [n]: the row numbers at places int64 [n], negative ones from the end. Raises IndexError outside."""
        if self._numbers is not None:
            return self._numbers[places]
        if len(places) and not -self._count <= places.min() <= places.max() < self._count:
            raise IndexError(f"items {places.min()} to {places.max()} reach outside {self._count} rows")
        return places % self._count

    def shards(self, shard_rows: int) -> np.ndarray:
        """int64 [k + 1]: the places where the rows of each of k shards begin, and where the last shard ends."""
        if self._numbers is None:
            return np.append(np.arange(0, self._count, shard_rows), self._count)
        edges = np.flatnonzero(np.diff(self._numbers // shard_rows)) + 1
        return np.concatenate([[0], edges, [self._count]])


def _turns(counts: Sequence[int], done: int) -> list[tuple[int, int]]:
    """Where each worker of a DataLoader resumes after `done` batches: (which stream, how many of its batches are done).

    counts: batches of each stream, which differ by at most one. The DataLoader takes batches from its workers in turn
    and begins with the first, so the first worker gets the stream whose turn it is.
    """
    streams = len(counts)
    # Full rounds of every stream, then one round of the streams with one more batch.
    whole = min(done // streams, min(counts))
    longer = [stream for stream, count in enumerate(counts) if whole < count]
    begun = min(done - whole * streams, len(longer))
    again = [stream for stream in longer[:begun] if whole + 1 < counts[stream]]
    following = list(dict.fromkeys([*longer[begun:], *again, *range(streams)]))
    return [(stream, whole + (stream in longer[:begun])) for stream in following]


def _place_in_group(rank: int | None, ranks: int | None) -> tuple[int, int]:
    group = torch.distributed.is_available() and torch.distributed.is_initialized()
    if ranks is None:
        ranks = torch.distributed.get_world_size() if group else 1
    if rank is None:
        rank = torch.distributed.get_rank() if group else 0
    if not 0 <= rank < ranks:
        raise RequestError(f"rank is {rank}: it must be 0 to {ranks - 1}, one of {ranks} ranks")
    return rank, ranks
