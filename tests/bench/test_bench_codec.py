"""Suite codec: its rows are as hard as they say, its figures are those of the codecs, its planes lose nothing."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
from store_samples import fill_store

from nla_engine.bench.__main__ import main
from nla_engine.bench.schemes import schemes
from nla_engine.bench.suites.codec import join_planes, measure, split_planes, synthetic_rows
from nla_engine.codec.rows import SINK_FACTOR, Codec, relative_errors


def test_rows_have_massive_channels_and_sinks() -> None:
    rows = synthetic_rows(4000, 256)
    norm = np.linalg.norm(rows, axis=1)
    assert 0 < np.count_nonzero(norm > SINK_FACTOR * np.median(norm)) < 40
    size = np.sort(np.median(np.abs(rows), axis=0))
    assert size[-4] > 10 * size[128]
    assert np.array_equal(rows, synthetic_rows(4000, 256))


def test_schemes_are_what_they_are_called() -> None:
    rows = synthetic_rows(600, 256)
    rows = rows[np.linalg.norm(rows, axis=1) < SINK_FACTOR * np.median(np.linalg.norm(rows, axis=1))]
    errors = {}
    for scheme in schemes():
        error, cosine, shift = measure(rows[300:], scheme.fit(rows[:300])(rows[300:]))
        errors[scheme.name] = error.mean()
        assert scheme.row_bytes(256) <= 2 * 256 + 4
        assert np.all(cosine > 0.9) and 0 <= shift < 0.1
        if scheme.name in ("int8", "int4", "bf16"):
            codec = Codec.named(scheme.name, 256)
            np.testing.assert_allclose(error, relative_errors(codec, rows[300:]), rtol=1e-6, atol=1e-12)
            assert scheme.row_bytes(256) == codec.row_bytes
    assert errors["bf16"] == 0
    assert errors["int8"] < errors["int8 per 128, no rotation"] < errors["int8 per row"]
    assert errors["int8"] < errors["int8 affine per channel"]
    assert errors["int8"] < errors["fp8 e4m3 per row"] < errors["int4"]


def test_measure_on_known_errors() -> None:
    rows = np.random.default_rng(0).normal(size=(50, 64)).astype(np.float32)
    error, cosine, shift = measure(rows, 1.5 * rows)
    np.testing.assert_allclose(error, 0.5, rtol=1e-5)
    np.testing.assert_allclose(cosine, 1)
    assert shift < 1e-6
    assert measure(rows, -rows)[2] == pytest.approx(4 * 0.9)


def test_planes_lose_nothing() -> None:
    bits = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    exponent, rest = split_planes(bits)
    assert exponent.dtype == rest.dtype == np.uint8
    assert np.array_equal(exponent, ((bits >> 7) & 255))
    assert np.array_equal(join_planes(exponent, rest), bits)


def test_the_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    pytest.importorskip("matplotlib")
    out = tmp_path / "codec.csv"
    assert main(f"codec --repeats 1 --csv {out} --plot {tmp_path}".split()) == 0
    with out.open() as file:
        lines = {row["case"].removeprefix("tiny: "): float(row["p50"]) for row in csv.DictReader(file)}
    assert (
        0
        < lines["int8: relative L2 mean"]
        <= lines["int8: relative L2 p99"]
        <= lines["int8: relative L2 worst"]
    )
    assert lines["bf16: relative L2 worst"] == 0
    assert lines["bf16 exponent plane + zstd: ratio"] > 1.2
    assert (tmp_path / "codec.png").stat().st_size > 10_000


def test_rows_of_a_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr("nla_engine.bench.suites.codec.FIRST_ROWS", 100)
    fill_store(tmp_path / "exact.zarr", Codec.named("bf16", 32), [300])
    fill_store(tmp_path / "short.zarr", Codec.named("bf16", 32), [100])
    fill_store(tmp_path / "int8.zarr", Codec.named("int8", 32), [300])
    assert main(f"codec --repeats 1 --rows {tmp_path / 'exact.zarr'}".split()) == 0
    assert "rows are kept exactly and left out" in capsys.readouterr().err
    for name, message in (
        ("int8", "its rows are int8"),
        ("short", "needs 200 or more"),
        ("none", "no such store"),
    ):
        assert main(f"codec --rows {tmp_path / f'{name}.zarr'}".split()) == 2
        assert message in capsys.readouterr().err


def test_no_time_is_left(capsys: pytest.CaptureFixture) -> None:
    assert main(["codec", "--time-limit", "0.000001"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["lines"], result["skipped"]) == ([], ["codec: every scheme"])
