"""Verification: every committed byte of a store, and every relation between its arrays.

Whether the vectors are the right ones needs the model: see `nla_engine.capture.audit`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from nla_engine.codec.rows import ordinary_rows
from nla_engine.errors import StoreError, first_line
from nla_engine.store.arrays import ArrayReader
from nla_engine.store.care.damage import Damage, Part
from nla_engine.store.care.row_relations import row_relations
from nla_engine.store.format import (
    ATTRIBUTE,
    NUMBER,
    ArraySpec,
    Finish,
    layer_group,
)
from nla_engine.store.manifest import GROUP_METADATA, METADATA_NAME, Manifest
from nla_engine.store.objects import LOCK_NAME, ObjectPath, Place, place
from nla_engine.store.shards import TEMPORARY_SUFFIX

Progress = Callable[[int, int], None]
SHOWN = 5


@dataclass(frozen=True)
class Check:
    """One check and its result. detail: what was found, in words."""

    name: str
    ok: bool
    detail: str


def verify(path: str | os.PathLike[str], progress: Progress | None = None) -> list[Check]:
    """Read all that is committed and return one check for each array and relation.

    progress is called with (shards read, total shards). Raises StoreError if there is no store to verify.
    """
    root = place(path)
    return list(Verification(root, Manifest.read(root), progress).run())


class Verification:
    """One pass over one store.

    After `run`: damage is what could not be read; disagreement names a failed relation between readable arrays.
    """

    def __init__(self, root: Place, manifest: Manifest, progress: Progress | None) -> None:
        self._root = root
        self._manifest = manifest
        self._specs = manifest.specs()
        self._lengths = manifest.lengths()
        self._progress = progress
        self._shards = sum(-(-self._lengths[spec.unit] // spec.shard_rows) for spec in self._specs.values())
        self._shards_read = 0
        self._values: dict[str, np.ndarray] = {}
        self.damage = Damage(manifest, {}, {})
        self.disagreement = ""

    def run(self) -> Iterator[Check]:
        commit = self._manifest.commit
        state = "complete" if commit.complete else "not complete: a writer is running, or died"
        yield Check("manifest", True, f"{commit.rows} rows of {commit.sequences} sequences, {state}")
        yield self._consolidated()
        yield self._names()
        yield self._groups()
        damaged: dict[str, list[Part]] = {}
        for name, spec in self._specs.items():
            yield self._metadata(spec)
            damaged[name] = self._damage(spec)
            detail = f"{self._lengths[spec.unit]} x {list(spec.trailing)}, checksums match"
            if damaged[name]:
                detail = "; ".join(part.fault for part in damaged[name][:SHOWN])
                if len(damaged[name]) > SHOWN:
                    detail += f"; and {len(damaged[name]) - SHOWN} more"
            yield Check(f"{name} data", not damaged[name], detail)
        self.damage = Damage(self._manifest, damaged, self._values)
        yield self._damaged_sequences()
        self._values = {name: values for name, values in self._values.items() if not damaged[name]}
        for check in self._relations():
            if not check.ok and not self.disagreement:
                self.disagreement = f"{check.name}: {check.detail}"
            yield check

    def _groups(self) -> Check:
        """The zarr.json of every group."""
        wrong = []
        for name in {path.split("/")[0]: None for path in self._specs}:
            path = self._root / name / METADATA_NAME
            try:
                if json.loads(path.read_bytes()) != GROUP_METADATA:
                    wrong.append(f"{path}: differs from the format")
            except (OSError, ValueError) as error:
                wrong.append(f"{path}: cannot be read ({type(error).__name__}: {first_line(error)})")
        return Check("groups", not wrong, "; ".join(wrong) or "as they should be")

    def _consolidated(self) -> Check:
        """Compare the metadata repeated in the root's zarr.json with the format and the commit in it."""
        path = self._root / METADATA_NAME
        found = json.loads(path.read_bytes())  # read again: a live writer may have committed since
        wanted = Manifest.from_attributes(found["attributes"][ATTRIBUTE]).document()
        wrong = [key for key in wanted if key != "attributes" and found.get(key) != wanted[key]]
        detail = f"{path}: {', '.join(wrong)} differs from the format or from the commit" if wrong else "fits"
        return Check("consolidated metadata", not wrong, detail)

    def _names(self) -> Check:
        known = {METADATA_NAME, *(name.split("/")[0] for name in self._specs)}
        if isinstance(self._root, ObjectPath):
            found = {name.split("/")[0] for name in self._root.names()}
        else:
            found = set(os.listdir(self._root)) - {METADATA_NAME + TEMPORARY_SUFFIX}
        found -= {LOCK_NAME}
        detail = [f"'{name}' is missing" for name in sorted(known - found)]
        detail += [f"'{name}' is no part of a store" for name in sorted(found - known)]
        return Check("names", not detail, "; ".join(detail) or "all there, and no others")

    def _metadata(self, spec: ArraySpec) -> Check:
        """Compare the array's zarr.json with the format. After a crash its shape may lag behind the commit."""
        name, length = f"{spec.path} metadata", self._lengths[spec.unit]
        path = self._root / spec.path / METADATA_NAME
        try:
            found: Any = json.loads(path.read_bytes())
            (shown, *_), wanted = found["shape"], spec.metadata(length)
            wrong = [key for key in wanted if key != "shape" and found.get(key) != wanted[key]]
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            return Check(name, False, f"{path}: cannot be read ({type(error).__name__}: {first_line(error)})")
        if wrong:
            return Check(name, False, f"{path}: differs from the format in {', '.join(wrong)}")
        if shown == length:
            return Check(name, True, f"{spec.dtype.name} {wanted['shape']}")
        detail = f"{path}: shows {shown} values, {length} are committed"
        if self._manifest.commit.complete:
            return Check(name, False, detail)
        return Check(
            name, True, detail + ": the writer is between two steps, or died there (resume repairs it)"
        )

    def _damage(self, spec: ArraySpec) -> list[Part]:
        """Every committed part of an array that cannot be read. The values of flat arrays are kept."""
        length = self._lengths[spec.unit]
        reader = ArrayReader(self._root, spec, length)
        found: list[Part] = []
        values = np.zeros(0 if spec.trailing else length, spec.dtype)
        for start in range(0, length, spec.shard_rows):
            stop = min(start + spec.shard_rows, length)
            parts = [(start, stop)]
            while parts:
                first, last = parts.pop()
                try:
                    read = reader.read(first, last)
                    if not spec.trailing:
                        values[first:last] = read
                except StoreError as error:
                    if last - first <= spec.chunk_rows:
                        found.append(Part(first, last, str(error)))
                    else:  # read again, one chunk at a time
                        starts = range(first, last, spec.chunk_rows)
                        parts = [(at, min(at + spec.chunk_rows, last)) for at in reversed(starts)]
            self._shards_read += 1
            if self._progress is not None:
                self._progress(self._shards_read, self._shards)
        if not spec.trailing:
            self._values[spec.path] = values
        return found

    def _damaged_sequences(self) -> Check:
        """Which sequences the damaged parts belong to, and which arrays can be restored from others."""
        name, damage = "damaged sequences", self.damage
        if not damage.lost and not damage.restored:
            return Check(name, True, "none")
        sequences = np.sort(damage.numbers[list(damage.sequences())]).tolist()
        shown = ", ".join(map(str, sequences[:50]))
        detail = f"{len(sequences)} sequences" + (f": {shown}" if sequences else "")
        if len(sequences) > 50:
            detail += ", ..."
        if damage.restored:
            detail += f"; {', '.join(damage.restored)}: can be restored from other arrays"
        if unplaced := damage.unplaced():
            detail += f"; damage in {', '.join(unplaced)} cannot be assigned to sequences"
        return Check(name, False, detail)

    def _relations(self) -> Iterator[Check]:
        """How the arrays must agree. Checks that need an unreadable array are left out."""
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
        if NUMBER in values:
            known, count = np.unique(values[NUMBER], return_counts=True)
            wrong = (values[NUMBER] < 0) | np.isin(values[NUMBER], known[count > 1])
            yield _relation("numbers of sequences are there once", wrong, "sequence")
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
                kept = np.zeros(commit.rows, bool)
                kept[rows[(rows >= 0) & (rows < commit.rows)]] = True
                wrong = ~ordinary_rows(norm) & (norm != 0) & ~kept
                yield _relation(f"{layer.label} keeps exactly what its codec cannot hold", wrong, "row")
        needed = {f"rows/{name}" for name in ("token_id", "next_token_id", "position", "sequence", "flags")}
        needed |= {"sequences/tokens", "sequences/prompt_size"}
        needed |= {NUMBER} & set(self._specs)
        if laid_out and needed <= set(values):
            for found in row_relations(values, self.damage.numbers):
                detail = f"{found.wrong} wrong, first row {found.first}"
                yield Check(
                    found.name, not found.wrong, detail if found.wrong else f"{found.checked} checked"
                )


def _relation(name: str, wrong: np.ndarray, unit: str) -> Check:
    count = int(np.count_nonzero(wrong))
    detail = f"{count} wrong, first {unit} {int(np.argmax(wrong))}" if count else f"{len(wrong)} checked"
    return Check(name, count == 0, detail)
