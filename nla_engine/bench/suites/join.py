"""Joining the parts of a run: microseconds per row at several sizes, with rows linked and with rows copied.

Simulated workers write real parts: replies of 64 to 192 tokens, as `capture --shard` orders and stores them. Rows are
narrow where many are needed; the wide ones are those of the model. Parts have just been written, so what is copied
comes from the page cache where it fits. Every new file is made durable.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np

from nla_engine.bench.report import Line
from nla_engine.bench.session import Prepared, Session, expect
from nla_engine.capture.appender import filling
from nla_engine.codec.rows import Codec
from nla_engine.engine.request import Finish
from nla_engine.shard import Shard
from nla_engine.sites import Site
from nla_engine.store import LayerRows, StoreWriter, row_flags
from nla_engine.store.exchange.merge import merge

#: Parts, channels of narrow rows, sequences that end together, tokens of a reply.
_PARTS, _NARROW, _TOGETHER, _REPLY = 4, 128, 64, (64, 192)
_SITE = Site(0)
#: The largest part of the free disk that parts may take, and parts with their copy.
_DISK_PART = 0.8


def run(session: Session) -> None:
    """Narrow rows at every size, then the model's own; each linked, and copied if there is room."""
    cases = [(rows, _NARROW) for rows in session.sizes.join_rows]
    cases.append((session.sizes.join_rows[0], session.d_model))
    for rows, width in cases:
        codec = Codec.named("int8", width)
        name, size = f"{rows} x {width} of {_PARTS} parts", rows * (codec.row_bytes + 25)
        room = _DISK_PART * shutil.disk_usage(session.directory).free
        if size > room:
            session.skipped.append(f"join: {name}: the disk has no room")
            continue
        with _parts(session.directory, codec, rows) as parts:
            linked = _measure(session, f"link {name}", parts, rows, size)
            if 2 * size > room:
                session.skipped.append(f"join: copy {name}: the disk has no room")
                continue
            copied = _measure(session, f"copy {name}", parts, rows, size)
        if linked is not None:
            linked.compare(copied)


def _measure(session: Session, case: str, parts: list[Path], rows: int, size: int) -> Line | None:
    """size: bytes of all rows."""

    def detail(p50: float) -> str:
        return f"{p50 * rows / 1e6:.2f} s, {size / p50 / rows:,.0f} MB/s"

    prepared = _join(session, parts, rows, case.startswith("link"))
    return session.measure("join", case, "us/row", prepared, warmups=0, repeats=3, detail=detail)


@contextmanager
def _join(session: Session, parts: list[Path], rows: int, linked: bool) -> Iterator[Prepared]:
    out = session.directory / "joined.zarr"

    def once() -> float:
        shutil.rmtree(out, ignore_errors=True)
        os.sync()
        began = time.perf_counter()
        if linked:
            joined = merge(parts, out)
        else:
            with mock.patch("os.link", side_effect=OSError):
                joined = merge(parts, out)
        seconds = time.perf_counter() - began
        expect("rows", joined.rows, rows)
        return seconds / rows * 1e6

    yield Prepared(once)
    shutil.rmtree(out, ignore_errors=True)


@contextmanager
def _parts(directory: Path, codec: Codec, rows: int) -> Iterator[list[Path]]:
    """Stores of the parts of a run, together with so many rows."""
    share = np.diff(np.linspace(0, rows, _PARTS + 1).astype(np.int64))
    # Parts have as many sequences: each number is there once.
    count = -(-rows // (_PARTS * sum(_REPLY) // 2))
    paths = [_part(directory, codec, Shard(n + 1, _PARTS), count, int(share[n])) for n in range(_PARTS)]
    yield paths
    for path in paths:
        shutil.rmtree(path)


def _part(directory: Path, codec: Codec, shard: Shard, count: int, rows: int) -> Path:
    """count: of its sequences"""
    rng = np.random.default_rng(shard.part)
    path = Path(shard.name(str(directory / "run.zarr")))
    most = _TOGETHER * _REPLY[1]
    vectors = LayerRows.encode(codec, rng.standard_normal((most, codec.d_model), dtype=np.float32), math.inf)
    lengths = rng.integers(*_REPLY, count)
    each, more = divmod(rows - int(lengths.sum()), count)
    lengths += each + (np.arange(count) < more)
    with StoreWriter.create(
        path,
        layers=[_SITE],
        codec=codec,
        sink_norm={_SITE: math.inf},
        vocabulary=[b"a"],
        provenance={"sequences_asked": count},
        options={"prompts": "p", "shard": str(shard)},
        overwrite=True,
    ) as writer:
        for at in range(0, count, _TOGETHER):
            here = lengths[at : at + _TOGETHER]
            first = sorted(filling(here.tolist(), writer.room))
            here = np.concatenate([here[first], np.delete(here, first)])
            _append(writer, here, vectors, (np.arange(at, at + len(here)) * shard.of) + shard.part - 1)
    return path


def _append(writer: StoreWriter, sizes: np.ndarray, vectors: LayerRows, numbers: np.ndarray) -> None:
    total, start = int(sizes.sum()), np.cumsum(sizes) - sizes
    owner = np.repeat(np.arange(len(sizes)), sizes)
    position = (np.arange(total) - start[owner]).astype(np.int32)
    last = position == sizes[owner] - 1
    tokens = np.zeros(total, np.int32)
    columns = {
        "number": numbers,
        "row_size": sizes,
        "token_size": sizes,
        "source_size": np.full(len(sizes), 2, np.int64),
        "prompt_size": np.minimum(sizes, 1).astype(np.int32),
        "finish": np.full(len(sizes), int(Finish.EOS), np.uint8),
        "token_id": tokens,
        "next_token_id": np.where(last, -1, 0).astype(np.int32),
        "position": position,
        "flags": row_flags(position, 1, sizes[owner]),
        "tokens": tokens,
        "source": np.frombuffer(b"{}" * len(sizes), np.uint8),
    }
    part = {name: getattr(vectors, name)[:total] for name in ("codes", "scales", "norm")}
    writer.append_block(columns, {_SITE: replace(vectors, **part)})
