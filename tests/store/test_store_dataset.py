"""The torch datasets: every row exactly once over ranks and workers, in an order that a resumed run continues."""

from __future__ import annotations

import json
import os
import pickle
import time
from itertools import islice, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from store_samples import fill_store
from torch.utils.data import DataLoader

from nla_engine.codec.rows import Codec
from nla_engine.errors import RequestError, StoreError, WhereError
from nla_engine.store import CaptureStore
from nla_engine.store.views.dataset import RowDataset, ShuffledRows, _turns

SIZES = [5, 0, 100, 33, 150]
ROWS = sum(SIZES)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> CaptureStore:
    """288 rows in 18 shards, narrow arrays in 2."""
    path = tmp_path_factory.mktemp("dataset") / "run.zarr"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        fill_store(path, Codec.named("int8", 16), SIZES, shard_rows=16, layers=(3, 9))
    return CaptureStore.open(path)


def numbers(batches) -> list[list[int]]:
    return [rows.tolist() for rows, _ in batches]


def flat(batches: list[list[int]]) -> list[int]:
    return [row for batch in batches for row in batch]


def check_vectors(store: CaptureStore, batches, layer: int = 3) -> None:
    for rows, vectors in batches:
        want = torch.from_numpy(store.layer(layer)[rows.numpy()])
        torch.testing.assert_close(vectors, want, rtol=0, atol=0, equal_nan=True)


def test_rows_by_number(store: CaptureStore) -> None:
    everything = RowDataset(store, 3)
    assert len(everything) == ROWS
    assert torch.equal(everything[7], torch.from_numpy(store.layer(3)[7]))
    assert torch.equal(everything[-1], torch.from_numpy(store.layer(3)[-1]))
    chosen = RowDataset(store, 9, where="position > 20 and not nonfinite", dtype=torch.bfloat16, numbers=True)
    rows = store.where("position > 20 and not nonfinite")
    assert len(chosen) == len(rows) < ROWS
    number, vector = chosen[4]
    assert number == rows[4]
    assert torch.equal(vector, torch.from_numpy(store.layer(9)[int(rows[4])]).to(torch.bfloat16))
    for dataset in (chosen, everything):
        with pytest.raises(IndexError):
            dataset[len(dataset)]
        with pytest.raises(IndexError):
            dataset[-len(dataset) - 1]


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_by_number_through_a_loader(store: CaptureStore, workers: int) -> None:
    loader = DataLoader(RowDataset(store, 3, numbers=True), batch_size=50, num_workers=workers)
    batches = list(loader)
    assert flat(numbers(batches)) == list(range(ROWS))
    check_vectors(store, batches)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    epoch=st.integers(0, 3),
    ranks=st.integers(1, 4),
    workers=st.integers(1, 3),
    batch=st.sampled_from([1, 7, 16, 1000]),
    buffer=st.sampled_from([1, 16, 50, 10_000]),
    where=st.sampled_from([None, "position % 1 == 0", "position > 12", "sequence == 3 and position < 4"]),
    even=st.booleans(),
)
def test_every_row_exactly_once(store, seed, epoch, ranks, workers, batch, buffer, where, even) -> None:
    where = None if where == "position % 1 == 0" else where
    chosen = np.arange(ROWS) if where is None else store.where(where)
    seen: list[int] = []
    counts = set()
    for rank in range(ranks):
        dataset = ShuffledRows(
            store,
            3,
            batch_size=batch,
            where=where,
            seed=seed,
            buffer_rows=buffer,
            even=even,
            rank=rank,
            ranks=ranks,
        )
        dataset.set_epoch(epoch)
        sizes = []
        for worker in range(workers):
            parts = [rows.tolist() for rows, _ in dataset._stream(epoch, dataset._span(worker, workers), 0)]
            assert all(len(part) == batch for part in parts[: None if even else -1])
            sizes.append(len(parts))
            seen += flat(parts)
        assert sum(sizes) == dataset.batches(workers)
        counts.add(sum(sizes))
    assert len(set(seen)) == len(seen)
    assert set(seen) <= set(chosen.tolist())
    if even:
        assert len(counts) == 1
        assert len(chosen) - len(seen) < ranks * workers * batch
    else:
        assert len(seen) == len(chosen)


def test_the_order_depends_on_seed_and_epoch_alone(store: CaptureStore) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        dataset = ShuffledRows(store, 3, batch_size=10, seed=seed, buffer_rows=64, numbers=True)
        dataset.set_epoch(epoch)
        return flat(numbers(dataset))

    assert order(1, 0) == order(1, 0)
    orders = [order(1, 0), order(1, 1), order(2, 0)]
    assert all(sorted(rows) == list(range(ROWS)) for rows in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    first = np.array(orders[0][:64]) // 16
    assert len(set(first)) <= 5  # a buffer of 64 rows is drawn from four shards, or five with one cut in two
    assert (np.diff(orders[0]) == 1).mean() < 0.1


class Large:
    """Stands for a store, and its layer, of 1e9 rows in 244,141 shards; a vector is its row number, twice."""

    rows, shard_rows, attributes = 10**9, 4096, {"store_id": "large"}

    def chosen_layer(self, layer: int | None) -> int:
        return 0

    def layer(self, number: int) -> Large:
        return self

    def torch(self, rows: slice, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        return torch.arange(rows.start, rows.stop, dtype=torch.float64)[:, None].expand(-1, 2)


def test_a_buffer_costs_the_same_however_many_shards_there_are() -> None:
    """Less than a millisecond of planning; 0.3 s where every shard is looked at. And row numbers are not kept."""
    dataset = ShuffledRows(Large(), batch_size=16_384, numbers=True)  # type: ignore[arg-type]
    assert len(pickle.dumps(dataset)) < 4 << 20
    started, seen = time.process_time(), []
    for done in (0, 30_000, 60_000):
        dataset.load_state_dict(dataset.state_dict(done))
        batches = list(islice(dataset, 50))
        seen += [rows for rows, _ in batches]
        assert all(torch.equal(vectors[:, 0].long(), rows) for rows, vectors in batches)
    assert time.process_time() - started < 10
    assert len(torch.cat(seen).unique()) == 150 * 16_384


def test_the_turns_of_workers_are_those_of_a_loader() -> None:
    """Against batches taken one by one, in turn, by 1 to 5 workers with up to 4 or 5 batches each."""
    for counts in (c for n in range(1, 6) for low in range(5) for c in product((low, low + 1), repeat=n)):
        turns = sorted((turn, stream) for stream, count in enumerate(counts) for turn in range(count))
        for done in range(len(turns) + 1):
            taken = [stream for _, stream in turns[:done]]
            order = dict.fromkeys([*(stream for _, stream in turns[done:]), *range(len(counts))])
            assert _turns(counts, done) == [(stream, taken.count(stream)) for stream in order]


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("batch", [9, 16])
def test_a_loader_goes_on_where_it_was(store: CaptureStore, workers: int, batch: int) -> None:
    def loader(state: dict | None = None) -> DataLoader:
        dataset = ShuffledRows(store, 3, batch_size=batch, seed=3, buffer_rows=40, numbers=True)
        dataset.set_epoch(5)
        if state is not None:
            dataset.load_state_dict(json.loads(json.dumps(state)))
        return DataLoader(dataset, batch_size=None, num_workers=workers)

    uninterrupted = list(loader())
    check_vectors(store, uninterrupted)
    assert sorted(flat(numbers(uninterrupted))) == list(range(ROWS))
    total = len(uninterrupted)
    assert total == loader().dataset.batches(workers)
    for done in {0, 1, workers, total // 2, total - 1, total} if workers < 2 else {1, total // 2, total - 1}:
        state = loader().dataset.state_dict(done, workers)
        assert numbers(loader(state)) == numbers(uninterrupted)[done:]


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_workers_that_stay_follow_the_epoch(store: CaptureStore, how: str) -> None:
    dataset = ShuffledRows(store, 3, batch_size=16, buffer_rows=48, numbers=True)
    kept = DataLoader(
        dataset, batch_size=None, num_workers=2, persistent_workers=True, multiprocessing_context=how
    )
    seen = []
    for epoch in (0, 1, 7, 0):
        dataset.set_epoch(epoch)
        seen.append(numbers(kept))
        fresh = ShuffledRows(store, 3, batch_size=16, buffer_rows=48, numbers=True)
        fresh.set_epoch(epoch)
        assert numbers(DataLoader(fresh, batch_size=None, num_workers=2)) == seen[-1]
    assert seen[0] == seen[3] != seen[1] != seen[2]


def test_its_place_is_in_host_memory_wherever_it_is_made(store: CaptureStore) -> None:
    with torch.inference_mode(), torch.device("meta"):
        dataset = ShuffledRows(store, 3, batch_size=16, numbers=True)
    assert sorted(flat(numbers(dataset))) == list(range(ROWS))


def test_even_batches_that_nobody_gets_are_refused(store: CaptureStore) -> None:
    with pytest.raises(
        RequestError, match=r"rows give none of 1 workers a whole batch of 4096: lower batch_size"
    ):
        next(iter(ShuffledRows(store, 3, batch_size=4096, even=True)))
    assert len(list(ShuffledRows(store, 3, batch_size=4096))) == 1


def test_without_workers_the_dataset_counts_itself(store: CaptureStore) -> None:
    dataset = ShuffledRows(store, 3, batch_size=16, numbers=True, buffer_rows=48)
    everything = numbers(dataset)
    taken = []
    for rows, _ in dataset:
        taken.append(rows.tolist())
        if len(taken) == 4:
            break
    state = dataset.state_dict()
    assert state["batches"] == 4
    other = ShuffledRows(store, 3, batch_size=16, numbers=True, buffer_rows=48)
    other.load_state_dict(state)
    assert taken + numbers(other) == everything
    assert other.state_dict()["batches"] == 0  # the next epoch starts afresh
    assert numbers(other) == everything


def test_a_dataset_goes_to_other_processes(store: CaptureStore) -> None:
    dataset = ShuffledRows(store, 9, batch_size=32, numbers=True)
    assert numbers(pickle.loads(pickle.dumps(dataset))) == numbers(dataset)
    check_vectors(store, list(dataset), layer=9)
    vectors = list(ShuffledRows(store, 3, batch_size=100, dtype=torch.float16))
    assert [tuple(part.shape) for part in vectors] == [(100, 16), (100, 16), (88, 16)]
    assert vectors[0].dtype == torch.float16


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"batch_size": 0}, RequestError, "batch_size is 0"),
        ({"buffer_rows": -1}, RequestError, "buffer_rows is -1"),
        ({"rank": 2, "ranks": 2}, RequestError, "rank is 2: it must be 0 to 1"),
        ({"dtype": torch.int8}, RequestError, "cannot be read as"),
        ({"layer": 4}, StoreError, "layer 4 is not in"),
        ({"where": "position > 1000"}, StoreError, "no row fits"),
        ({"where": "nonsense > 3"}, WhereError, "nonsense"),
    ],
)
def test_requests_that_cannot_be_met(store: CaptureStore, change: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        ShuffledRows(store, **{"layer": 3, "batch_size": 4, **change})


def test_a_state_of_another_stream_is_refused(store: CaptureStore) -> None:
    dataset = ShuffledRows(store, 3, batch_size=4)
    with pytest.raises(StoreError, match="another stream: batch_size was 8, is now 4"):
        dataset.load_state_dict(ShuffledRows(store, 3, batch_size=8).state_dict())
    dataset.load_state_dict(dataset.state_dict(3, workers=2))
    with pytest.raises(RequestError, match="the state is of 2 workers, not 1"):
        next(iter(dataset))


def test_ranks_are_those_of_torch_distributed(
    store: CaptureStore, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """One process that says it is the only rank; then two that `rank` and `ranks` name."""
    rendezvous = tmp_path_factory.mktemp("group") / "file"
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    try:
        alone = ShuffledRows(store, 3, batch_size=50, numbers=True)
        assert (alone.state_dict()["ranks"], len(flat(numbers(alone)))) == (1, ROWS)
        halves = [ShuffledRows(store, 3, batch_size=50, numbers=True, rank=rank, ranks=2) for rank in (0, 1)]
        seen = [flat(numbers(half)) for half in halves]
        assert len(seen[0]) == len(seen[1]) == ROWS // 2
        assert sorted(seen[0] + seen[1]) == list(range(ROWS))
    finally:
        torch.distributed.destroy_process_group()
