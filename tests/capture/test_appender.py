"""When finished sequences are committed: by time, including those just added; by filled shards, without them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from nla_engine.capture.appender import Appender
from nla_engine.codec.rows import Codec
from nla_engine.engine.request import Completion, Finish, Request
from nla_engine.models.prompt_set import Prompt
from nla_engine.store import LayerRows, StoreWriter, writer

CODEC = Codec.named("int8", 16)
LAYER, TOKENS = 3, 8


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(writer.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def open_writer(tmp_path: Path, clock: list[float]):
    with StoreWriter.create(
        tmp_path / "run.zarr",
        layers=[LAYER],
        codec=CODEC,
        sink_norm={LAYER: math.inf},
        vocabulary=[b"a"],
        provenance={},
        options={},
        shard_rows=TOKENS,
        commit_seconds=30.0,
    ) as opened:
        yield opened


def completions(*ids: int) -> list[Completion]:
    rows = np.random.default_rng(0).standard_normal((TOKENS, CODEC.d_model), np.float32)
    return [
        Completion(
            request=Request(id_, (0,) * 5, TOKENS - 5),
            generated=np.zeros(TOKENS - 5, np.int32),
            finish=Finish.LENGTH,
            positions=np.arange(TOKENS),
            rows={LAYER: LayerRows.encode(CODEC, rows, math.inf)},
        )
        for id_ in ids
    ]


def test_groups_far_apart_are_each_committed_when_they_come(
    open_writer: StoreWriter, clock: list[float]
) -> None:
    appender = Appender(open_writer, [Prompt((0,) * 5, b"{}")] * 9)
    for number in range(3):
        clock[0] += 300.0
        appender.add(completions(3 * number, 3 * number + 1, 3 * number + 2))
        assert open_writer.sequences == 3 * (number + 1)


def test_groups_that_follow_each_other_are_committed_with_the_next(
    open_writer: StoreWriter, clock: list[float]
) -> None:
    """So that no group waits for the disk while others end."""
    appender = Appender(open_writer, [Prompt((0,) * 5, b"{}")] * 9)
    appender.add(completions(0, 1, 2))
    assert open_writer.sequences == 0
    clock[0] += 1.0
    appender.add(completions(3, 4))
    assert open_writer.sequences == 3
    appender.add([])
    assert open_writer.sequences == 3
    clock[0] += 1.0
    appender.add([])  # finished ones wait for an earlier sequence: those appended are committed anyway
    assert open_writer.sequences == 5
