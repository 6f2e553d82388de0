"""Where the texts of a store's rows come from: an AV that writes them, or (`text_file`) a file that holds them."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any, Protocol

import numpy as np
import torch

from nla_engine.config import WritingOptions
from nla_engine.engine.generator import Watch
from nla_engine.engine.streams import enter_device
from nla_engine.ops.sampling import Sampling
from nla_engine.roundtrip.verbalize import Explanation, Verbalizer
from nla_engine.store import LayerReader

#: Vectors read at once, one such block ahead of need.
READ_AHEAD = 1024
#: Statuses of rows whose vector has no direction: there is nothing to explain or to score.
ZERO, NONFINITE = "zero_vector", "nonfinite_vector"
#: Status of a text that no AV of a run wrote.
GIVEN = "given"


class Texts(Protocol):
    """The texts of all selected rows, in the order of the rows; those of a row together. unit: what they are called."""

    unit: str

    def of_rows(
        self, reader: LayerReader, rows: np.ndarray, first: int
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

    def __init__(self, options: WritingOptions, verbalizer: Verbalizer, device: torch.device) -> None:
        self.options, self.verbalizer, self.device = options, verbalizer, device
        self.watch: Watch = lambda tally: None  # told how far the AV is

    def of_rows(
        self, reader: LayerReader, rows: np.ndarray, first: int
    ) -> Generator[list[Explanation], None, None]:
        """See `Texts`. The places name the random numbers: neither segments nor resuming change a sampled text."""
        options, samples = self.options, self.options.samples
        without = without_direction(reader.norm_at(rows))
        written = self.verbalizer.explain(
            self._vectors(reader, rows, np.flatnonzero([status is None for status in without]), first),
            samples=samples,
            max_new_tokens=options.max_new_tokens,
            sampling=Sampling(options.temperature, options.seed),
            batch_size=options.batch_size,
            watch=self.watch,
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
        self, reader: LayerReader, rows: np.ndarray, places: np.ndarray, first: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """(place among all selected rows, float32 [d] on the device) for rows[places], read one block ahead."""
        device = self.device
        blocks = [places[start : start + READ_AHEAD] for start in range(0, len(places), READ_AHEAD)]
        with ThreadPoolExecutor(1, "read-ahead", enter_device, (device,)) as pool:
            ahead = [pool.submit(reader.torch, rows[block], device) for block in blocks[:1]]
            for number, block in enumerate(blocks):
                vectors = ahead.pop().result()
                if number + 1 < len(blocks):
                    ahead.append(pool.submit(reader.torch, rows[blocks[number + 1]], device))
                yield from zip((block + first).tolist(), vectors, strict=True)


def without_direction(norm: np.ndarray) -> list[str | None]:
    """For norms, float32 [n]: the status of a vector without a direction, None for one that has one."""
    return [None if np.isfinite(n) and n > 0 else ZERO if n == 0 else NONFINITE for n in norm]
