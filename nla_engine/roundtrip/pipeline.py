"""Rows, their texts and their scores on the way into the table. The AV generates; in the background the AR scores.

Either may be missing: without an AR nothing is scored, without an AV the texts are there already.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch

from nla_engine.engine.streams import side_stream
from nla_engine.roundtrip import score
from nla_engine.roundtrip.background import AtOnce, Background
from nla_engine.roundtrip.pair import Pair
from nla_engine.roundtrip.results import nullable, of_layer
from nla_engine.roundtrip.rows import row_columns
from nla_engine.roundtrip.score import Controls
from nla_engine.roundtrip.slots import Slots
from nla_engine.roundtrip.texts import NONFINITE, ZERO, Block, Texts, Vectors, Written
from nla_engine.roundtrip.verbalize import Explanation
from nla_engine.sites import Site
from nla_engine.store import CaptureStore, LayerReader

#: Explanations scored and committed together; fewer if this many seconds have passed.
CHUNK = 512
COMMIT_SECONDS = 30.0
#: Explanations per turn, when AV and AR take turns. A run killed before the AR's turn loses some minutes of work.
TURN = 16384


@dataclass(frozen=True)
class Explained:
    """rows: int64 [n], those of a row together; written: a text for each."""

    rows: np.ndarray
    written: list[Explanation]


@dataclass(frozen=True)
class Item:
    """A part of the rows that one process works on. rows: int64 [n], at least one; first: place of the first one among
    all selected rows."""

    number: int
    rows: np.ndarray
    first: int


class Pipeline:
    """Explains and scores rows of one layer. write: called with the columns of a chunk of texts, in order.

    controls: what scores are held against, of the layer and of others that the AR gives too; empty: nothing is scored
    longest: tokens of the longest text that the AV may write
    slots: the vectors of each row that enter the AV; None: the row's own
    """

    def __init__(
        self,
        store: CaptureStore,
        layer: Site,
        pair: Pair,
        texts: Texts,
        controls: Mapping[Site, Controls],
        write: Callable[[dict[str, Any]], None],
        longest: int | None = None,
        slots: Slots | None = None,
    ) -> None:
        self.store, self.layer, self.pair = store, layer, pair
        self.texts, self.controls, self.write, self.longest = texts, controls, write, longest
        self.slots = slots
        device = pair.device
        self._stream = side_stream(device) if device.type == "cuda" else None
        self._reader: LayerReader
        self._vectors: Vectors  # that enter the AV

    def run(self, rows: np.ndarray, first: int) -> None:
        """Explain, score and write these rows. first: place of rows[0] among all selected rows."""
        self._vectors = self.vectors()
        turn = max(self.texts.rows_of(TURN), 1) if self.pair.in_turns else len(rows)
        for start in range(0, len(rows), turn):
            part = rows[start : start + turn]
            self.pair.verbalize_next()
            if not self.pair.in_turns:
                self._prepare_ar()
            with self._worker() as background, closing(self._chunks(part, first + start)) as chunks:
                ready: Iterable[Explained] = chunks
                if self.pair.in_turns:
                    ready = list(chunks)
                    self.pair.reconstruct_next()
                for chunk in ready:
                    background.submit(lambda chunk=chunk: self.write(self.columns(chunk)))  # type: ignore[misc]

    def _worker(self) -> Background | AtOnce:
        """What the AR works in."""
        return Background(self._stream) if self.pair.ranks is None else AtOnce()

    def stream(self, items: Iterator[Item | None]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Explain and score items; (number, columns) of each. Writes nothing, and keeps the models full between items.

        items: read when there is room for more; None: nothing just now. Some may be left when it ends.
        """
        self._vectors = self.vectors()
        in_turns = self.pair.in_turns
        most = max(self.texts.rows_of(TURN), 1) if in_turns else None
        taken: deque[Item] = deque()

        def blocks() -> Iterator[Block | None]:
            rows = 0
            while (most is None or rows < most) and (item := next(items, ...)) is not ...:
                if item is not None:
                    rows += len(item.rows)
                    taken.append(item)
                yield None if item is None else (item.rows, item.first)

        def scored() -> Iterator[tuple[int, dict[str, Any]]]:
            while not ready.empty():
                yield ready.get()

        self.pair.verbalize_next()
        if not in_turns:
            self._prepare_ar()
        ready: SimpleQueue[tuple[int, dict[str, Any]]] = SimpleQueue()
        held: list[tuple[int, Explained]] = []
        with (
            self._worker() as background,
            closing(self._of_blocks(blocks())) as texts,
        ):

            def submit(number: int, chunk: Explained) -> None:
                background.submit(lambda: ready.put((number, self.columns(chunk))))

            group: list[list[Explanation]] = []
            for said in texts:
                group.append(said)
                if len(group) < len(taken[0].rows):
                    continue
                item = taken.popleft()
                owners = np.repeat(item.rows, [len(each) for each in group])
                chunk = Explained(owners, [text for each in group for text in each])
                group = []
                if in_turns:
                    held.append((item.number, chunk))
                else:
                    submit(item.number, chunk)
                    yield from scored()
            if in_turns:
                self.pair.reconstruct_next()
                for number, chunk in held:
                    submit(number, chunk)
                    yield from scored()
        yield from scored()

    def _of_blocks(self, blocks: Iterator[Block | None]) -> Generator[list[Explanation], None, None]:
        """The texts of each row of the blocks. It may end before these do, once all texts so far have left."""
        if isinstance(self.texts, Written):
            yield from self.texts.of_blocks(self._vectors, blocks)
            return
        for block in blocks:
            if block is None:
                return
            yield from self.texts.of_rows(self._vectors, *block)

    def vectors(self) -> Vectors:
        """What enters the AV, by row. Opens the layer anew: a followed store has grown."""
        self._reader = self.store.layer(self.layer)
        return self._reader if self.slots is None else self.slots.vectors(self.store)

    def _prepare_ar(self) -> None:
        """Let the AR allocate its memory before the AV takes what is free. Returns when it has."""
        if self.pair.reconstructor is None or self.longest is None:
            return
        longest = self.longest
        with self._worker() as background:
            background.submit(lambda: self.pair.ar.prepare(longest))

    def _chunks(self, rows: np.ndarray, first: int) -> Generator[Explained, None, None]:
        """The texts, CHUNK at a time, fewer if they take long; those of a row stay together."""
        owners: list[np.ndarray] = []
        group: list[Explanation] = []
        since, texts = time.monotonic(), self.texts
        with closing(texts.of_rows(self._vectors, rows, first)) as written:
            for place, said in enumerate(written):
                group += said
                owners.append(np.repeat(rows[place], len(said)))
                number = first + place + 1  # of the next row
                last = place + 1 == len(rows)
                following = 0 if last else texts.up_to_row(number + 1) - texts.up_to_row(number)
                late = time.monotonic() - since >= COMMIT_SECONDS
                if late or len(group) + following > CHUNK or last:
                    yield Explained(np.concatenate(owners), group)
                    owners, group, since = [], [], time.monotonic()

    def columns(self, chunk: Explained) -> dict[str, Any]:
        """The columns of a chunk, except those that need Var."""
        described = row_columns(self.store, self._reader, chunk.rows)
        scores = self._score(chunk) if self.controls else {}
        return described | self.texts.columns(chunk.written) | scores

    def _score(self, chunk: Explained) -> dict[str, Any]:
        """The AR's columns of a chunk: its vectors against the rows' own, and against the controls."""
        rows, written = chunk.rows, chunk.written
        sound = torch.tensor([e.status not in (ZERO, NONFINITE) for e in written])
        read = self.pair.ar.reconstruct_layers(
            [e.text for e, s in zip(written, sound.tolist(), strict=True) if s]
        )
        sequence, position = (self.store.column(name)[rows] for name in ("sequence", "position"))
        columns: dict[str, Any] = {}
        for site, controls in self.controls.items():
            own = site == self.layer
            v = (self._reader if own else self.store.layer(site)).torch(rows, self.pair.device)
            r = torch.full_like(v, torch.nan)
            r[sound.to(v.device)] = read[self.pair.ar.layer if own else site.layer]
            cos = score.cosine(v, r)
            if own:
                columns["best"] = score.best_of(rows, cos)
            scores = {
                "cos": nullable(cos),
                "mse_nrm": nullable(score.mse_nrm(cos)),
                "cos_shuffled": nullable(controls.shuffled(sequence, position, r)),
                "retrieval_rank": nullable(controls.rank(v, r), int),
            }
            columns |= {name if own else of_layer(name, site): scores[name] for name in scores}
        return columns
