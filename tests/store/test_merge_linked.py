"""Merge without copying: which files two stores share, that every row is right, and what the store's order has to do
with it."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from store_samples import create_store, sample_sequences

from nla_engine.capture.appender import filling
from nla_engine.codec.rows import Codec
from nla_engine.errors import StoreError, WriteError
from nla_engine.store import CaptureStore
from nla_engine.store.care.verify import verify
from nla_engine.store.exchange.merge import merge

LAYERS = (3, 9)
#: Rows per narrow shard of these stores.
NARROW = 256


@pytest.fixture(autouse=True)
def without_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr("nla_engine.store.exchange.link.BLOCK", 7)


def sizes_with_cuts(rng: np.random.Generator, cuts: int, rest: int) -> list[int]:
    """Sizes of sequences, of which `cuts` end at a multiple of NARROW, and `rest` rows after the last of these."""
    sizes: list[int] = []
    for span in [NARROW * int(rng.integers(1, 3)) for _ in range(cuts)] + [rest]:
        ends = np.unique([0, *rng.integers(0, span + 1, 5), span])
        sizes += [int(size) for size in np.diff(ends)] + [0] * int(rng.integers(0, 2))
    return sizes


def part(path: Path, number: int, of: int | None, sizes: list[int], seed: int, name: str = "int8") -> Path:
    """A store, as part `number` of a run if `of` is given."""
    codec = Codec.named(name, 32)
    sequences, _ = sample_sequences(seed, codec, LAYERS, sizes)
    given = {"prompts": "p", "shard": f"{number}/{of}"} if of else {"prompts": f"p{seed}"}
    with create_store(path, codec, LAYERS, options=given, shard_rows=16) as writer:
        for place, sequence in enumerate(sequences):
            writer.append(replace(sequence, number=number - 1 + place * of) if of else sequence)
    return path


def rows_by_number(path: Path, shift: int = 0) -> Iterator[tuple]:
    """Every sequence by bare zarr: its number, tokens, record, and all arrays of its rows."""
    root = zarr.open_group(path, mode="r")
    table = {name: np.asarray(values) for name, values in root["sequences"].arrays()}
    arrays = {f"rows/{name}": np.asarray(values) for name, values in root["rows"].arrays()}
    for layer in LAYERS:
        names = [name for name, _ in root[f"layer_{layer}"].arrays() if not name.startswith("exact")]
        arrays |= {f"{layer}/{name}": np.asarray(root[f"layer_{layer}/{name}"]) for name in names}
    arrays["rows/sequence"] = arrays["rows/sequence"] + shift
    for i in np.argsort(table["number"]):
        start, size = int(table["row_start"][i]), int(table["row_size"][i])
        values = [arrays[name][start : start + size].tobytes() for name in sorted(arrays)]
        for layer in LAYERS:
            named, exact = (np.asarray(root[f"layer_{layer}/{name}"]) for name in ("exact_row", "exact"))
            here = (named >= start) & (named < start + size)
            values += [(named[here] - start).tobytes(), exact[here].tobytes()]
        for what in ("token", "source"):
            first, count = int(table[f"{what}_start"][i]), int(table[f"{what}_size"][i])
            values.append(table["tokens" if what == "token" else what][first : first + count].tobytes())
        yield (
            int(table["number"][i]) + shift,
            int(table["prompt_size"][i]),
            int(table["finish"][i]),
            *values,
        )


def shared(path: Path) -> set[str]:
    """Files of a store that have another name too."""
    return {
        str(file.relative_to(path)) for file in path.rglob("*") if file.is_file() and file.stat().st_nlink > 1
    }


@pytest.mark.parametrize("name", ["int8", "bf16"])
@pytest.mark.parametrize("linked", [True, False])
def test_every_row_of_joined_parts(
    tmp_path: Path, rng: np.random.Generator, name: str, linked: bool, monkeypatch
) -> None:
    if not linked:
        monkeypatch.setattr(
            os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EXDEV, "another disk"))
        )
    rests = [int(rng.integers(1, NARROW)), 0, int(rng.integers(1, 3 * NARROW))]
    lists = [sizes_with_cuts(rng, cuts, rest) for cuts, rest in zip((2, 1, 0), rests, strict=True)]
    longest = max(map(len, lists))
    lists = [sizes + [0] * (longest - len(sizes)) for sizes in lists]  # all parts have as many sequences
    paths = [part(tmp_path / f"{n}.zarr", n, 3, sizes, n, name) for n, sizes in enumerate(lists, 1)]
    joined = merge(paths[::-1], tmp_path / "out.zarr")
    assert all(check.ok for check in verify(tmp_path / "out.zarr"))
    assert joined.complete and "merged" not in joined.options and "shard" not in joined.options
    given = sorted(itertools.chain(*map(rows_by_number, paths)))
    assert given == list(rows_by_number(tmp_path / "out.zarr"))
    assert len(given) == 3 * longest
    ends = [np.cumsum(sizes) for sizes in lists]
    cuts = [max([0, *end[end % NARROW == 0].tolist()]) for end in ends]
    assert cuts[0] >= 2 * NARROW
    files = shared(tmp_path / "out.zarr")
    assert len([file for file in files if file.startswith("layer_9/codes/c/")]) == (
        sum(cuts) // 16 if linked else 0
    )
    assert len([file for file in files if file.startswith("rows/sequence/c/")]) == (
        sum(cuts) // NARROW if linked else 0
    )
    for path in paths:  # the parts may go
        for file in path.rglob("c/*"):
            if file.is_file():
                file.write_bytes(b"") if not linked else file.unlink()
    assert given == list(rows_by_number(tmp_path / "out.zarr"))


def test_numbers_that_go_on_are_written_anew(tmp_path: Path, rng: np.random.Generator) -> None:
    """Stores of different prompts: all is linked but the numbers of the second store's sequences."""
    paths = [part(tmp_path / f"{n}.zarr", n, None, sizes_with_cuts(rng, 1, 9), n) for n in (1, 2)]
    merge(paths, tmp_path / "out.zarr")
    assert all(check.ok for check in verify(tmp_path / "out.zarr"))
    count = CaptureStore.open(paths[0]).sequences
    given = [*rows_by_number(paths[0]), *rows_by_number(paths[1], count)]
    assert given == list(rows_by_number(tmp_path / "out.zarr"))
    files = shared(tmp_path / "out.zarr")
    first, both = (
        sum(CaptureStore.open(path).rows // NARROW for path in some) for some in (paths[:1], paths)
    )
    assert len([file for file in files if file.startswith("rows/flags/c/")]) == both
    assert len([file for file in files if file.startswith("rows/sequence/c/")]) == first


def test_a_join_that_fails_leaves_the_parts(tmp_path: Path, rng: np.random.Generator, monkeypatch) -> None:
    """A full disk in the middle: an unfinished store that can be replaced, and nothing of the parts is touched."""
    paths = [part(tmp_path / f"{n}.zarr", n, 2, [NARROW, 256, 0], n) for n in (1, 2)]
    before = [list(rows_by_number(path)) for path in paths]
    link, count = os.link, itertools.count()

    def some(*arguments: object) -> None:
        if next(count) > 9:
            raise OSError(errno.EMLINK, "Too many links")
        link(*arguments)

    monkeypatch.setattr(os, "link", some)
    with pytest.raises(WriteError, match="Too many links"):
        merge(paths, tmp_path / "out.zarr")
    assert (
        not CaptureStore.open(tmp_path / "out.zarr").complete
        and CaptureStore.open(tmp_path / "out.zarr").rows == 0
    )
    monkeypatch.setattr(os, "link", link)
    merge(paths, tmp_path / "out.zarr", overwrite=True)
    assert before == [list(rows_by_number(path)) for path in paths]
    assert sorted(itertools.chain(*before)) == list(rows_by_number(tmp_path / "out.zarr"))


def test_parts_of_which_sequences_are_missing_or_doubled(tmp_path: Path) -> None:
    paths = [part(tmp_path / f"{n}.zarr", n, 2, [5, 6], n) for n in (1, 2)]
    codec = Codec.named("int8", 32)
    sequences, _ = sample_sequences(9, codec, LAYERS, [3, 4])
    for numbers in ((1, 2), (1, 5)):
        given = {"prompts": "p", "shard": "2/2"}
        with create_store(
            tmp_path / "2.zarr", codec, LAYERS, options=given, shard_rows=16, overwrite=True
        ) as writer:
            for number, sequence in zip(numbers, sequences, strict=True):
                writer.append(replace(sequence, number=number))
        with pytest.raises(StoreError, match="is in no part, or in two"):
            merge(paths, tmp_path / "out.zarr")


def test_some_sizes_fill_the_room(rng: np.random.Generator) -> None:
    """Against trying all subsets."""
    found = 0
    for _ in range(200):
        sizes = rng.integers(0, 30, int(rng.integers(0, 8))).tolist()
        room = int(rng.integers(0, 80))
        chosen = filling(sizes, room)
        sums = {sum(some) for n in range(len(sizes) + 1) for some in itertools.combinations(sizes, n)}
        if room and room in sums:
            assert sum(sizes[i] for i in chosen) == room
            found += 1
        else:
            assert not chosen
    assert found > 20
