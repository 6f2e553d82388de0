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

#: Options that decide which texts are drawn for a row. A run that goes on must have the same.
DRAW_OPTIONS = ("samples", "temperature", "top_p", "top_k", "min_p", "seed", "max_new_tokens")
#: Vectors read at once, one such block ahead of need.
READ_AHEAD = 1024
#: Statuses of rows whose vector has no direction: there is nothing to explain or to score.
ZERO, NONFINITE = "zero_vector", "nonfinite_vector"
#: Status of a text that no AV of a run wrote.
GIVEN = "given"


#: Rows, int64 [n], and the place of the first one among all selected rows.
Block = tuple[np.ndarray, int]


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

    def give_up(self) -> None:
        """Let go of the AV, where other processes have their own."""
        del self.verbalizer

    def of_rows(
        self, reader: Vectors, rows: np.ndarray, first: int
    ) -> Generator[list[Explanation], None, None]:
        """See `Texts`. Neither the other rows, nor the store, nor resuming change a sampled text."""
        starts = range(0, len(rows), READ_AHEAD)
        return self.of_blocks(reader, ((rows[start : start + READ_AHEAD], first + start) for start in starts))

    def of_blocks(
        self, reader: Vectors, blocks: Iterable[Block | None]
    ) -> Generator[list[Explanation], None, None]:
        """The same for blocks of rows, each read when there is room for more; None: nothing just now.

        It ends before the blocks do if None comes when nothing is being written.
        """
        options, samples = self.options, self.options.samples
        waiting: deque[tuple[int, str | None]] = deque()  # place and status of rows whose texts have not left
        draws: dict[int, int] = {}  # by place
        places: deque[int] = deque()  # of the vectors that are being read

        def sound() -> Iterator[np.ndarray | None]:
            """Of each block the rows that have a direction."""
            for block in blocks:
                if block is None:
                    if not any(status is None for _, status in waiting):
                        return
                    yield None
                    continue
                rows, first = block
                statuses = without_direction(reader.norm_at(rows))
                waiting.extend(enumerate(statuses, first))
                kept = np.flatnonzero([status is None for status in statuses])
                draws.update(zip((kept + first).tolist(), self.draws(rows[kept]).tolist(), strict=True))
                places.extend((kept + first).tolist())
                if len(kept):
                    yield rows[kept]

        def vectors() -> Iterator[tuple[int, torch.Tensor] | None]:
            with closing(read_ahead(reader, sound(), self.device)) as read:
                for block in read:
                    if block is None:
                        yield None
                        continue
                    for vector in block:
                        yield places.popleft(), vector

        written = self.verbalizer.explain(
            vectors(),
            samples=samples,
            max_new_tokens=options.max_new_tokens,
            sampling=sampling_of(options),
            batch_size=options.batch_size,
            watch=self.watch,
            draws=lambda place: draws.pop(place),
        )
        with closing(written):
            for text in written:
                yield from _without_texts(waiting, samples)
                place, _ = waiting[0]
                said = [text, *(next(written) for _ in range(samples - 1))]
                assert said[0].id == place * samples
                waiting.popleft()
                yield said
            yield from _without_texts(waiting, samples)

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


def _without_texts(waiting: deque[tuple[int, str | None]], samples: int) -> Iterator[list[Explanation]]:
    """What stands for the texts of the first rows, as long as these have no direction."""
    while waiting and (status := waiting[0][1]) is not None:
        place, _ = waiting.popleft()
        yield [Explanation(place * samples + sample, "", status, 0) for sample in range(samples)]


def read_ahead(
    reader: Vectors, blocks: Iterable[np.ndarray | None], device: torch.device
) -> Generator[Any, None, None]:  # of tensors, and of None if a block is None
    """The vectors of each block of rows, float32 [n, d] on the device; the next block is read meanwhile.

    None, for nothing just now, is passed on behind the blocks that came before.
    """
    with ThreadPoolExecutor(1, "read-ahead", enter_device, (device,)) as pool:
        ahead: deque[Future[torch.Tensor]] = deque()
        for rows in blocks:
            if rows is None:
                while ahead:
                    yield ahead.popleft().result()
                yield None
                continue
            ahead.append(pool.submit(reader.torch, rows, device))
            if len(ahead) > 1:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def without_direction(norm: np.ndarray) -> list[str | None]:
    """For norms, float32 [n]: the status of a vector without a direction, None for one that has one."""
    return [None if np.isfinite(n) and n > 0 else ZERO if n == 0 else NONFINITE for n in norm]
