"""Repair: a damaged store is rewritten. What follows from undamaged arrays is restored, other sequences are dropped.

A dropped sequence keeps its number and has no rows. Every other sequence keeps its values bit for bit.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from nla_engine.engine.request import NextTokens
from nla_engine.errors import StoreError
from nla_engine.sites import Site
from nla_engine.store.arrays import ArrayReader
from nla_engine.store.care.damage import Damage
from nla_engine.store.care.verify import Check, Verification
from nla_engine.store.directory import staged
from nla_engine.store.empty import write_empty, write_metadata
from nla_engine.store.format import FORMAT_VERSION, Finish, layer_group, next_token_arrays
from nla_engine.store.lease import Lease
from nla_engine.store.manifest import Commit, Manifest
from nla_engine.store.objects import place
from nla_engine.store.records import LayerRows, SequenceRows
from nla_engine.store.shards import MEND
from nla_engine.store.writer import StoreWriter

#: Rows read and written at once.
GROUP_ROWS = 4096


@dataclass(frozen=True)
class Repair:
    """What a repair did.

    dropped: the fault, by number of the sequence; rows_lost: rows of the dropped sequences
    restored: damaged arrays of which every value followed from other arrays
    """

    dropped: Mapping[int, str]
    rows_lost: int
    restored: list[str]

    def __str__(self) -> str:
        lines = [
            f"repaired: {len(self.dropped)} sequences with {self.rows_lost} rows dropped, the others kept bit for bit",
            *(f"  sequence {number}: {fault}" for number, fault in self.dropped.items()),
            *(f"  {path}: restored from other arrays" for path in self.restored),
        ]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def repair(
    path: str | os.PathLike[str], progress: Callable[[int, int], None] | None = None
) -> tuple[list[Check], Repair | None]:
    """Verify the store and rewrite it if it is damaged. Returns the checks, and the repair or None if there was none.

    It needs room for a second store. Until it is done, the damaged store stays as it is.
    Raises StoreError if the damage belongs to no sequence or the store is being written, WriteError.
    """
    if not isinstance(place(path), Path):
        raise StoreError(
            f"{path}: repair needs a rename, which object stores do not have: repair a copy on a disk"
        )
    target = Path(os.path.realpath(path))
    manifest = Manifest.read(target)
    verification = Verification(target, manifest, progress)
    checks = list(verification.run())
    if all(check.ok for check in checks):
        return checks, None
    damage = verification.damage
    if verification.disagreement:
        raise StoreError(
            f"{target}: {verification.disagreement}: its arrays disagree, and dropping sequences would not help: "
            "restore it from a copy"
        )
    if unplaced := damage.unplaced():
        raise StoreError(
            f"{target}: {', '.join(unplaced)}: damaged, and the damage cannot be assigned to sequences: "
            "restore it from a copy"
        )
    if not damage.lost and not damage.restored:  # only the metadata is damaged
        _rewrite_metadata(target, manifest)
        return checks, Repair({}, 0, [])
    found = damage.sequences()
    lost = int(damage.values["sequences/row_size"][list(found)].sum())
    dropped = {  # only the fault: without the store's path and the advice
        int(damage.numbers[place]): fault.removeprefix(f"{target}/").removesuffix(f": {MEND}")
        for place, fault in found.items()
    }
    dropped = dict(sorted(dropped.items()))
    _rewrite(target, manifest, damage, dropped)
    return checks, Repair(dropped, lost, damage.restored)


def _rewrite_metadata(target: Path, manifest: Manifest) -> None:
    with Lease.of_directory(target):
        _unchanged(target, manifest)
        write_metadata(target, manifest)


def _unchanged(target: Path, manifest: Manifest) -> None:
    if Manifest.read(target) != manifest:
        raise StoreError(f"{target}: was written while it was verified: wait for the writer, then try again")


def _rewrite(target: Path, manifest: Manifest, damage: Damage, dropped: Mapping[int, str]) -> None:
    """Replace the store, in one step, by a new one with what is left."""
    start, text = damage.values["vocabulary/start"], damage.values["vocabulary/text"].tobytes()
    vocabulary = [text[a:b] for a, b in pairwise(start.tolist())]
    nothing = Commit(0, 0, 0, 0, dict.fromkeys(manifest.layers, 0), manifest.commit.epoch + 1, False, "")
    new = replace(
        manifest,
        store_id=uuid.uuid4().hex,
        commit=nothing,
        dropped={**manifest.dropped, **dropped},
        version=FORMAT_VERSION,
    )
    with staged(target, overwrite=True) as (staging, lease):
        _unchanged(target, manifest)
        write_empty(staging, new, vocabulary)
        with StoreWriter(staging, lease, new, commit_seconds=float("inf")) as writer:
            for group in _groups(target, manifest, damage, set(damage.sequences())):
                writer.append_many(group)
            writer.close(complete=manifest.commit.complete)


def _groups(
    root: Path, manifest: Manifest, damage: Damage, dropped: set[int]
) -> Iterator[list[SequenceRows]]:
    """Every sequence as stored, dropped ones as they will be in the new store. dropped: their places."""
    values, lengths = damage.values, manifest.lengths()
    readers = {
        name: ArrayReader(root, spec, lengths[spec.unit])
        for name, spec in manifest.specs().items()
        if spec.trailing
    }
    silent = set(damage.sequences(["tokens", "source_bytes", "sequences"]))
    sizes = values["sequences/row_size"]
    first = 0
    while first < len(sizes):
        if first in dropped:
            number, nothing = int(damage.numbers[first]), _next_tokens(manifest, {})
            yield [_sequence(first, values, _no_rows(manifest), first in silent, number, nothing)]
            first += 1
            continue
        last, rows = first + 1, int(sizes[first])
        while last < len(sizes) and last not in dropped and rows + sizes[last] <= GROUP_ROWS:
            rows += int(sizes[last])
            last += 1
        start = int(values["sequences/row_start"][first])
        layers = {
            layer: _layer_rows(layer, manifest, readers, values, start, start + rows)
            for layer in manifest.layers
        }
        told = {
            name: readers[path].read(start, start + rows)
            if (path := f"rows/{name}") in readers
            else values[path][start : start + rows]
            for name in next_token_arrays(manifest.next_token)
        }
        group = []
        for at in range(first, last):
            begin = int(values["sequences/row_start"][at]) - start
            held = {k: _slice(rows, begin, begin + int(sizes[at])) for k, rows in layers.items()}
            part = slice(begin, begin + int(sizes[at]))
            mine = {name: array[part] for name, array in told.items()}
            number = int(damage.numbers[at])
            group.append(_sequence(at, values, held, False, number, _next_tokens(manifest, mine)))
        yield group
        first = last


def _sequence(
    at: int,
    values: Mapping[str, np.ndarray],
    layers: Mapping[Site, LayerRows],
    silent: bool,
    number: int,
    next_tokens: NextTokens | None,
) -> SequenceRows:
    """The sequence stored at `at` with these rows. silent: its text and record are lost, so it has none."""

    def part(prefix: str) -> slice:
        start = int(values[f"sequences/{prefix}_start"][at])
        return slice(start, start + int(values[f"sequences/{prefix}_size"][at]))

    kept = len(next(iter(layers.values())).norm)
    rows = slice(part("row").start, part("row").start + kept)
    return SequenceRows(
        token_id=values["rows/token_id"][rows],
        next_token_id=values["rows/next_token_id"][rows],
        position=values["rows/position"][rows],
        flags=values["rows/flags"][rows],
        layers=layers,
        tokens=np.zeros(0, np.int32) if silent else values["sequences/tokens"][part("token")],
        prompt_size=0 if silent else int(values["sequences/prompt_size"][at]),
        finish=Finish.GIVEN if silent else Finish(int(values["sequences/finish"][at])),
        source=b"{}" if silent else values["sequences/source"][part("source")].tobytes(),
        next_tokens=next_tokens,
        number=number,
    )


def _next_tokens(manifest: Manifest, held: Mapping[str, np.ndarray]) -> NextTokens | None:
    """The arrays of a sequence's rows; of no rows where `held` has none; None if the store keeps none."""
    if (top := manifest.next_token) is None:
        return None
    n = len(held.get("next_logprob", ()))
    nothing = {
        "next_logprob": np.zeros(n, np.float32),
        "top_id": np.zeros((n, top), np.int32),
        "top_logprob": np.zeros((n, top), np.float32),
    }
    return NextTokens(**{**nothing, **held})


def _layer_rows(
    layer: Site,
    manifest: Manifest,
    readers: Mapping[str, ArrayReader],
    values: Mapping[str, np.ndarray],
    start: int,
    stop: int,
) -> LayerRows:
    """Rows [start, stop) as stored."""
    group = layer_group(layer)
    exact_row = values[f"{group}/exact_row"]
    first, last = np.searchsorted(exact_row, [start, stop]).tolist()
    scales = readers.get(f"{group}/scales")
    return LayerRows(
        codes=readers[f"{group}/codes"].read(start, stop),
        scales=scales.read(start, stop) if scales else np.empty((stop - start, 0), np.float16),
        norm=values[f"{group}/norm"][start:stop],
        exact_index=exact_row[first:last] - start,
        exact=readers[f"{group}/exact"].read(first, last),
    )


def _slice(rows: LayerRows, start: int, stop: int) -> LayerRows:
    first, last = np.searchsorted(rows.exact_index, [start, stop])
    return LayerRows(
        codes=rows.codes[start:stop],
        scales=rows.scales[start:stop],
        norm=rows.norm[start:stop],
        exact_index=rows.exact_index[first:last] - start,
        exact=rows.exact[first:last],
    )


def _no_rows(manifest: Manifest) -> dict[Site, LayerRows]:
    codec = manifest.codec
    empty = np.zeros((0, codec.d_model), np.float32)
    return {layer: LayerRows.encode(codec, empty, manifest.sink_norm[layer]) for layer in manifest.layers}
