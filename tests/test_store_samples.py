"""Sample sequences for the store's tests, and the proof that they are what a writer accepts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nla_engine.codec import Codec
from nla_engine.errors import StoreError
from nla_engine.store import Finish, LayerRows, SequenceRows, StoreWriter, row_flags
from nla_engine.store.manifest import attributes_checksum
from nla_engine.store.records import SequenceBatch

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
    """`fill_store` as it was before narrow arrays had shards of their own: the manifest says nothing of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nla_engine.store.format.NARROW_SHARD_FACTOR", 1)
        vectors = fill_store(path, codec, sizes, **changes)
    document = json.loads((path / "zarr.json").read_text())
    about = document["attributes"]["nla_engine"]
    assert about.pop("narrow_shard_rows") == about["shard_rows"]
    about["checksum"] = attributes_checksum(about)
    (path / "zarr.json").write_text(json.dumps(document))
    return vectors


@pytest.mark.parametrize("name", ["int8", "int4", "bf16"])
def test_samples_fit_a_store(name: str) -> None:
    codec = Codec.named(name, 32)
    sequences, vectors = sample_sequences(1, codec, (0, 4), [5, 0, 40])
    batch = SequenceBatch.of(sequences, (0, 4), codec)
    assert batch.owner.tolist() == [0] * 5 + [2] * 40
    assert len(vectors[4]) == 45


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_id": np.zeros(4, np.int32)}, "token_id is int32"),
        ({"flags": np.zeros(5, np.int64)}, "flags is int64"),
        ({"position": np.array([0, 1, 2, 3, 3], np.int32)}, "not ascending"),
        ({"position": np.array([0, 1, 2, 3, 99], np.int32)}, "not ascending"),
        ({"position": np.array([-1, 1, 2, 3, 4], np.int32)}, "not ascending"),
        ({"prompt_size": 99}, "prompt_size 99"),
        ({"source": b"{"}, "source is not UTF-8 JSON"),
        ({"source": b"\xff"}, "source is not UTF-8 JSON"),
        ({"layers": {}}, "layers"),
    ],
)
def test_unfit_sequences_are_refused(change: dict[str, Any], message: str) -> None:
    codec = Codec.named("int8", 16)
    good, _ = sample_sequence(np.random.default_rng(0), codec, (3,), 5)
    bad = SequenceRows(**{**vars(good), **change})
    for place in range(3):  # it is named among others, which may have no rows at all
        none, _ = sample_sequence(np.random.default_rng(1), codec, (3,), 4, 0)
        sequences = [good, none, good]
        sequences[place] = bad
        with pytest.raises(StoreError, match=f"^sequence {7 + place}: .*{message}"):
            SequenceBatch.of(sequences, (3,), codec, first=7)


@pytest.mark.parametrize("name", ["token_id", "next_token_id"])
def test_tokens_that_disagree_are_refused(name: str) -> None:
    codec = Codec.named("int8", 16)
    sequence, _ = sample_sequence(np.random.default_rng(0), codec, (3,), 5)
    bad = SequenceRows(**{**vars(sequence), name: getattr(sequence, name) + np.int32(1)})
    with pytest.raises(StoreError, match=rf"^sequence 1: {name} does not hold"):
        SequenceBatch.of([sequence, bad], (3,), codec)


def test_a_row_that_the_codec_cannot_hold_needs_an_exact_copy() -> None:
    codec = Codec.named("int8", 16)
    sequence, _ = sample_sequence(np.random.default_rng(0), codec, (3,), 5)
    rows = sequence.layers[3]
    bare = LayerRows(
        rows.codes,
        rows.scales,
        np.full(5, np.inf, np.float32),
        np.empty(0, np.int64),
        np.empty((0, 16), np.uint16),
    )
    bad = SequenceRows(**{**vars(sequence), "layers": {3: bare}})
    with pytest.raises(StoreError, match="^sequence 1: layer 3 row 0 has a norm that needs an exact copy"):
        SequenceBatch.of([sequence, bad], (3,), codec)


def test_unfit_layer_rows_are_refused() -> None:
    codec = Codec.named("int8", 16)
    sequence, _ = sample_sequence(np.random.default_rng(0), codec, (3,), 5)
    rows = sequence.layers[3]
    for change in (
        {"codes": rows.codes[:, :8]},
        {"scales": rows.scales.astype(np.float32)},
        {"exact_index": np.array([5]), "exact": np.zeros((1, 16), np.uint16)},
        {"exact_index": np.array([-1]), "exact": np.zeros((1, 16), np.uint16)},
        {"exact_index": np.array([1, 1]), "exact": np.zeros((2, 16), np.uint16)},
    ):
        unfit = LayerRows(**{**vars(rows), **change})
        bad = SequenceRows(**{**vars(sequence), "layers": {3: unfit}})
        with pytest.raises(StoreError, match=r"^sequence 1: layer 3 "):
            SequenceBatch.of([sequence, bad, sequence], (3,), codec)
