"""Where the texts of a store's rows come from: an AV that writes them, or (`text_file`) a file that holds them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any, Protocol

import numpy as np
import torch

from nla_engine.config import WritingOptions
from nla_engine.engine.generator import Watch
from nla_engine.engine.streams import enter_device
from nla_engine.ops.sampling import sampling_of
from nla_engine.roundtrip.verbalize import Explanation, Verbalizer

#: Vectors read at once, one such block ahead of need.
READ_AHEAD = 1024
#: Statuses of rows whose vector has no direction: there is nothing to explain or to score.
ZERO, NONFINITE = "zero_vector", "nonfinite_vector"
#: Status of a text that no AV of a run wrote.
GIVEN = "given"


class Vectors(Protocol):
    """Vectors by the number of their row: those of a layer, or of an array."""

    def torch(self, rows: np.ndarray, device: torch.device) -> torch.Tensor:
        """float32 [n, d] on the device, for int64 [n]."""
        ...

    def norm_at(self, rows: np.ndarray) -> np.ndarray:
        """L2 norms, [n]."""
        ...


class Texts(Protocol):
    """The texts of all selected rows, in the order of the rows; those of a row together. unit: what they are called."""

    unit: str

    def of_rows(
        self, reader: Vectors, rows: np.ndarray, first: int
    ) -> Generator[list[Explanation], None, None]:
        """The texts of each of these rows, int64 [n]. first: place of the first one among all selected rows.

        ids are the places of texts among all. Rows without a direction have the status that says so.
        """
        ...

    def columns(self, texts: list[Explanation]) -> dict[str, Any]:
        """What the table holds of these texts themselves."""
        ...

    def up_to_row(self, rows: int) -> int:
        """How many texts the first so many selected rows have."""
        ...

    def rows_of(self, texts: int) -> int:
        """How many rows the first so many texts belong to. The last one is whole."""
        ...

    def each(self, rows: int) -> str:
        """In words: how many texts the first so many rows have."""
        ...


class Written:
    """Texts that an AV writes, `samples` of each row."""

    unit = "explanations"

    def __init__(
        self,
        options: WritingOptions,
        verbalizer: Verbalizer,
        device: torch.device,
        draws: Callable[[np.ndarray], np.ndarray],
    ) -> None:
        """draws: for rows int64 [n], what names the random numbers of each one's texts, int64 [n]"""
        self.options, self.verbalizer, self.device, self.draws = options, verbalizer, device, draws
        self.watch: Watch = lambda tally: None  # told how far the AV is

    def of_rows(
        self, reader: Vectors, rows: np.ndarray, first: int
    ) -> Generator[list[Explanation], None, None]:
        """See `Texts`. Neither the other rows, nor the store, nor resuming change a sampled text."""
        options, samples = self.options, self.options.samples
        without = without_direction(reader.norm_at(rows))
        draws = self.draws(rows).tolist()
        written = self.verbalizer.explain(
            self._vectors(reader, rows, np.flatnonzero([status is None for status in without]), first),
            samples=samples,
            max_new_tokens=options.max_new_tokens,
            sampling=sampling_of(options),
            batch_size=options.batch_size,
            watch=self.watch,
            draws=lambda place: draws[place - first],
        )
        with closing(written):
            for place, status in enumerate(without):
                start = (first + place) * samples
                yield [
                    next(written) if status is None else Explanation(start + sample, "", status, 0)
                    for sample in range(samples)
                ]

    def columns(self, texts: list[Explanation]) -> dict[str, Any]:
        """See `Texts`."""
        return {
            "sample": [e.id % self.options.samples for e in texts],
            "explanation": [e.text for e in texts],
            "status": [e.status for e in texts],
            "n_tokens": [e.n_tokens for e in texts],
        }

    def up_to_row(self, rows: int) -> int:
        """See `Texts`."""
        return rows * self.options.samples

    def rows_of(self, texts: int) -> int:
        """See `Texts`."""
        return texts // self.options.samples

    def each(self, rows: int) -> str:
        """See `Texts`."""
        samples = self.options.samples
        return "one explanation per row" if samples == 1 else f"{samples} explanations per row"

    def _vectors(
        self, reader: Vectors, rows: np.ndarray, places: np.ndarray, first: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """(place among all selected rows, float32 [d] on the device) for rows[places], read one block ahead."""
        blocks = [places[start : start + READ_AHEAD] for start in range(0, len(places), READ_AHEAD)]
        with closing(read_ahead(reader, (rows[block] for block in blocks), self.device)) as read:
            for block, vectors in zip(blocks, read, strict=True):
                yield from zip((block + first).tolist(), vectors, strict=True)


def read_ahead(
    reader: Vectors, blocks: Iterable[np.ndarray], device: torch.device
) -> Generator[torch.Tensor, None, None]:
    """The vectors of each block of rows, float32 [n, d] on the device; the next block is read meanwhile."""
    with ThreadPoolExecutor(1, "read-ahead", enter_device, (device,)) as pool:
        ahead: deque[Future[torch.Tensor]] = deque()
        for rows in blocks:
            ahead.append(pool.submit(reader.torch, rows, device))
            if len(ahead) > 1:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def without_direction(norm: np.ndarray) -> list[str | None]:
    """For norms, float32 [n]: the status of a vector without a direction, None for one that has one."""
    return [None if np.isfinite(n) and n > 0 else ZERO if n == 0 else NONFINITE for n in norm]
