"""What a writer accepts: the sample sequences, and nothing that does not fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from store_samples import sample_sequence, sample_sequences

from nla_engine.codec.rows import Codec
from nla_engine.errors import StoreError
from nla_engine.store import LayerRows, SequenceRows
from nla_engine.store.records import SequenceBatch


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
