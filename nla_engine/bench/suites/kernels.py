"""Encoding and decoding rows and choosing tokens, in bytes per second; the gated product, in operations per second."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from nla_engine.bench.session import Prepared, Session, WrongWork
from nla_engine.bench.timing import median, time_launches
from nla_engine.capture.setup import MAX_PREFILL_TOKENS
from nla_engine.codec.rows import CODEC_NAMES, Codec
from nla_engine.ops.encode import RowStage, backend, decode_rows, encode_rows
from nla_engine.ops.gated_linear import gated_linear, has_kernel, tried_tiles
from nla_engine.ops.linear import tune
from nla_engine.ops.sampling import Choosing, Sampling, SlotState, advance
from nla_engine.ops.truncation import Truncation

#: Bytes of input used in turn, so that no launch finds its input in a cache; and most sets of buffers.
_ROTATE_BYTES = {"cuda": 1 << 28, "cpu": 1 << 20}
_MOST_SETS = 64
_REPEATS = 20
#: Standard deviation of the logits that tokens are chosen from.
_SPREAD = 2.5
#: Ways to choose a token.
_SAMPLINGS = {
    "sampled": Sampling(0.7),
    "top-p 0.9": Sampling(0.7, truncation=Truncation(top_p=0.9)),
    "top-k 20, top-p 0.8": Sampling(0.7, truncation=Truncation(top_p=0.8, top_k=20)),
}


def run(session: Session) -> None:
    """Every codec, both ways, at every number of rows; the choice of tokens; the gated product of a step and a pass."""
    _codecs(session)
    for lanes in session.sizes.batches:
        _choices(session, lanes)
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


# ---- the end of a step ----


def _choices(session: Session, lanes: int) -> None:
    """Choosing the next token of every lane, beside sampling without a truncation. Limit: the logits read once."""
    size = lanes * int(session.config.vocab_size) * session.settings.dtype.itemsize
    plain = None
    for name, sampling in _SAMPLINGS.items():
        line = session.measure(
            "kernels",
            f"choose {lanes} x {session.config.vocab_size}, {name}",
            "GB/s",
            _chosen(session, lanes, size, sampling),
            limit=session.hardware.copy / 1e9,
            against=plain,
            detail=lambda p50: f"{size / p50 / 1e3:.4g} us",
        )
        plain = plain or line


@contextmanager
def _chosen(session: Session, lanes: int, size: int, sampling: Sampling) -> Iterator[Prepared]:
    device, vocabulary = session.device, int(session.config.vocab_size)
    count = min(max(-(-_ROTATE_BYTES[device.type] // size), 2), _MOST_SETS)
    made = [
        (torch.randn(lanes, vocabulary, device=device) * _SPREAD).to(session.settings.dtype)
        for _ in range(count)
    ]
    state = SlotState.allocate(lanes, 1, device)
    state.active[:-1] = True
    state.limit.fill_(1 << 40)  # no sequence ends
    table = torch.zeros(1, vocabulary, dtype=torch.uint8, device=device)
    at, how = torch.arange(lanes, device=device), Choosing(sampling, table, 1, False)
    runs: list[Callable[[], object]] = [
        lambda logits=logits: advance(logits, at, state, how)  # type: ignore[misc]
        for logits in made
    ]
    yield _timed(session, size / 1e9, runs)


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
