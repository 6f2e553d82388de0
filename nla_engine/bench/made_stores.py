"""Stores of made-up sequences, of any number of rows, layers, and rows per sequence, and what must be found in them.

A few sequences are encoded and repeated. They come in the order in which sequences end: near that of their numbers.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from nla_engine.codec.rows import Codec
from nla_engine.sites import Site
from nla_engine.store import Finish, LayerRows, SequenceRows, StoreWriter, row_flags

#: Channels, tokens in the vocabulary, rows that are encoded, sequences that end together.
WIDTH, _VOCABULARY, _DISTINCT_ROWS, _TOGETHER = 16, 50_000, 8_192, 64
#: The token and the field of the prompt records that rows are chosen by, and how many values that field has.
_TOKEN, _PART, _PARTS = 0, 3, 8
WHERE = f"next_token == 't{_TOKEN}' and position >= 2 and record.part == {_PART}"


@dataclass(frozen=True)
class Made:
    """A store of `rows` rows of each of `layers` layers, in sequences of `length` rows; the last one may be shorter."""

    rows: int
    length: int = 128
    layers: int = 1

    @property
    def sequences(self) -> int:
        return -(-self.rows // self.length)

    @property
    def fitting(self) -> int:
        """Rows that WHERE chooses."""
        here = [_fitting(sequence.tokens) for sequence in self._distinct]
        whole, rest = divmod(self.rows, self.length)
        numbers = np.arange(whole)
        count = int(np.array(here)[numbers % len(here)][numbers % _PARTS == _PART].sum())
        if rest and whole % _PARTS == _PART:
            count += _fitting(self._distinct[whole % len(here)].tokens[:rest])
        return count

    def write(self, path: str | os.PathLike[str]) -> int:
        """Write it, complete, as a capture does. Returns the rows."""
        sites = [Site(number) for number in range(self.layers)]
        order = np.random.default_rng(0).permutation(_TOGETHER)
        with StoreWriter.create(
            path,
            layers=sites,
            codec=Codec.named("int8", WIDTH),
            sink_norm=dict.fromkeys(sites, math.inf),
            vocabulary=[f"t{token}".encode() for token in range(_VOCABULARY)],
            provenance={"model": "made up"},
            options={"prompts": str(Path(path).name)},
        ) as writer:
            for start in range(0, self.sequences, _TOGETHER):
                numbers = start + order
                ended = numbers[numbers < self.sequences].tolist()
                writer.append_many([self._sequence(number) for number in ended])
        return writer.rows

    def _sequence(self, number: int) -> SequenceRows:
        sequence = self._distinct[number % len(self._distinct)]
        if (size := min(self.length, self.rows - number * self.length)) < self.length:
            sequence = _of(sequence.tokens[:size], sequence.layers)
        source = json.dumps({"part": number % _PARTS, "text": "made up"}).encode()
        return replace(sequence, number=number, source=source)

    @cached_property
    def _distinct(self) -> list[SequenceRows]:
        rng, count = np.random.default_rng(0), max(_DISTINCT_ROWS // self.length, 1)
        # Some tokens are common and most are rare, as in texts.
        tokens = (_VOCABULARY * rng.random((count, self.length)) ** 4).astype(np.int32)
        vectors = rng.standard_normal((count, self.length, WIDTH), dtype=np.float32)
        codec = Codec.named("int8", WIDTH)
        made = []
        for ids, rows in zip(tokens, vectors, strict=True):
            encoded = LayerRows.encode(codec, rows, math.inf)
            made.append(_of(ids, {Site(layer): encoded for layer in range(self.layers)}))
        return made


def _of(tokens: np.ndarray, layers: Mapping[Site, LayerRows]) -> SequenceRows:
    """A sequence of these tokens, int32 [n], with the first n rows of each layer."""
    n = len(tokens)
    position = np.arange(n, dtype=np.int32)
    parts = ("codes", "scales", "norm")
    return SequenceRows(
        token_id=tokens,
        next_token_id=np.append(tokens[1:], np.int32(-1)),
        position=position,
        flags=row_flags(position, 1, n),
        layers={
            site: replace(rows, **{name: getattr(rows, name)[:n] for name in parts})
            for site, rows in layers.items()
        },
        tokens=tokens,
        prompt_size=1,
        finish=Finish.LENGTH,
        source=b"{}",
    )


def _fitting(tokens: np.ndarray) -> int:
    """Rows of a sequence with the token and position of WHERE."""
    following, position = tokens[1:], np.arange(len(tokens) - 1)
    return int(np.count_nonzero((following == _TOKEN) & (position >= 2)))
