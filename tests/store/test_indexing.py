"""layer[...] is what numpy gives for the same index of the same rows, or an IndexError."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from store_samples import fill_store

from nla_engine.codec.rows import Codec
from nla_engine.store import CaptureStore, LayerReader
from nla_engine.store.views.dataset import RowDataset

N, D = 300, 48


@pytest.fixture(scope="module", params=["int8", "bf16"])
def layer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LayerReader:
    path = tmp_path_factory.mktemp("indexing") / "run.zarr"
    fill_store(path, Codec.named(request.param, D), [100, 0, 120, 80], shard_rows=128)
    return CaptureStore.open(path).layer(3)


def random_part(rng: np.random.Generator, size: int, shape: tuple[int, ...]) -> Any:
    """An index of one axis. shape: that of an array of numbers, if it is one."""
    kind = rng.integers(6)
    if kind == 0:
        return int(rng.integers(-size, size))
    if kind == 1:
        return np.int32(rng.integers(-size, size))
    if kind == 2:
        bounds = [None, *rng.integers(-size - 5, size + 5, 3).tolist()]
        step = [None, 1, 2, -1, -3, 7][rng.integers(6)]
        return slice(bounds[rng.integers(4)], bounds[rng.integers(4)], step)
    if kind == 3 and shape:
        return np.bincount(rng.choice(size, shape[-1], replace=False), minlength=size) > 0
    numbers = rng.integers(-size, size, shape)
    return numbers.tolist() if kind == 4 else numbers.astype(np.int16)


def test_random_indices(layer: LayerReader, rng: np.random.Generator) -> None:
    everything = layer[:]
    for _ in range(60):
        shape = [(), (4,), (1,), (2, 4), (0,)][rng.integers(5)]
        rows, channels = random_part(rng, N, shape), random_part(rng, D, shape)
        if shape == (0,):  # an empty list of floats is an index nowhere
            rows = channels = np.zeros(0, np.int64)
        for index in (rows, (rows,), (rows, channels), (..., channels), (rows, ...), (rows, channels, ...)):
            expected = everything[index]
            found = layer[index]
            assert (found.shape, found.dtype) == (expected.shape, np.float32), index
            np.testing.assert_array_equal(found, expected)


def test_the_ends_of_what_can_be_written(layer: LayerReader) -> None:
    everything = layer[:]
    assert layer[0, 3] == everything[0, 3] and np.shape(layer[0, 3]) == ()
    for index in ((), ..., (slice(None), 5), (-1, -1), (..., 0), (3, ...), np.array(7), np.uint8([4, 2])):
        np.testing.assert_array_equal(layer[index], everything[index])
    np.testing.assert_array_equal(layer[torch.tensor([4, 2])], everything[[4, 2]])
    assert layer[[]].shape == (0, D)
    np.testing.assert_array_equal(layer[range(3, 9)], everything[3:9])


@pytest.mark.parametrize(
    "index",
    [
        N,
        -N - 1,
        (0, D),
        (0, -D - 1),
        [0, N],
        1.5,
        np.array([1.0]),
        np.zeros(0),
        "3",
        (0, "3"),
        None,
        (0, None),
        True,
        [True, False],
        (0, True),
        np.zeros((N, D), bool),
        np.zeros(N + 1, bool),
        (0, 1, 2),
        (..., ...),
        (0, np.zeros(D + 1, bool)),
        ([0, 1], [0, 1, 2]),
        2**70,
    ],
    ids=repr,
)
def test_what_is_no_index(layer: LayerReader, index: Any) -> None:
    with pytest.raises(IndexError):
        layer[index]


def test_tensors_are_indexed_by_rows(layer: LayerReader) -> None:
    everything = layer[:]
    for rows in (5, -1, slice(4, 90, 3), [3, -1], np.array([[1, 2], [3, 4]]), np.arange(N) % 7 == 0):
        found = layer.torch(rows)
        np.testing.assert_array_equal(found.numpy(), everything[rows])
    for wrong in ((0, 3), N, [N], 0.5, np.zeros(3, bool)):
        with pytest.raises(IndexError):
            layer.torch(wrong)


def test_a_layer_is_an_array(layer: LayerReader) -> None:
    everything = layer[:]
    np.testing.assert_array_equal(np.asarray(layer), everything)
    np.testing.assert_array_equal(np.asarray(layer, np.float64), everything.astype(np.float64))
    assert np.array(layer).dtype == layer.dtype == np.float32
    assert (len(layer), layer.ndim, layer.shape) == (N, 2, (N, D))
    np.testing.assert_array_equal(np.stack(list(layer)), everything)
    with pytest.raises(ValueError, match="uncopied"):
        np.array(layer, copy=False)


def test_arrays_refuse_rows_that_they_do_not_have(layer: LayerReader) -> None:
    numbers = layer.arrays["norm"]
    for rows in ([-1], [N], [0, N + 500]):
        with pytest.raises(IndexError):
            numbers.take(np.array(rows))


def test_what_is_chosen_by_one_number(tmp_path: Path) -> None:
    """Sequences, and items of a dataset: nothing is rounded, and no list is taken for a number."""
    fill_store(tmp_path / "run.zarr", Codec.named("bf16", D), [4, 5])
    store = CaptureStore.open(tmp_path / "run.zarr")
    items = RowDataset(store)
    np.testing.assert_array_equal(items[-1], store.layer(3)[-1])
    np.testing.assert_array_equal(items[np.int64(2)], store.layer(3)[2])
    assert store.sequence(np.int32(1)).number == 1
    for wrong in (0.7, (0, 3), "1", None, slice(0, 2), [0, 1]):
        for take in (items.__getitem__, store.sequence):
            with pytest.raises((TypeError, IndexError)):
                take(wrong)  # type: ignore[operator]
    for outside in (9, -10):
        with pytest.raises(IndexError):
            items[outside]
    for outside in (2, -1):
        with pytest.raises(IndexError):
            store.sequence(outside)
    with pytest.raises(TypeError):
        store.token_text([1.5])  # type: ignore[list-item]
