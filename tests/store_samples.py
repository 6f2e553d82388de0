"""Sample sequences for the store's tests; `store/test_records.py` proves that a writer accepts them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nla_engine.codec.rows import Codec
from nla_engine.store import Finish, LayerRows, SequenceRows, StoreWriter, row_flags
from nla_engine.store.manifest import attributes_checksum

VOCABULARY = [f"{i}".encode() for i in range(10)] + [b" times", b"\n", "é".encode(), "é".encode()[:1], b""]
SINK_NORM = 40.0


def sample_sequence(
    rng: np.random.Generator, codec: Codec, layers: tuple[int, ...], tokens: int, rows: int | None = None
) -> tuple[SequenceRows, dict[int, np.ndarray]]:
    """A sequence of which `rows` tokens (None: all) are stored, and the float32 vectors that went in, by layer.

    Now and then a vector is zero, NaN, Inf or an attention sink.
    """
    ids = rng.integers(0, len(VOCABULARY), tokens).astype(np.int32)
    kept = np.sort(rng.permutation(tokens)[: tokens if rows is None else rows]).astype(np.int32)
    prompt = int(rng.integers(0, tokens + 1))
    vectors, encoded = {}, {}
    sink, nonfinite = np.zeros(len(kept), bool), np.zeros(len(kept), bool)
    for layer in layers:
        x = rng.normal(size=(len(kept), codec.d_model)).astype(np.float32)
        kind = rng.random(len(kept))
        x[kind < 0.03] = 0.0
        x[(kind > 0.03) & (kind < 0.06), 0] = np.nan
        x[(kind > 0.06) & (kind < 0.09), -1] = np.inf
        x[(kind > 0.09) & (kind < 0.14), 1] = 1000.0
        vectors[layer] = x
        encoded[layer] = LayerRows.encode(codec, x, SINK_NORM)
        sink |= encoded[layer].norm > SINK_NORM
        nonfinite |= ~np.isfinite(encoded[layer].norm)
    following = np.append(ids, -1).astype(np.int32)
    sequence = SequenceRows(
        token_id=ids[kept],
        next_token_id=following[kept + 1],
        position=kept,
        flags=row_flags(kept, prompt, tokens, sink, nonfinite),
        layers=encoded,
        tokens=ids,
        prompt_size=prompt,
        finish=Finish(int(rng.integers(0, 4))),
        source=json.dumps({"id": int(rng.integers(0, 100)), "text": "é" * int(rng.integers(0, 5))}).encode(),
    )
    return sequence, vectors


def sample_sequences(
    seed: int, codec: Codec, layers: tuple[int, ...], sizes: list[int]
) -> tuple[list[SequenceRows], dict[int, np.ndarray]]:
    """Sequences of the given numbers of rows (0 allowed), and all their vectors by layer."""
    rng = np.random.default_rng(seed)
    made = [sample_sequence(rng, codec, layers, size + int(rng.integers(0, 3)), size) for size in sizes]
    empty = np.empty((0, codec.d_model), np.float32)
    vectors = {layer: np.concatenate([empty, *(x[layer] for _, x in made)]) for layer in layers}
    return [sequence for sequence, _ in made], vectors


def shuffled(sequences: list[SequenceRows], rng: np.random.Generator) -> list[SequenceRows]:
    """The same in random order, each with its place in the given one as its number."""
    order = rng.permutation(len(sequences)).tolist()
    return [replace(sequences[number], number=number) for number in order]


def create_store(path: Path, codec: Codec, layers: tuple[int, ...] = (3,), **changes: Any) -> StoreWriter:
    """A writer with the arguments that most tests do not care about filled in."""
    arguments: dict[str, Any] = {
        "sink_norm": dict.fromkeys(layers, SINK_NORM),
        "vocabulary": VOCABULARY,
        "provenance": {"model": "sample"},
        "options": {"seed": 1, "capture": {"layer": 3}},
        "commit_seconds": 1e9,
    }
    return StoreWriter.create(path, layers=layers, codec=codec, **{**arguments, **changes})


def fill_store(path: Path, codec: Codec, sizes: list[int], **changes: Any) -> dict[int, np.ndarray]:
    """A complete store of sample sequences; returns the vectors that went in."""
    layers = changes.get("layers", (3,))
    sequences, vectors = sample_sequences(0, codec, layers, sizes)
    with create_store(path, codec, **changes) as writer:
        for sequence in sequences:
            writer.append(sequence)
    return vectors


def fill_old_store(path: Path, codec: Codec, sizes: list[int], **changes: Any) -> dict[int, np.ndarray]:
    """`fill_store` as it was in format version 1, before narrow arrays had shards of their own.

    The manifest says nothing of them, and sequences are in order, with no array of their numbers.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nla_engine.store.format.NARROW_SHARD_FACTOR", 1)
        vectors = fill_store(path, codec, sizes, **changes)
    document = json.loads((path / "zarr.json").read_text())
    about = document["attributes"]["nla_engine"]
    assert about.pop("narrow_shard_rows") == about["shard_rows"]
    about["format_version"] = 1
    del document["consolidated_metadata"]["metadata"]["sequences/number"]
    shutil.rmtree(path / "sequences" / "number")
    about["checksum"] = attributes_checksum(about)
    (path / "zarr.json").write_text(json.dumps(document))
    return vectors


def random_store(
    path: Path, vectors: np.ndarray, layer: int, sizes: list[int] | None = None, **changes: Any
) -> Path:
    """A store of just these vectors, float32 [n, d], in sequences of these sizes (None: all in one)."""
    codec = Codec.named("bf16", vectors.shape[1])
    with create_store(path, codec, (layer,), sink_norm={layer: float("inf")}, **changes) as writer:
        for x in np.split(vectors, np.cumsum(sizes or [len(vectors)])[:-1]):
            ids = (np.arange(len(x)) % len(VOCABULARY)).astype(np.int32)
            position = np.arange(len(x), dtype=np.int32)
            flags = row_flags(position, 1, len(x), nonfinite=~np.isfinite(x).all(1))
            writer.append(
                SequenceRows(
                    token_id=ids,
                    next_token_id=np.append(ids[1:], np.int32(-1)),
                    position=position,
                    flags=flags,
                    layers={layer: LayerRows.encode(codec, x, float("inf"))},
                    tokens=ids,
                    prompt_size=1,
                    finish=Finish.EOS,
                    source=b"{}",
                )
            )
    return path
