"""Costs that must not grow with what is already there: each at several sizes, as cost per unit, so that growth shows.

The operations on a store are in `nla_engine.bench.growth`. Everything runs on the CPU. Requests, graphs and bytes held
are counted, not timed.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from itertools import islice
from typing import Any

import numpy as np
import torch

from nla_engine.bench.growth import measure_growth
from nla_engine.bench.session import Prepared, Session, expect
from nla_engine.bench.timing import seconds
from nla_engine.bench.workload import encoded_sequences
from nla_engine.capture.appender import portion_of
from nla_engine.codec.rows import Codec
from nla_engine.engine.graph import lane_bucket
from nla_engine.sites import Site
from nla_engine.store import CaptureStore, StoreWriter
from nla_engine.store.exchange.importing import import_rows
from nla_engine.store.objects import ObjectPath
from nla_engine.store.views.dataset import ShuffledRows

_CPU = torch.device("cpu")
_SHARDS = (1_000, 10_000, 100_000)
_SHARD_ROWS = 4096
_BUFFERS = 20
_ROWS, _WIDTH = (4_096, 16_384, 65_536), 1024
_NARROW = 16
_OBJECTS = (128, 256, 512)
#: The rows of one of the sequences that end together: 129 tokens, 28 layers of 3,584 channels as int8.
_SEQUENCE_BYTES, _HOST_MEMORY = 129 * 28 * 3816, 4 << 30
_ENDED = (64, 512, 4_096)
_SLOTS = (1_024, 4_096, 16_384)


def run(session: Session) -> None:
    """Every cost at its sizes, the smallest first. With --scaling-rows only those of stores of so many rows."""
    only_rows = bool(session.settings.scaling_rows)
    measure_growth(session, all_axes=not only_rows)
    if only_rows:
        return
    for shards in _SHARDS:
        session.measure(
            "scaling", f"shuffled rows, {shards:,} shards", "us/buffer", _shuffled(shards), repeats=5
        )
    for rows in _ROWS:
        session.measure(
            "scaling", f"import {rows:,} x {_WIDTH} from npy", "us/row", _imported(session, rows), repeats=3
        )
    for ended in _ENDED:
        name = f"rows fetched at once, {ended:,} of 28 layers end together"
        session.measure("scaling", name, "GiB", _counted(partial(_fetched, ended)), warmups=0, repeats=1)
    for slots in _SLOTS:
        name = f"graphs for 1 to {slots:,} lanes"
        session.measure("scaling", name, "graphs", _counted(partial(_graphs, slots)), warmups=0, repeats=1)
    for rows in _OBJECTS if find_spec("obstore") else ():
        name = f"open and size a store of {rows:,} shards on an object store"
        session.measure("scaling", name, "requests", _requests(session, rows), warmups=0, repeats=1)


class _Layer:
    """Stands in for a store of many shards, and for its layer: finding rows is timed, not reading them."""

    shard_rows = _SHARD_ROWS

    def __init__(self, shards: int) -> None:
        self.rows, self.attributes = shards * _SHARD_ROWS, {"store_id": ""}

    def chosen_layer(self, layer: int | None) -> int:
        return 0

    def layer(self, number: int) -> _Layer:
        return self

    def torch(self, rows: slice, device: Any, dtype: Any) -> torch.Tensor:
        return torch.empty(rows.stop - rows.start, 1)


@contextmanager
def _shuffled(shards: int) -> Iterator[Prepared]:
    """The last buffers of an epoch, of 16,384 rows each; a batch is a buffer. The start of the epoch is left out."""
    store: Any = _Layer(shards)
    dataset = ShuffledRows(store, batch_size=16_384)
    total = dataset.batches()

    def once() -> float:
        dataset.load_state_dict(dataset.state_dict(total - _BUFFERS))
        batches = iter(dataset)
        next(batches)
        started = time.perf_counter()
        expect("buffers", len(list(islice(batches, _BUFFERS))), _BUFFERS - 1)
        return 1e6 * (time.perf_counter() - started) / (_BUFFERS - 1)

    yield Prepared(once)


@contextmanager
def _imported(session: Session, rows: int) -> Iterator[Prepared]:
    source, out = session.directory / "rows.npy", session.directory / "imported.zarr"
    np.save(source, np.random.default_rng(0).standard_normal((rows, _WIDTH), np.float32))

    def once() -> float:
        shutil.rmtree(out, ignore_errors=True)
        took = seconds(lambda: import_rows(source, out, layer=0), _CPU)
        return 1e6 * took / rows

    yield Prepared(once)
    shutil.rmtree(out)
    source.unlink()


@contextmanager
def _counted(count: Callable[[], float]) -> Iterator[Prepared]:
    yield Prepared(count)


def _fetched(ended: int) -> float:
    """GiB of the largest portion that is fetched at once, of sequences that ended together."""
    portion, resting, most = portion_of(_HOST_MEMORY), dict.fromkeys(range(ended), _SEQUENCE_BYTES), 0
    while resting:
        most = max(most, sum(resting.pop(id_) for id_ in portion(resting)))
    return most / 2**30


def _graphs(slots: int) -> float:
    return len({min(lane_bucket(lanes), slots) for lanes in range(1, slots + 1)})


@contextmanager
def _requests(session: Session, rows: int) -> Iterator[Prepared]:
    """Requests for opening a store in memory, through the interface of an object store."""
    from obstore.store import MemoryStore
    from zarr.storage import ObjectStore

    codec, asked = Codec.named("bf16", _NARROW), 0

    class Counted(ObjectPath):
        """Counts the requests to the store."""

        def _run(self, request: Any) -> Any:
            nonlocal asked
            asked += 1
            return super()._run(request)

    root: Any = Counted(ObjectStore(MemoryStore()), "memory://")
    with StoreWriter.create(
        root,
        layers=[0],
        codec=codec,
        sink_norm={Site(0): math.inf},
        vocabulary=[b"a"],
        provenance={},
        options={},
        shard_rows=1,
    ) as writer:
        writer.append_many(encoded_sequences(codec, 0, rows))
    asked = 0
    store = CaptureStore.open(root)
    expect("bytes", int(store.nbytes > 0), 1)
    yield Prepared(lambda: float(asked))
