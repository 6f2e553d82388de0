"""Encoding and decoding rows, in bytes moved per second; the gated product, in operations per second."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from nla_engine.bench.session import Prepared, Session, WrongWork
from nla_engine.bench.timing import median, time_launches
from nla_engine.capture.run import MAX_PREFILL_TOKENS
from nla_engine.codec.rows import CODEC_NAMES, Codec
from nla_engine.ops.encode import RowStage, backend, decode_rows, encode_rows
from nla_engine.ops.gated_linear import gated_linear, has_kernel, tried_tiles
from nla_engine.ops.linear import tune

#: Bytes of input used in turn, so that no launch finds its input in a cache; and most sets of buffers.
_ROTATE_BYTES = {"cuda": 1 << 28, "cpu": 1 << 20}
_MOST_SETS = 64
_REPEATS = 20


def run(session: Session) -> None:
    """Every codec, both ways, at every number of rows; then the gated product of a step and of a full pass."""
    _codecs(session)
    for rows in sorted({*session.sizes.batches, MAX_PREFILL_TOKENS[session.device.type]}):
        _gated_product(session, rows)


def _timed(session: Session, amount: float, runs: list[Callable[[], object]]) -> Prepared:
    """amount: gigabytes or teraoperations of one launch."""
    return Prepared(lambda: amount / median(time_launches(runs, session.device, _REPEATS)), runs[0])


# ---- codecs ----


def _codecs(session: Session) -> None:
    width, chosen = session.d_model, backend(session.device)
    for name in CODEC_NAMES:
        codec = Codec.named(name, width)
        for rows in session.sizes.kernel_rows:
            for what, prepare in (("encode", _encode), ("decode", _decode)):
                session.measure(
                    "kernels",
                    f"{what} {name} {rows} x {width} ({chosen})",
                    "GB/s",
                    prepare(session, codec, rows),
                    limit=session.hardware.copy / 1e9,
                    detail=lambda p50, codec=codec, rows=rows: (  # type: ignore[misc]
                        f"{_moved(codec, rows) / p50 / 1e3:.4g} us"
                    ),
                )


def _moved(codec: Codec, rows: int) -> int:
    """Bytes read and written for `rows` rows: bfloat16 on one side, codes, scales and norm on the other."""
    return rows * (2 * codec.d_model + codec.row_bytes)


def _sets(session: Session, codec: Codec, rows: int) -> list[tuple[torch.Tensor, RowStage]]:
    """Pairs of bfloat16 rows and a stage that holds them encoded."""
    device = session.device
    count = min(max(-(-_ROTATE_BYTES[device.type] // (rows * codec.d_model * 2)), 2), _MOST_SETS)
    dest = torch.arange(rows, device=device)
    out = []
    for _ in range(count):
        hidden = torch.randn(rows, codec.d_model, device=device, dtype=torch.bfloat16)
        stage = RowStage.allocate(codec, rows, 1, device)
        encode_rows(hidden, dest, stage, math.inf)
        out.append((hidden, stage))
    return out


@contextmanager
def _encode(session: Session, codec: Codec, rows: int) -> Iterator[Prepared]:
    dest = torch.arange(rows, device=session.device)
    runs: list[Callable[[], object]] = [
        lambda hidden=hidden, stage=stage: encode_rows(hidden, dest, stage, math.inf)  # type: ignore[misc]
        for hidden, stage in _sets(session, codec, rows)
    ]
    yield _timed(session, _moved(codec, rows) / 1e9, runs)


@contextmanager
def _decode(session: Session, codec: Codec, rows: int) -> Iterator[Prepared]:
    runs: list[Callable[[], object]] = [
        lambda s=stage: decode_rows(s.codes, s.scales, s.norm, codec, torch.bfloat16)  # type: ignore[misc]
        for _, stage in _sets(session, codec, rows)
    ]
    yield _timed(session, _moved(codec, rows) / 1e9, runs)


# ---- the gated product ----


def _gated_product(session: Session, rows: int) -> None:
    """A product and a gate in two launches; where there is a kernel for it, also in one launch."""
    n, k, hardware = session.mlp_width, session.d_model, session.hardware
    operations = 2 * rows * 2 * n * k
    read = 2 * n * k * session.settings.dtype.itemsize
    limit = operations / max(operations / hardware.flops, read / hardware.copy) / 1e12
    two = session.measure(
        "kernels",
        f"gate and up {rows} x 2 x {n} x {k}, two launches",
        "TFLOP/s",
        _gated(session, rows, operations, one_launch=False),
        limit=limit,
    )
    if has_kernel(session.device) and session.settings.dtype == torch.bfloat16:
        session.measure(
            "kernels",
            f"gate and up {rows} x 2 x {n} x {k}, one launch",
            "TFLOP/s",
            _gated(session, rows, operations, one_launch=True),
            limit=limit,
            against=two,
        )


@contextmanager
def _gated(session: Session, rows: int, operations: int, *, one_launch: bool) -> Iterator[Prepared]:
    n, k, device, dtype = session.mlp_width, session.d_model, session.device, session.settings.dtype
    count = max(-(-_ROTATE_BYTES[device.type] // (2 * n * k * dtype.itemsize)), 2)
    weights = [torch.randn(2 * n, k, device=device).mul_(k**-0.5).to(dtype) for _ in range(count)]
    x = torch.randn(rows, k, device=device).to(dtype)
    tiles = tried_tiles(weights[0], "silu") if one_launch else ()
    if one_launch and not tiles:
        raise WrongWork(f"no tile computes 2 x {n} x {k} in {dtype}")
    tune(rows, weights)
    runs: list[Callable[[], object]] = [
        lambda w=w: gated_linear(x, w, "silu", tiles)  # type: ignore[misc]
        for w in weights
    ]
    yield _timed(session, operations / 1e12, runs)
