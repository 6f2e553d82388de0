"""The xarray view: lazy, the same numbers, labels that select."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import xarray
from store_samples import fill_store

from nla_engine.codec.rows import Codec
from nla_engine.errors import StoreError
from nla_engine.store import CaptureStore, LayerReader
from nla_engine.store.views.labelled import open_dataset


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CaptureStore:
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    fill_store(tmp_path / "run.zarr", Codec.named("int8", 24), [5, 0, 100, 33], layers=(3, 9))
    return CaptureStore.open(tmp_path / "run.zarr")


def test_values_are_those_of_the_reader(store: CaptureStore) -> None:
    rows = store.layer(9)
    view = open_dataset(store, 9)
    assert dict(view.sizes) == {"row": 138, "channel": 24}
    same = np.testing.assert_array_equal
    same(view.activation.values, rows[:])
    same(view.activation[7].values, rows[7])
    same(view.activation[7, 3].values, rows[7][3])
    same(view.activation[5:90:7, 2:9].values, rows[5:90:7][:, 2:9])
    same(view.activation[[4, 1, 4]].values, rows[[4, 1, 4]])
    same(view.activation[-3:, -1].values, rows[-3:][:, -1])
    same(view.activation.isel(row=[9, 8], channel=[0, 5]).values, rows[[9, 8]][:, [0, 5]])
    same(view.norm.values, rows.norm())
    chosen = view.isel(row=np.flatnonzero(view.position.values > 20))
    same(chosen.activation.values, rows[store.where("position > 20")])
    same(view.sel(row=slice(10, 12)).activation.values, rows[10:13])
    assert view.attrs["layer"] == 9
    assert isinstance(open_dataset(store, 3), xarray.Dataset)
    with pytest.raises(StoreError, match="layer 4 is not in"):
        open_dataset(store, 4)


def test_nothing_is_decoded_before_it_is_asked_for(
    store: CaptureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[object] = []
    original = LayerReader.__getitem__
    monkeypatch.setattr(
        LayerReader, "__getitem__", lambda self, rows: (read.append(rows), original(self, rows))[1]
    )
    view = open_dataset(store, 3)
    part = view.activation[40:60, 3]
    repr(view)
    assert read == []
    assert part.shape == (20,)
    part.load()
    assert read == [slice(40, 60, 1)]
