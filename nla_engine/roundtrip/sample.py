"""A few texts, written and timed, and what they say of all the others: for dry runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nla_engine.engine.forecast import Forecast, Tally
from nla_engine.models.tokens import excerpt
from nla_engine.roundtrip.rows import spread

#: Of a sample: most texts, and how many neighbouring rows are taken at once.
SAMPLE = {"cpu": (32, 8), "cuda": (1024, 128)}
#: New tokens of one text, which is written if no text of the sample ended in time.
SHORT = 8
#: Lines of a table that say how well lines are compressed together.
_ENOUGH_LINES = 8
#: Most seconds of writing.
WRITE_SECONDS = 8.0


class Enough(Exception):
    """Ends the sample."""


@dataclass(frozen=True)
class Timing:
    """took: seconds of the sample; seconds: of the whole work, None if the sample was too short to say; tokens: of a
    text, as long as it may be if none ended by itself."""

    took: float
    seconds: float | None
    tokens: float


class Timed:
    """Watches what a generator does of a work, and raises Enough after so many seconds. forecast: of the whole work."""

    def __init__(self, forecast: Forecast, most_seconds: float) -> None:
        self._forecast, self._most = forecast, most_seconds
        self._started = time.perf_counter()
        self._first: tuple[float, float] | None = None  # when it was called first, and the part that was done
        self._tally: Callable[[], Tally] = Tally

    def __call__(self, tally: Callable[[], Tally]) -> None:
        """See `engine.generator.Watch`."""
        self._tally = tally
        at = time.perf_counter()
        if self._first is None:
            self._first = (at, self._forecast.part(tally()))
        elif at - self._first[0] > self._most:
            raise Enough

    def timing(self) -> Timing:
        """Once the sample has ended."""
        ended, at = time.perf_counter(), self._tally()
        part = self._forecast.part(at)
        since, begun = self._first if self._first and part > self._first[1] else (self._started, 0.0)
        seconds = (ended - since) / (part - begun) if part > begun else None
        tokens = float(self._forecast.survival(at)[:-1].sum()) if at.stopped else float(self._forecast.limit)
        return Timing(ended - self._started, seconds, tokens)


def evenly(rows: int, count: int, together: int) -> np.ndarray:
    """int64: about `count` numbers below `rows`, in evenly spread blocks of neighbours, ascending."""
    if rows <= max(count, together):
        return np.arange(min(rows, count))
    size = min(together, count)
    return (spread(rows - size + 1, count // size)[:, None] + np.arange(size)).ravel()


def table_bytes(sample: pa.Table, lines: int) -> float:
    """Bytes of so many lines like these as Parquet. The first one costs most: it brings the columns' statistics."""
    first = _parquet_bytes(sample.slice(0, 1))
    if len(sample) >= _ENOUGH_LINES:
        further = (_parquet_bytes(sample) - first) / (len(sample) - 1)
    else:  # all of them twice, which would cost nothing if it was compressed
        plain = {"use_dictionary": False, "compression": "none"}
        twice = pa.concat_tables([sample, sample])
        further = (_parquet_bytes(twice, **plain) - _parquet_bytes(sample, **plain)) / len(sample)
    return first + (lines - 1) * further


def bytes_per_token(texts: Sequence[str], n_tokens: Sequence[int]) -> float:
    """Of these texts, as UTF-8. n_tokens: of each"""
    return sum(len(text.encode()) for text in texts) / max(sum(n_tokens), 1)


def first_prompt(whose: str, tokenizer: Any, ids: Sequence[int]) -> str:
    """For people: what a model reads first."""
    text = excerpt(tokenizer.decode(list(ids), skip_special_tokens=False))
    lines = "\n".join("    " + line for line in text.splitlines())
    return f"the first prompt of the {whose}, {len(ids):,} tokens:\n{lines}"


def _parquet_bytes(table: pa.Table, **how: Any) -> int:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **how)
    return int(sink.getvalue().size)
