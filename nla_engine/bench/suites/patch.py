"""Patched rows per second: rows of a few sequences, each with all the vectors that `patch` puts in its place.

The AR that makes these vectors is not part of it: see suite `reconstruct`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from nla_engine.bench.limits import patch_seconds
from nla_engine.bench.session import Prepared, Session, expect
from nla_engine.bench.shapes import twin
from nla_engine.bench.timing import seconds
from nla_engine.ops.divergence import Divergence, divergence, divergence_reference
from nla_engine.referee.measures import measure
from nla_engine.referee.patcher import Patcher
from nla_engine.referee.trial import Places, try_lanes
from nla_engine.referee.variants import VARIANTS, Lane

#: Rows of logits that are compared at once.
_LANES = 768


def run(session: Session) -> None:
    """Patching alone, of sequences that were read; with the reading, as `patch` does it; the comparison of logits."""
    tokens = session.sizes.context
    count = max(session.sizes.vectors // tokens, 1)
    blocks = len(session.lm.blocks) - 1 - session.layer
    case = f"{count * tokens} rows of {count} x {tokens} tokens, {1 + len(VARIANTS)} vectors each, {blocks} blocks"
    limit = 1 / patch_seconds(session.size, session.hardware, 1, blocks)
    line = session.measure(
        "patch",
        case,
        "patched rows/s",
        _patched(session, count, tokens),
        limit=limit,
        detail=lambda p50: f"{p50 / (1 + len(VARIANTS)):,.0f} rows/s with all controls",
    )
    session.measure(
        "patch", f"{case}, reading", "patched rows/s", _tried(session, count, tokens), against=line
    )
    plain = None
    for name, run in (("in torch", divergence_reference), ("", divergence)):
        case = f"comparison of {_LANES} x {session.lm.vocab_size} logits{', ' + name if name else ''}"
        limit, made = session.hardware.copy / 1e9, _compared(session, run)
        plain = session.measure("patch", case, "GB/s", made, limit=limit, against=plain)


def _places(session: Session, count: int, tokens: int) -> Places:
    """Every position of random sequences."""
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, session.lm.vocab_size, tokens) for _ in range(count)]
    return Places(ids, np.repeat(np.arange(count), tokens), np.tile(np.arange(tokens), count))


def _vectors(session: Session, rows: int) -> torch.Tensor:
    generator = torch.Generator(session.device).manual_seed(0)
    return torch.randn(rows, session.d_model, device=session.device, generator=generator)


@contextmanager
def _patched(session: Session, count: int, tokens: int) -> Iterator[Prepared]:
    places, rows, each = _places(session, count, tokens), count * tokens, 1 + len(VARIANTS)
    row = np.repeat(np.arange(rows), each)
    others = np.flatnonzero(np.arange(len(row)) % each)
    vectors, following = _vectors(session, len(row)), places.following(1)
    with Patcher(twin(session.lm), session.layer) as patcher:
        read = patcher.read(places.tokens)

        chosen = torch.from_numpy(others).to(session.device)

        def patch() -> None:
            states = patcher.run(read, places.sequence[row], places.position[row], vectors)
            found = measure(patcher.lm, states[::each], states[chosen], row[others], following)
            expect("compared rows", int(np.isfinite(found.kl).sum()), len(others))

        yield Prepared(lambda: len(row) / seconds(patch, session.device), patch)


@contextmanager
def _compared(session: Session, run: Callable[..., Divergence]) -> Iterator[Prepared]:
    """The patched logits, read once, per second; those of the model itself are shared by the variants of a row."""
    device, vocabulary, each = session.device, session.lm.vocab_size, 1 + len(VARIANTS)
    generator = torch.Generator(device).manual_seed(0)
    own, patched = (
        torch.randn(n, vocabulary, device=device, generator=generator).to(session.lm.dtype)
        for n in (_LANES // each, _LANES)
    )
    row = torch.arange(_LANES, device=device) // each % len(own)
    token = torch.randint(0, vocabulary, (_LANES,), device=device, generator=generator)

    def compare() -> None:
        run(own, patched, row, token)

    yield Prepared(lambda: patched.nbytes / 1e9 / seconds(compare, device), compare)


@contextmanager
def _tried(session: Session, count: int, tokens: int) -> Iterator[Prepared]:
    places, rows = _places(session, count, tokens), count * tokens
    numbers = np.arange(rows)
    lanes = [Lane(variant, numbers, _vectors(session, rows), numbers) for variant in VARIANTS]
    with Patcher(twin(session.lm), session.layer) as patcher:

        def patch() -> None:
            tried = try_lanes(patcher, places, lanes, 0)
            expect("variants", len(tried.measured), len(VARIANTS))

        patched = rows * (1 + len(VARIANTS))
        yield Prepared(lambda: patched / seconds(patch, session.device), patch)
