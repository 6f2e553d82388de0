"""Rows through AV and AR. The AV generates; in the background, vectors are read ahead and the AR output is scored."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nla_engine.config import RoundtripOptions
from nla_engine.engine.streams import enter_device, side_stream
from nla_engine.ops.sampling import Sampling
from nla_engine.roundtrip import score
from nla_engine.roundtrip.background import Background
from nla_engine.roundtrip.pair import Pair
from nla_engine.roundtrip.results import nullable
from nla_engine.roundtrip.score import Controls
from nla_engine.roundtrip.verbalize import Explanation
from nla_engine.store import CaptureStore, LayerReader, RowFlag

#: Explanations scored and committed together; fewer if this many seconds have passed.
CHUNK = 512
COMMIT_SECONDS = 30.0
#: Vectors per block; one block is read ahead.
READ_AHEAD = 1024
#: Explanations per turn, when AV and AR take turns. A run killed before the AR's turn loses some minutes of work.
TURN = 16384


@dataclass(frozen=True)
class Explained:
    """rows: int64 [n], each row `samples` times in succession; written: the explanation of each."""

    rows: np.ndarray
    written: list[Explanation]


class Pipeline:
    """Explains rows of one layer. write: called with the columns of a chunk of explanations, in order."""

    def __init__(
        self,
        options: RoundtripOptions,
        store: CaptureStore,
        layer: int,
        pair: Pair,
        controls: Controls,
        write: Callable[[dict[str, Any]], None],
    ) -> None:
        self.options, self.store, self.layer = options, store, layer
        self.pair, self.controls, self.write = pair, controls, write
        device = pair.device
        self._stream = side_stream(device) if device.type == "cuda" else None
        self._reader: LayerReader

    def run(self, rows: np.ndarray, first: int) -> None:
        """Explain, score and write these rows. first: place of rows[0] among all selected rows.

        Places seed the random numbers, so neither segments nor resuming change a sampled text.
        """
        self._reader = self.store.layer(self.layer)  # a followed store has grown
        turn = max(TURN // self.options.samples, 1) if self.pair.in_turns else len(rows)
        for start in range(0, len(rows), turn):
            part = rows[start : start + turn]
            self.pair.verbalize_next()
            if not self.pair.in_turns:
                self._prepare_ar()
            with Background(self._stream) as background, closing(self._chunks(part, first + start)) as chunks:
                ready: Iterable[Explained] = chunks
                if self.pair.in_turns:
                    ready = list(chunks)
                    self.pair.reconstruct_next()
                for chunk in ready:
                    background.submit(lambda chunk=chunk: self.write(self._score(chunk)))  # type: ignore[misc]

    def _prepare_ar(self) -> None:
        """Let the AR allocate its memory before the AV takes what is free. Returns when it has."""
        with Background(self._stream) as background:
            background.submit(lambda: self.pair.reconstructor.prepare(self.options.max_new_tokens))

    def _chunks(self, rows: np.ndarray, first: int) -> Generator[Explained, None, None]:
        """The explanations, CHUNK at a time, fewer if they take long; the samples of a row stay together."""
        samples, start, since = self.options.samples, 0, time.monotonic()
        group: list[Explanation] = []
        with closing(self._explanations(rows, first)) as written:
            for place in range(len(rows)):
                group += [next(written) for _ in range(samples)]
                late = time.monotonic() - since >= COMMIT_SECONDS
                if late or len(group) + samples > CHUNK or place + 1 == len(rows):
                    yield Explained(np.repeat(rows[start : place + 1], samples), group)
                    group, start, since = [], place + 1, time.monotonic()

    def _explanations(self, rows: np.ndarray, first: int) -> Generator[Explanation, None, None]:
        """In order, `samples` per row. Vectors without a direction get a status instead of a text."""
        options = self.options
        norm = self._reader.norm_at(rows)
        sound = np.isfinite(norm) & (norm > 0)
        written = self.pair.verbalizer.explain(
            self._vectors(rows, np.flatnonzero(sound), first),
            samples=options.samples,
            max_new_tokens=options.max_new_tokens,
            sampling=Sampling(options.temperature, options.seed),
            batch_size=options.batch_size,
        )
        with closing(written):
            for place in range(len(rows)):
                for sample in range(options.samples):
                    if sound[place]:
                        yield next(written)
                    else:
                        status = "zero_vector" if norm[place] == 0 else "nonfinite_vector"
                        yield Explanation((first + place) * options.samples + sample, "", status, 0)

    def _vectors(
        self, rows: np.ndarray, places: np.ndarray, first: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """(place among all selected rows, float32 [d] on the device) for rows[places], read one block ahead."""
        reader, device = self._reader, self.pair.device
        blocks = [places[start : start + READ_AHEAD] for start in range(0, len(places), READ_AHEAD)]
        with ThreadPoolExecutor(1, "read-ahead", enter_device, (device,)) as pool:
            ahead = [pool.submit(reader.torch, rows[block], device) for block in blocks[:1]]
            for number, block in enumerate(blocks):
                vectors = ahead.pop().result()
                if number + 1 < len(blocks):
                    ahead.append(pool.submit(reader.torch, rows[blocks[number + 1]], device))
                yield from zip((block + first).tolist(), vectors, strict=True)

    def _score(self, chunk: Explained) -> dict[str, Any]:
        """The columns of a chunk, except those that need Var."""
        store, samples, rows, written = self.store, self.options.samples, chunk.rows, chunk.written
        v = self._reader.torch(rows, self.pair.device)
        sequence = store.column("sequence")[rows]
        sound = torch.tensor([e.status not in ("zero_vector", "nonfinite_vector") for e in written])
        r = torch.full_like(v, torch.nan)
        r[sound.to(v.device)] = self.pair.reconstructor.reconstruct(
            [e.text for e, s in zip(written, sound.tolist(), strict=True) if s]
        )
        cos = score.cosine(v, r)
        rank = self.controls.rank(v, r)
        flags = store.column("flags")[rows]
        best = np.zeros((len(rows) // samples, samples), bool)
        ordered = np.where(np.isfinite(cos), cos, -2.0).reshape(best.shape)
        best[np.arange(len(best)), ordered.argmax(1)] = True
        return {
            "row": rows,
            "sequence": sequence,
            "position": store.column("position")[rows],
            "token": store.token_text(store.column("token_id")[rows]),
            "next_token": store.token_text(store.column("next_token_id")[rows]),
            "generated": (flags & RowFlag.GENERATED) != 0,
            "early": (flags & RowFlag.EARLY) != 0,
            "norm": self._reader.norm_at(rows),
            "sample": [e.id % samples for e in written],
            "best": best.reshape(-1),
            "explanation": [e.text for e in written],
            "status": [e.status for e in written],
            "n_tokens": [e.n_tokens for e in written],
            "cos": nullable(cos),
            "mse_nrm": nullable(score.mse_nrm(cos)),
            "cos_shuffled": nullable(self.controls.shuffled(rows, sequence, r)),
            "retrieval_rank": nullable(rank, int),
        }
