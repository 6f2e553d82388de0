"""What a pair is trained on: rows of a store, with a text for each, split into trained and held-out documents."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nla_engine.config import TrainOptions
from nla_engine.errors import RequestError, StoreError
from nla_engine.models.documents import WINDOW
from nla_engine.roundtrip.rows import spread
from nla_engine.roundtrip.score import unit
from nla_engine.roundtrip.text_file import TextFile
from nla_engine.sites import Site
from nla_engine.store import CaptureStore
from nla_engine.store.sequences import StoredSequence
from nla_engine.train.rule import rule_texts

_READ_AT_ONCE = 8192
_SHARES = 1 << 32


@dataclass(frozen=True)
class Rows:
    """Rows of one part of the documents. row, sequence, position: int64 [n]; vectors: unit vectors, float32 [n, d], in
    host memory; texts: one for each.
    """

    row: np.ndarray
    sequence: np.ndarray
    position: np.ndarray
    vectors: torch.Tensor
    texts: Sequence[str]

    def __len__(self) -> int:
        return len(self.row)

    def only(self, chosen: np.ndarray) -> Rows:
        """Those at these places, int64 [m]."""
        return Rows(
            self.row[chosen],
            self.sequence[chosen],
            self.position[chosen],
            self.vectors[torch.from_numpy(chosen)],
            [self.texts[place] for place in chosen.tolist()],
        )


@dataclass(frozen=True)
class Data:
    """layer: of the vectors; documents: trained and held-out"""

    layer: int
    trained: Rows
    held_out: Rows
    documents: tuple[int, int]

    def fingerprint(self) -> str:
        """sha256 over all rows, their vectors and texts."""
        digest = hashlib.sha256()
        for part in (self.trained, self.held_out):
            digest.update(part.row.astype("<i8").tobytes())
            digest.update(part.vectors.numpy().tobytes())
            for text in part.texts:
                digest.update(f"{len(text)} {text}".encode())
        return digest.hexdigest()[:16]


def read_data(options: TrainOptions, store: CaptureStore, device: torch.device) -> Data:
    """The rows that the options select. device: where texts by rule are computed.

    RequestError or StoreError says what is wrong with rows or texts.
    """
    layer = store.chosen_layer(options.layer)
    if layer != Site(layer.layer):
        raise RequestError(
            f"{options.store}: holds {layer}: a pair is trained on outputs of blocks: capture these"
        )
    rows = np.arange(store.rows) if options.where is None else store.where(options.where)
    texts: dict[int, str] = {}
    if options.texts is not None:
        texts = _of_file(options, store, layer)
        rows = rows[np.isin(rows, list(texts))]
    rows = store.in_order(rows)
    if options.limit is not None and options.limit < len(rows):
        rows = rows[spread(len(rows), options.limit)]
    vectors = torch.empty(len(rows), store.d_model)
    reader = store.layer(layer)
    for start in range(0, len(rows), _READ_AT_ONCE):
        part = rows[start : start + _READ_AT_ONCE]
        vectors[start : start + len(part)] = unit(reader.torch(part))
    sound = vectors.isfinite().all(1)  # rows without a direction cannot be put into words
    rows, vectors = rows[sound.numpy()], vectors[sound]
    if not len(rows):
        what = "" if options.where is None else f" for --where {options.where!r}"
        raise StoreError(f"{options.store}: has no row to train on{what}")
    held, documents = _held_out(options, store, store.column("sequence")[rows])
    if options.text_field is not None:
        told = _of_field(options.text_field, store, rows)
    elif options.texts is not None:
        told = [texts[row] for row in rows.tolist()]
    else:
        told = rule_texts(store, rows, vectors, ~held, device)
    everything = Rows(rows, store.column("sequence")[rows], store.column("position")[rows], vectors, told)
    trained, held_out = (everything.only(np.flatnonzero(part)) for part in (~held, held))
    return Data(layer.layer, trained, held_out, documents)


def _of_file(options: TrainOptions, store: CaptureStore, layer: Site) -> dict[int, str]:
    """The first text of each row that the file names."""
    assert options.texts is not None
    file = TextFile.read(options.texts, store)
    if file.layer is not None and file.layer != layer:
        raise RequestError(f"{options.texts}: its texts are about layer {file.layer}, {layer} is trained")
    found: dict[int, str] = {}
    for number, text in enumerate(file.all()):
        found.setdefault(file.row_of(number), text)
    return {row: text for row, text in found.items() if text.strip()}


def _of_field(name: str, store: CaptureStore, rows: np.ndarray) -> list[str]:
    """A field of each row's record, as the training data of NLAs has it: one text for the row of each record."""
    owners, counts = np.unique(store.column("sequence")[rows], return_counts=True)
    if counts.max() > 1:
        raise RequestError(
            f"--text-field {name}: a record of {store.path} has several rows, so its text is not about one of them: "
            "give --texts with a text for each row"
        )
    texts: dict[int, str] = {}
    for sequence in store.some_sequences(owners):
        text = sequence.source.get(name) if isinstance(sequence.source, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise RequestError(
                f"--text-field {name}: the record of sequence {sequence.number} of {store.path} has no such text"
            )
        texts[sequence.number] = text
    return [texts[number] for number in store.column("sequence")[rows].tolist()]


def _held_out(
    options: TrainOptions, store: CaptureStore, sequence: np.ndarray
) -> tuple[np.ndarray, tuple[int, int]]:
    """bool [n], and how many documents are trained and held out: sequences of one document are on one side.

    A document's side follows from its name and the seed, not from what else the store holds.
    """
    owners = np.unique(sequence)
    side = {each.number: document_of(each) for each in store.some_sequences(owners)}
    held = {name: _share(name, options.seed) < options.held_out for name in set(side.values())}
    out = sum(held.values())
    if not 0 < out < len(held):
        raise RequestError(
            f"{options.store}: of {len(held)} documents {out} would be held out (--held-out {options.held_out:g}): "
            "some must be, and some must not: give more documents or another part"
        )
    return np.array([held[side[number]] for number in sequence.tolist()]), (len(held) - out, out)


def document_of(sequence: StoredSequence) -> str:
    """What tells a document from others: its id, else its window's document, else its record."""
    record: Any = sequence.source if isinstance(sequence.source, dict) else {}
    for name in ("doc_id", "id"):
        if record.get(name) is not None:
            return f"{name} {record[name]}"
    if isinstance(window := record.get(WINDOW), dict):
        return f"from {sequence.number - window['window']} on"  # the number of its first window
    return hashlib.sha256(sequence.record).hexdigest()


def _share(name: str, seed: int) -> float:
    """A number from 0 to 1 for a document."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return int.from_bytes(digest[:4], "big") / _SHARES
