"""Verification: every committed byte of a store, and every relation between its arrays.

Knows nothing of models; whether the vectors are the right ones is not decided here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nla_engine.codec import ordinary_rows
from nla_engine.errors import StoreError
from nla_engine.store.arrays import ArrayReader
from nla_engine.store.format import (
    ATTRIBUTE,
    EARLY_POSITIONS,
    NO_TOKEN,
    ArraySpec,
    Finish,
    RowFlag,
    layer_group,
)
from nla_engine.store.manifest import METADATA_NAME, Manifest
from nla_engine.store.shards import TEMPORARY_SUFFIX

Progress = Callable[[int, int], None]
SHOWN = 5


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. detail: what was found, in words."""

    name: str
    ok: bool
    detail: str


def verify(path: str | os.PathLike[str], progress: Progress | None = None) -> list[Check]:
    """Read all that is committed and return one check for each array and relation.

    progress is called with (shards read, shards in all). Raises StoreError when there is no store to verify.
    """
    root = Path(path)
    return list(_Verification(root, Manifest.read(root), progress).run())


class _Verification:
    """One pass over one store."""

    def __init__(self, root: Path, manifest: Manifest, progress: Progress | None) -> None:
        self._root = root
        self._manifest = manifest
        self._specs = manifest.specs()
        self._lengths = manifest.lengths()
        self._progress = progress
        self._shards = sum(-(-self._lengths[spec.unit] // spec.shard_rows) for spec in self._specs.values())
        self._shards_read = 0
        self._values: dict[str, np.ndarray] = {}

    def run(self) -> Iterator[Check]:
        commit = self._manifest.commit
        state = "complete" if commit.complete else "not complete: a writer is at work, or died"
        yield Check("manifest", True, f"{commit.rows} rows of {commit.sequences} sequences, {state}")
        yield self._consolidated()
        yield self._names()
        damaged: dict[str, list[tuple[int, int, str]]] = {}
        for name, spec in self._specs.items():
            yield self._metadata(spec)
            damaged[name] = self._damage(spec)
            detail = f"{self._lengths[spec.unit]} x {list(spec.trailing)}, checksums match"
            if damaged[name]:
                detail = "; ".join(text for _, _, text in damaged[name][:SHOWN])
                if len(damaged[name]) > SHOWN:
                    detail += f"; and {len(damaged[name]) - SHOWN} more"
            yield Check(f"{name} data", not damaged[name], detail)
        yield self._damaged_sequences(damaged)
        yield from self._relations()

    def _consolidated(self) -> Check:
        """The metadata that the manifest repeats, against the format and the commit beside it."""
        document = json.loads(
            (self._root / METADATA_NAME).read_bytes()
        )  # again: a live writer may have moved on
        manifest = Manifest.from_attributes(document["attributes"][ATTRIBUTE])
        ok = document.get("consolidated_metadata") == manifest.consolidated_metadata()
        return Check(
            "consolidated metadata", ok, "fits" if ok else "differs from the format or from the commit"
        )

    def _names(self) -> Check:
        known = {METADATA_NAME, *(name.split("/")[0] for name in self._specs)}
        found = set(os.listdir(self._root)) - {METADATA_NAME + TEMPORARY_SUFFIX}
        detail = [f"'{name}' is missing" for name in sorted(known - found)]
        detail += [f"'{name}' is no part of a store" for name in sorted(found - known)]
        return Check("names", not detail, "; ".join(detail) or "all there, nothing foreign")

    def _metadata(self, spec: ArraySpec) -> Check:
        """The array's zarr.json against the format. After a crash its shape may lag behind the commit."""
        name, length = f"{spec.path} metadata", self._lengths[spec.unit]
        try:
            found: Any = json.loads((self._root / spec.path / METADATA_NAME).read_bytes())
            (shown, *_), wanted = found["shape"], spec.metadata(length)
            wrong = [key for key in wanted if key != "shape" and found.get(key) != wanted[key]]
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            return Check(name, False, f"{type(error).__name__}: {error}")
        if wrong:
            return Check(name, False, f"differs from the format in {', '.join(wrong)}")
        if shown == length:
            return Check(name, True, f"{spec.dtype.name} {wanted['shape']}")
        detail = f"shows {shown} values, {length} are committed"
        if self._manifest.commit.complete:
            return Check(name, False, detail)
        return Check(
            name, True, detail + ": the writer is between two steps, or died there (resume mends it)"
        )

    def _damage(self, spec: ArraySpec) -> list[tuple[int, int, str]]:
        """(first, past the last, what is wrong) of every committed part of an array that cannot be read.

        The values of narrow arrays are kept for `_relations`.
        """
        length = self._lengths[spec.unit]
        reader = ArrayReader(self._root, spec, length)
        found: list[tuple[int, int, str]] = []
        kept = [np.empty((0, *spec.trailing), spec.dtype)]
        for start in range(0, length, spec.shard_rows):
            stop = min(start + spec.shard_rows, length)
            try:
                values = reader.read(start, stop)
                if not spec.trailing:
                    kept.append(values)
            except StoreError:
                found.extend(_damaged_chunks(reader, spec, start, stop))
            self._shards_read += 1
            if self._progress is not None:
                self._progress(self._shards_read, self._shards)
        if not spec.trailing and not found:
            self._values[spec.path] = np.concatenate(kept)
        return found

    def _damaged_sequences(self, damaged: dict[str, list[tuple[int, int, str]]]) -> Check:
        """Which sequences the damaged parts belong to, as far as the tables of sequences can be read."""
        name = "damaged sequences"
        if not any(damaged.values()):
            return Check(name, True, "none")
        sequences: set[int] = set()
        unplaced: list[str] = []
        for path, parts in damaged.items():
            owners = self._owners(self._specs[path].unit)
            for first, last, _ in parts:
                if owners is None:
                    unplaced.append(path)
                else:
                    starts, sizes = owners
                    hit = (starts < last) & (starts + sizes > first) & (sizes > 0)
                    sequences.update(np.flatnonzero(hit).tolist())
        shown = ", ".join(map(str, sorted(sequences)[:50]))
        detail = f"{len(sequences)} sequences" + (f": {shown}" if sequences else "")
        if len(sequences) > 50:
            detail += ", ..."
        if unplaced:
            detail += (
                f"; damage in {', '.join(sorted(set(unplaced)))} belongs to no sequence that can be named"
            )
        return Check(name, False, detail)

    def _owners(self, unit: str) -> tuple[np.ndarray, np.ndarray] | None:
        """Where each sequence starts and how long it is, counted in `unit`; None when that cannot be said."""
        if unit == "sequences":
            count = self._manifest.commit.sequences
            return np.arange(count), np.ones(count, np.int64)
        if unit.startswith("exact_"):
            exact_row = self._values.get(f"layer_{unit.removeprefix('exact_')}/exact_row")
            rows = self._owners("rows")
            if exact_row is None or rows is None:
                return None
            starts = np.searchsorted(exact_row, rows[0])
            return starts, np.searchsorted(exact_row, rows[0] + rows[1]) - starts
        prefix = {"rows": "row", "tokens": "token", "source_bytes": "source"}.get(unit)
        names = (f"sequences/{prefix}_start", f"sequences/{prefix}_size")
        if any(name not in self._values for name in names):
            return None
        return self._values[names[0]], self._values[names[1]]

    def _relations(self) -> Iterator[Check]:
        """How the arrays must agree. What needs an array that could not be read is left out."""
        values, commit = self._values, self._manifest.commit
        contiguous = {"row": commit.rows, "token": commit.tokens, "source": commit.source_bytes}
        laid_out = True
        for prefix, total in contiguous.items():
            names = [f"sequences/{prefix}_start", f"sequences/{prefix}_size"]
            laid_out &= all(name in values for name in names)
            if all(name in values for name in names):
                starts, sizes = (values[name] for name in names)
                expected = np.concatenate([[0], np.cumsum(sizes)])
                wrong = (sizes < 0) | (starts != expected[:-1])
                laid_out &= not wrong.any() and expected[-1] == total
                yield _relation(f"{prefix}s of sequences lie end to end", wrong, "sequence")
                yield Check(
                    f"{prefix}s of sequences add up",
                    bool(expected[-1] == total),
                    f"{expected[-1]} of {total}",
                )
        if "sequences/finish" in values:
            wrong = ~np.isin(values["sequences/finish"], list(Finish))
            yield _relation("finish is a known code", wrong, "sequence")
        for layer in self._manifest.layers:
            path = f"{layer_group(layer)}/exact_row"
            if path in values:
                rows = values[path]
                wrong = (rows < 0) | (rows >= commit.rows) | (np.diff(rows, prepend=-1) <= 0)
                yield _relation(f"{path} ascends within the rows", wrong, "entry")
            norm = values.get(f"{layer_group(layer)}/norm")
            if path in values and norm is not None and self._manifest.codec.name != "bf16":
                wrong = ~ordinary_rows(norm) & (norm != 0) & ~np.isin(np.arange(commit.rows), values[path])
                yield _relation(f"layer {layer} keeps exactly what its codec cannot hold", wrong, "row")
        needed = {f"rows/{name}" for name in ("token_id", "next_token_id", "position", "sequence", "flags")}
        needed |= {"sequences/tokens", "sequences/prompt_size"}
        if laid_out and needed <= set(values):
            yield from self._row_relations()

    def _row_relations(self) -> Iterator[Check]:
        values = self._values
        row_size, token_size = values["sequences/row_size"], values["sequences/token_size"]
        owner = np.repeat(np.arange(len(row_size)), row_size)
        yield _relation("rows carry the number of their sequence", values["rows/sequence"] != owner, "row")
        position, size = values["rows/position"].astype(np.int64), token_size[owner]
        outside = (position < 0) | (position >= size)
        same = np.diff(owner, prepend=-1) == 0
        outside |= same & (np.diff(position, prepend=0) <= 0)
        yield _relation("positions ascend within their sequence", outside, "row")
        if outside.any():
            return
        tokens = np.append(values["sequences/tokens"], np.int32(NO_TOKEN))
        place = values["sequences/token_start"][owner] + position
        wrong = values["rows/token_id"] != tokens[place]
        yield _relation("token_id is the token at the position", wrong, "row")
        last = position == size - 1
        following = np.where(last, NO_TOKEN, tokens[place + 1])
        wrong = values["rows/next_token_id"] != following
        yield _relation("next_token_id is the token after it", wrong, "row")
        prompt = values["sequences/prompt_size"][owner]
        expected = (position >= prompt) * RowFlag.GENERATED + (position == prompt - 1) * RowFlag.PROMPT_END
        expected += last * RowFlag.SEQUENCE_END + (position < EARLY_POSITIONS) * RowFlag.EARLY
        known = RowFlag.GENERATED | RowFlag.PROMPT_END | RowFlag.SEQUENCE_END | RowFlag.EARLY
        yield _relation("flags fit the positions", values["rows/flags"] & known != expected, "row")


def _damaged_chunks(
    reader: ArrayReader, spec: ArraySpec, start: int, stop: int
) -> Iterator[tuple[int, int, str]]:
    """The unreadable inner chunks of one shard."""
    for first in range(start, stop, spec.chunk_rows):
        last = min(first + spec.chunk_rows, stop)
        try:
            reader.read(first, last)
        except StoreError as error:
            yield first, last, str(error)


def _relation(name: str, wrong: np.ndarray, unit: str) -> Check:
    count = int(np.count_nonzero(wrong))
    detail = f"{count} wrong, first {unit} {int(np.argmax(wrong))}" if count else f"{len(wrong)} looked at"
    return Check(name, count == 0, detail)
