"""The files of a new store: groups, empty arrays, the vocabulary, the manifest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nla_engine.store.arrays import ArrayLog
from nla_engine.store.format import NUMBER, NUMBERED_VERSION
from nla_engine.store.manifest import GROUP_METADATA, METADATA_NAME, Manifest, json_bytes
from nla_engine.store.objects import Place
from nla_engine.store.queue import WriteQueue
from nla_engine.store.shards import make_directory, write_file_atomically, writing


def write_empty(root: Place, manifest: Manifest, vocabulary: Sequence[bytes]) -> None:
    """Fill a new directory: groups, empty arrays, the vocabulary, the manifest. Raises WriteError."""
    specs = manifest.specs()
    if isinstance(root, Path):
        with writing(root):
            for path in specs:
                make_directory(root / path / "c")
    sizes = np.fromiter(map(len, vocabulary), np.int64, len(vocabulary))
    with WriteQueue() as queue:
        logs = {name: ArrayLog(root, specs[name], queue) for name in ("vocabulary/start", "vocabulary/text")}
        logs["vocabulary/start"].append(np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)]))
        logs["vocabulary/text"].append(np.frombuffer(b"".join(vocabulary), np.uint8))
        for log in logs.values():
            log.flush()
    write_metadata(root, manifest)


def write_metadata(root: Place, manifest: Manifest) -> None:
    """Every zarr.json of a store, the manifest last. Raises WriteError."""
    lengths = manifest.lengths()
    with WriteQueue() as queue:
        documents: dict[str, Any] = {path.split("/")[0]: GROUP_METADATA for path in manifest.specs()}
        documents |= {path: spec.metadata(lengths[spec.unit]) for path, spec in manifest.specs().items()}
        for name, document in documents.items():
            path, data = root / name / METADATA_NAME, json_bytes(document, name)
            queue.submit(partial(write_file_atomically, path, data), len(data))
    manifest.write(root)


def numbered(root: Place, manifest: Manifest) -> Manifest:
    """The manifest of an older store with its sequences' numbers, which are in order: the array is written, the
    manifest is not. Raises WriteError."""
    if manifest.version >= NUMBERED_VERSION:
        return manifest
    new, count = replace(manifest, version=NUMBERED_VERSION), manifest.commit.sequences
    spec, metadata = new.specs()[NUMBER], root / NUMBER / METADATA_NAME
    if isinstance(root, Path):
        with writing(root):
            make_directory(root / NUMBER / "c")
    with WriteQueue() as queue:
        log = ArrayLog(root, spec, queue)
        log.append(np.arange(count))
        log.flush()
    write_file_atomically(metadata, json_bytes(spec.metadata(count), NUMBER))
    return new
