"""Joining stores without copying their rows: whole shard files get a second name (a hard link) in the new store.

A shard file can only be used as it is if its rows begin at a shard of the new store too, and no sequence may be cut in
two. So of each store the rows up to its last cut are linked: the last end of a sequence at which the shards of all
arrays end. Files are never changed after they are written, so two stores may share them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nla_engine.sites import Site
from nla_engine.store.arrays import ArrayReader
from nla_engine.store.format import ArraySpec
from nla_engine.store.manifest import METADATA_NAME
from nla_engine.store.objects import Place
from nla_engine.store.sequences import TABLE_COLUMNS
from nla_engine.store.shards import fsync_directory, sync_file_system, writing
from nla_engine.store.views.capture_store import CaptureStore
from nla_engine.store.writer import StoreWriter

#: Sequences, and rows kept exactly, read at once.
BLOCK = 4096
NAMED = ("prompt_size", "finish", "row_size", "token_size", "source_size")


@dataclass(frozen=True)
class Cut:
    """The first `sequences` of a store have the first `rows` rows, which fill whole shards of every array."""

    sequences: int = 0
    rows: int = 0


def cut_of(store: CaptureStore, narrow_shard_rows: int) -> Cut:
    """The last cut of a store; nothing if there is none."""
    ends = np.cumsum(store.row_sizes())
    places = np.flatnonzero((ends % narrow_shard_rows == 0) & (ends > 0))
    return Cut(int(places[-1]) + 1, int(ends[places[-1]])) if len(places) else Cut()


def can_link(store: Place, out: Place) -> bool:
    """Whether the files of a store can have names in another one: both lie on one file system that has hard links."""
    if not (isinstance(store, Path) and isinstance(out, Path)):
        return False
    trial = out / "rows" / f".{METADATA_NAME}.linked"
    try:
        os.link(store / METADATA_NAME, trial)
    except OSError:
        return False
    finally:
        with contextlib.suppress(OSError):
            trial.unlink()
    return True


def append_linked(store: CaptureStore, writer: StoreWriter, cut: Cut, first_number: int) -> None:
    """Append the sequences before the cut to a store without room, linking their rows.

    first_number: of the sequence that is number 0 in the store
    """
    assert isinstance(store.path, Path) and isinstance(writer.path, Path)
    source, target = store.path, writer.path

    def link(spec: ArraySpec, first: int) -> bool:
        if spec.path == "rows/sequence" and first_number:
            return False
        _link_shards(source, target, spec, cut.rows // spec.shard_rows, first)
        return True

    exact = {site: _exact(store, site, cut.rows) for site in store.sites}
    writer.append_linked(_tables(store, cut.sequences, first_number), exact, cut.rows, link)


def _link_shards(source: Path, target: Path, spec: ArraySpec, count: int, first: int) -> None:
    """The first `count` shards of an array, as those from number `first` on of another store, durably. Raises
    WriteError."""
    for shard in range(count):
        path = target / spec.shard_path(first + shard)
        with writing(path):
            path.parent.mkdir(exist_ok=True)
            path.unlink(missing_ok=True)
            os.link(source / spec.shard_path(shard), path)
    directory = target / spec.path / "c"
    with writing(directory):
        if count and not sync_file_system(directory):
            for made in {(target / spec.shard_path(first + shard)).parent for shard in range(count)} | {
                directory
            }:
                fsync_directory(made)


def _exact(store: CaptureStore, site: Site, rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The exact rows among the first `rows` of a site, some at a time: int64 [m], uint16 [m, d]."""
    layer = store.layer(site)
    count = int(np.searchsorted(layer.exact_row, rows))
    for start in range(0, count, BLOCK):
        stop = min(start + BLOCK, count)
        yield layer.exact_row[start:stop], layer.arrays["exact"].read(start, stop)


def _tables(store: CaptureStore, count: int, first_number: int) -> Iterator[dict[str, np.ndarray]]:
    """The entries of the first `count` sequences, some at a time."""
    table = store.arrays("sequences")
    for first in range(0, count, BLOCK):
        last = min(first + BLOCK, count)
        yield table_of(table, first, last, first_number)


def table_of(
    table: dict[str, ArrayReader], first: int, last: int, first_number: int
) -> dict[str, np.ndarray]:
    """The entries of the sequences stored at [first, last), and their tokens and prompt records, end to end."""
    known = {name: table[name].read(first, last) for name in TABLE_COLUMNS}
    numbers = table["number"].read(first, last) if "number" in table else np.arange(first, last)
    values = {name: known[name] for name in NAMED}
    values["number"] = numbers + first_number
    for array, name in (("tokens", "token"), ("source", "source")):
        begin, end = known[f"{name}_start"], known[f"{name}_start"] + known[f"{name}_size"]
        values[array] = table[array].read(int(begin[0]), int(end[-1]))
    return values
