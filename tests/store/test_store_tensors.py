"""Rows as tensors: any rows and in bulk, in every dtype, from threads too, give what numpy reading gives."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from store_samples import fill_store

from nla_engine.codec.rows import CODEC_NAMES, Codec
from nla_engine.errors import RequestError, StoreError
from nla_engine.store import CaptureStore, LayerReader
from nla_engine.store.views import tensors

SIZES = [5, 0, 300, 20, 33]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=CODEC_NAMES)
def layer(request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LayerReader:
    """358 rows in shards of 64 rows (narrow: 128), read in blocks of 16."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr(tensors, "BLOCK_BYTES", 4 * 48 * 20)
    monkeypatch.setattr("nla_engine.store.format.CHUNK_ROWS", 16)
    monkeypatch.setattr("nla_engine.store.format.NARROW_SHARD_FACTOR", 2)
    fill_store(tmp_path / "run.zarr", Codec.named(request.param, 48), SIZES, shard_rows=64)
    return CaptureStore.open(tmp_path / "run.zarr").layer(3)


def same(got: torch.Tensor, want: np.ndarray, dtype: torch.dtype) -> None:
    assert got.dtype == dtype
    torch.testing.assert_close(got, torch.from_numpy(want).to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_rows(layer: LayerReader, dtype: torch.dtype) -> None:
    for rows in (slice(3, 77), slice(None, None, 7), [4, -1, 4], np.arange(len(layer)) % 3 == 0, []):
        same(layer.torch(rows, dtype=dtype), layer[rows], dtype)
    same(layer.torch(7, dtype=dtype), layer[7], dtype)
    assert layer.torch(np.int64(7)).shape == (48,)


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_bulk(layer: LayerReader, dtype: torch.dtype, threads: int) -> None:
    for start, stop in ((0, None), (70, 75), (5, 300), (-30, -1), (9, 9), (400, 10)):
        parts = list(layer.tensors(start, stop, dtype=dtype, threads=threads))
        first, last, _ = slice(start, stop).indices(len(layer))
        numbers = [number for number, _ in parts]
        sizes = [len(part) for _, part in parts]
        assert numbers == [first + sum(sizes[:i]) for i in range(len(sizes))]
        same(
            torch.cat([*(part for _, part in parts), torch.empty(0, 48, dtype=dtype)]),
            layer[first:last],
            dtype,
        )
    assert len(list(layer.tensors())) == -(-sum(SIZES) // 16)


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize(("name", "first"), [("codes/c/1/0", 64), ("norm/c/1", 128)])
def test_damage_is_an_error(layer: LayerReader, tmp_path: Path, name: str, first: int, threads: int) -> None:
    path = tmp_path / "run.zarr/layer_3" / name
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    seen = []
    with pytest.raises(StoreError, match="inner chunk 0 fails its checksum"):
        seen.extend(number for number, _ in layer.tensors(threads=threads))
    assert seen == list(range(0, first, 16))


def test_what_cannot_be_had(layer: LayerReader) -> None:
    with pytest.raises(RequestError, match=r"cannot be read as torch.int8: choose float32"):
        layer.torch([1], dtype=torch.int8)
    with pytest.raises(RequestError, match="cannot be read as"):
        layer.tensors(dtype=torch.float64)
    with pytest.raises(RequestError, match="threads is -1"):
        layer.tensors(threads=-1)


@pytest.mark.gpu
@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_device_decodes_to_the_same(layer: LayerReader, dtype: torch.dtype, threads: int) -> None:
    for _ in range(3):  # memory is used again: a shard read too early would show
        parts = [part for _, part in layer.tensors(device="cuda", dtype=dtype, threads=threads)]
        same(torch.cat(parts).cpu(), layer[:], dtype)
    same(layer.torch([5, 3], device="cuda", dtype=dtype).cpu(), layer[[5, 3]], dtype)
