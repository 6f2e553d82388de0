"""What each way to store a row costs: bytes per row against relative L2 error, cosine and the shift of mse_nrm.

Rows come from a store that keeps them as bf16 (`--rows`), or are made up to look like a residual stream: heavy-tailed
channels of very different size, a few massive ones, a common mean, and a few sink rows. Sink rows are left out of the
errors, since the store keeps them exactly; their number is in the detail of the first line.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nla_engine.bench.plot import plot_rates
from nla_engine.bench.report import Line
from nla_engine.bench.schemes import schemes
from nla_engine.bench.session import Session, WrongWork
from nla_engine.codec.rows import SINK_FACTOR, bf16_bits, bf16_values
from nla_engine.errors import RequestError
from nla_engine.store import CaptureStore

#: Rows that a scheme may learn from. They stand for the first prompts of a capture.
FIRST_ROWS = 1024
#: Cosine of the made-up reconstruction for which mse_nrm is computed: that of a released pair.
_RECONSTRUCTION_COS = 0.9


def run(session: Session) -> None:
    """One line per scheme and measure, the plot, then lossless compression."""
    settings = session.settings
    if settings.time_limit is not None and time.monotonic() - session.started > settings.time_limit:
        session.skipped.append("codec: every scheme")
        return
    source = "made-up rows" if settings.rows is None else str(settings.rows)
    rows = (
        synthetic_rows(session.sizes.codec_rows, session.d_model)
        if settings.rows is None
        else _stored(settings.rows)
    )
    norm = np.linalg.norm(rows.astype(np.float64), axis=1)
    ordinary = np.isfinite(norm) & (norm > 0) & (norm <= SINK_FACTOR * np.median(norm[np.isfinite(norm)]))
    left_out = f"{np.count_nonzero(~ordinary)} of {len(rows):,} rows are kept exactly and left out; {source}"
    rows, d = rows[ordinary], rows.shape[1]
    first, rest = rows[:FIRST_ROWS], rows[FIRST_ROWS:]
    if len(rest) < 100:
        raise RequestError(
            f"{source}: {len(rows)} ordinary rows: suite codec needs {FIRST_ROWS + 100} or more"
        )
    points: dict[str, tuple[float, float, float]] = {}
    for scheme in schemes():
        error, cosine, shift = measure(rest, scheme.fit(first)(rest))
        size = scheme.row_bytes(d)
        points[scheme.name] = (size, float(error.mean()), float(np.percentile(error, 99)))
        figures = {
            "bytes a row": [size],
            "relative L2 mean": [points[scheme.name][1]],
            "relative L2 p99": [points[scheme.name][2]],
            "relative L2 worst": [float(error.max())],
            "1 - cos mean": [float((1 - cosine).mean())],
            "mse_nrm shift": [shift],
        }
        for name, values in figures.items():
            session.record(Line("codec", f"{scheme.name}: {name}", _unit(name), values, detail=left_out))
            left_out = ""
    _lossless(session, rest)
    if settings.plot is not None:
        plot_rates(settings.plot, session.machine, d, source, points)


def measure(rows: np.ndarray, read: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Relative L2 errors [n], cosines [n], and how far mse_nrm of a reconstruction moves when scored against `read`.

    The reconstruction is made up: it has cosine _RECONSTRUCTION_COS with each row, in a random direction.
    """
    x, y = rows.astype(np.float64), read.astype(np.float64)
    norm = np.linalg.norm(x, axis=1)
    error = np.linalg.norm(y - x, axis=1) / norm
    unit, seen = x / norm[:, None], y / np.linalg.norm(y, axis=1, keepdims=True)
    noise = np.random.default_rng(0).standard_normal(x.shape)
    noise -= (noise * unit).sum(axis=1, keepdims=True) * unit
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    made = _RECONSTRUCTION_COS * unit + np.sqrt(1 - _RECONSTRUCTION_COS**2) * noise
    shift = 2 * ((made * unit).sum(axis=1) - (made * seen).sum(axis=1))
    return error, (unit * seen).sum(axis=1), float(np.abs(shift).mean())


def synthetic_rows(count: int, d: int, seed: int = 0) -> np.ndarray:
    """Rows that are as hard to store as a residual stream, float32 [count, d], all of them bfloat16 values.

    Channel sizes are lognormal; four channels are 30 to 100 times larger, with a mean of their own; every row shares
    a mean direction; values have the tails of a Student t of 5 degrees; 0.2% of the rows are attention sinks.
    """
    rng = np.random.default_rng(seed)
    size = np.exp(rng.normal(0, 0.5, d))
    mean = rng.normal(0, 0.5, d) * size
    massive = rng.choice(d, min(4, d), replace=False)
    rows = rng.standard_t(5, (count, d)) * size + mean
    rows[:, massive] = rows[:, massive] * rng.uniform(5, 10, len(massive)) + rng.uniform(
        30, 100, len(massive)
    )
    rows *= np.exp(rng.normal(0, 0.25, (count, 1)))
    sinks = rng.random(count) < 0.002
    rows[np.ix_(sinks, massive)] *= 150
    return bf16_values(bf16_bits(rows.astype(np.float32)))


def split_planes(bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """bfloat16 bits uint16 [...] -> the byte with the exponent, and the byte with sign and mantissa."""
    return ((bits >> 7) & 0xFF).astype(np.uint8), ((bits & 0x7F) | ((bits >> 8) & 0x80)).astype(np.uint8)


def join_planes(exponent: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """The inverse of `split_planes`."""
    high = ((rest & 0x80).astype(np.uint16) << 8) | (rest & 0x7F)
    return np.asarray(high | (exponent.astype(np.uint16) << 7))


def _lossless(session: Session, rows: np.ndarray) -> None:
    """bf16 rows in chunks of 128, compressed by zstd level 1: as they are, shuffled by byte, and split by exponent.

    The rates are bfloat16 bytes per second of one core's time, splitting and joining (numpy) included.
    """
    from numcodecs import Shuffle, Zstd

    bits, zstd, shuffle = bf16_bits(rows), Zstd(level=1), Shuffle(elementsize=2)
    chunks = [np.ascontiguousarray(bits[i : i + 128]) for i in range(0, len(bits), 128)]

    def split(chunk: np.ndarray) -> tuple[bytes, np.ndarray]:
        exponent, rest = split_planes(chunk)
        return zstd.encode(exponent), rest

    def joined(packed: tuple[bytes, np.ndarray]) -> np.ndarray:
        exponent = np.frombuffer(zstd.decode(packed[0]), np.uint8)
        return join_planes(exponent.reshape(packed[1].shape), packed[1])

    ways: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., int]]] = {
        "zstd": (zstd.encode, zstd.decode, len),
        "byte shuffle + zstd": (
            lambda chunk: zstd.encode(shuffle.encode(chunk)),
            lambda packed: shuffle.decode(zstd.decode(packed)),
            len,
        ),
        "exponent plane + zstd": (split, joined, lambda packed: len(packed[0]) + packed[1].nbytes),
    }
    for name, (encode, decode, size) in ways.items():
        packed = [encode(chunk) for chunk in chunks]
        for one, chunk in zip(packed[:2], chunks, strict=False):
            if np.asarray(decode(one)).tobytes() != chunk.tobytes():
                raise WrongWork(f"{name} does not give the rows back")
        stored = sum(map(size, packed))
        session.record(Line("codec", f"bf16 {name}: ratio", "x", [bits.nbytes / stored]))
        for what, work, items in (("compress", encode, chunks), ("decompress", decode, packed)):
            rates = [bits.nbytes / _core_seconds(work, items) / 1e6 for _ in range(session.settings.repeats)]
            session.record(Line("codec", f"bf16 {name}: {what}", "MB/s", rates))


def _core_seconds(work: Callable[..., Any], items: Sequence[Any]) -> float:
    """Processor time of `work` on every item."""
    started = time.process_time()
    for item in items:
        work(item)
    return time.process_time() - started


def _stored(path: Path) -> np.ndarray:
    """At most 32,768 rows of the first layer of a bf16 store, spread evenly. RequestError for another codec."""
    store = CaptureStore.open(path)
    if store.codec.name != "bf16":
        raise RequestError(
            f"{path}: its rows are {store.codec.name}: errors are measured on rows kept as bf16"
        )
    numbers = np.unique(np.linspace(0, store.rows - 1, min(store.rows, 32_768)).astype(np.int64))
    return store.layer(store.layers[0])[np.random.default_rng(0).permutation(numbers)]


def _unit(name: str) -> str:
    return "B" if name.startswith("bytes") else "1"
