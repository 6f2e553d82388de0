"""A store opened for reading: what is committed, and nothing else.

A reader shows the last commit when it was opened. `refresh` moves it to the newest, so a store can be followed while it
grows. Vectors come as stored; `nla_engine.store.views.capture_store` decodes them.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any, Self

import numpy as np

from nla_engine.codec.rows import Codec
from nla_engine.errors import StoreError
from nla_engine.sites import PARTS, RESID_POST, Site, listed
from nla_engine.store.arrays import ArrayReader
from nla_engine.store.format import IMPORTED, ArraySpec, layer_group
from nla_engine.store.layer import StoredLayer
from nla_engine.store.manifest import Commit, Manifest
from nla_engine.store.objects import Place, place
from nla_engine.store.sequences import SequenceTable, StoredSequence, Vocabulary


class StoreReader:
    """The committed rows and sequences of a store, with vectors as stored."""

    def __init__(self, path: Place, manifest: Manifest) -> None:
        self.path = path
        self._manifest = manifest
        self._vocabulary: Vocabulary | None = None
        self._columns: dict[str, np.ndarray] = {}
        self._sequence_table: SequenceTable | None = None

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Raises StoreError when there is no store at `path` that this version can read."""
        opened = place(path)
        return cls(opened, Manifest.read(opened))

    def refresh(self) -> bool:
        """Move to the newest commit; True if it changed. Layers and arrays handed out before keep the old one.

        Raises StoreError when another store has taken the place of this one.
        """
        manifest = Manifest.read(self.path)
        if manifest.store_id != self._manifest.store_id:
            raise StoreError(f"{self.path}: the store was replaced by another one: open it again")
        changed = manifest.commit != self.commit
        self._manifest, self._columns, self._sequence_table = manifest, {}, None
        return changed

    @property
    def commit(self) -> Commit:
        return self._manifest.commit

    @property
    def rows(self) -> int:
        return self.commit.rows

    @property
    def sequences(self) -> int:
        return self.commit.sequences

    @property
    def nbytes(self) -> int:
        """Total size of the files of this commit, computed from the manifest."""
        return self._manifest.nbytes()

    @property
    def complete(self) -> bool:
        """Whether the writer has finished; else it is still writing, or died."""
        return self.commit.complete

    @property
    def sites(self) -> tuple[Site, ...]:
        """All that rows were captured of: outputs of blocks, and sites inside them."""
        return self._manifest.layers

    @property
    def layers(self) -> tuple[int, ...]:
        """The blocks whose output was captured."""
        return tuple(site.layer for site in self.sites if site.part == RESID_POST)

    @property
    def codec(self) -> Codec:
        return self._manifest.codec

    @property
    def d_model(self) -> int:
        return self.codec.d_model

    @property
    def sink_norm(self) -> Mapping[Site, float]:
        """The norm above which a row is kept exactly, by site; that of a block's output by its number too."""
        return self._manifest.sink_norm

    @property
    def codec_error(self) -> Mapping[Site, Any]:
        """Measured error of the codec, by site as `sink_norm`; only of those where it was measured."""
        return self._manifest.codec_error

    @property
    def next_token(self) -> int | None:
        """How many of the likeliest next tokens each row has, beside the log-probability of the one that follows.

        None: neither.
        """
        return self._manifest.next_token

    @property
    def attributes(self) -> dict[str, Any]:
        """All that attributes["nla_engine"] holds."""
        return self._manifest.attributes()

    @property
    def provenance(self) -> Mapping[str, Any]:
        return self._manifest.provenance

    @property
    def options(self) -> Mapping[str, Any]:
        return self._manifest.options

    def check_tokens(self, otherwise: str) -> None:
        """StoreError if it was imported, so that its tokens are not known. otherwise: what is impossible then"""
        if IMPORTED in self.options:
            raise StoreError(f"{self.path}: was imported: its tokens are not known, so {otherwise}")

    def chosen_layer(self, layer: int | Site | None, part: str | None = None) -> Site:
        """The site of this layer, or for None of the only one that there is. StoreError if there are several.

        part: None for the block's output; of a store that holds none of any block, for the only part that it holds
        """
        if part is not None and part not in PARTS:
            raise StoreError(f"{part!r} is no site: choose one of {', '.join(PARTS)}")
        if isinstance(layer, Site) or (layer is not None and (part or self.layers)):
            return Site.at(layer, part or RESID_POST)
        wanted = part or (RESID_POST if self.layers else None)
        found = [site for site in self.sites if wanted in (None, site.part)]
        found = [site for site in found if layer in (None, site.layer)]
        if len(found) != 1:
            held = listed(found or self.sites)
            raise StoreError(f"{self.path}: holds {held}: name one of them")
        return found[0]

    def layer(self, number: int | Site, site: str | None = None) -> StoredLayer:
        """The vectors of one layer: the output of its block, or another site of it. StoreError if not captured."""
        chosen = self._site(number, site)
        if chosen not in self.sites:
            raise StoreError(
                f"{chosen.label} is not in {self.path}: it has {', '.join(map(str, self.sites))}"
            )
        return StoredLayer(self.codec, self.arrays(layer_group(chosen)))

    def _site(self, number: Any, part: str | None) -> Site:
        if part is not None and part not in PARTS:
            raise StoreError(f"{part!r} is no site: choose one of {', '.join(PARTS)}")
        if not isinstance(number, Integral | Site):
            held = ", ".join(map(str, self.sites))
            raise StoreError(f"layer {number!r} is not in {self.path}: it has {held}")
        return number if isinstance(number, Site) else Site.at(int(number), part or RESID_POST)

    def column(self, name: str) -> np.ndarray:
        """An array [rows] of the group `rows` (token_id, position, ...); cached, read-only."""
        if name not in self._columns:
            arrays = self.arrays("rows")
            if name not in arrays:
                raise StoreError(f"'{name}' is no column of the rows: choose one of {', '.join(arrays)}")
            values = arrays[name].read()
            values.flags.writeable = False
            self._columns[name] = values
        return self._columns[name]

    @property
    def vocabulary(self) -> Vocabulary:
        """The text of every token."""
        if self._vocabulary is None:
            arrays = self.arrays("vocabulary")
            self._vocabulary = Vocabulary(arrays["text"].read(), arrays["start"].read())
        return self._vocabulary

    def token_text(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """The text of each token on its own; empty for -1."""
        return [self.vocabulary.text(operator.index(token)) for token in ids]

    def sequence(self, number: int) -> StoredSequence:
        """One sequence. Raises IndexError when it is not committed, TypeError for what is no integer."""
        return next(self.some_sequences([operator.index(number)]))

    def iter_sequences(self, start: int = 0, stop: int | None = None) -> Iterator[StoredSequence]:
        """The committed sequences with numbers in [start, stop), in order. Raises IndexError for negative numbers."""
        if start < 0 or (stop is not None and stop < 0):
            raise IndexError("sequences are counted from 0: give numbers that are not negative")
        numbers = self.numbers
        chosen = numbers >= start if stop is None else (numbers >= start) & (numbers < stop)
        return self._table.read(numbers[chosen])

    def some_sequences(self, numbers: Sequence[int] | np.ndarray) -> Iterator[StoredSequence]:
        """The sequences with these numbers, in this order. Raises IndexError when one is not committed."""
        try:
            yield from self._table.read(np.asarray(numbers, np.int64))
        except IndexError as error:
            raise IndexError(f"{self.path}: {error}") from None

    @property
    def numbers(self) -> np.ndarray:
        """The numbers of the committed sequences, int64 [sequences], ascending.

        A sequence has the number of its prompt, whenever it was stored. Those of a complete store are 0 to
        `sequences` - 1.
        """
        return self._table.numbers

    def row_sizes(self) -> np.ndarray:
        """Rows of each sequence in the order in which they are stored, int64 [sequences]."""
        return self._table.row_sizes()

    @property
    def _table(self) -> SequenceTable:
        if self._sequence_table is None:
            self._sequence_table = SequenceTable(self.arrays("sequences"), self.vocabulary)
        return self._sequence_table

    def arrays(self, group: str) -> dict[str, ArrayReader]:
        """The arrays of a group by name, to read any part of them as stored."""
        lengths = self._manifest.lengths()
        specs: dict[str, ArraySpec] = self._manifest.specs()
        return {
            path.split("/")[1]: ArrayReader(self.path, spec, lengths[spec.unit])
            for path, spec in specs.items()
            if path.split("/")[0] == group
        }
