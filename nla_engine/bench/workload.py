"""The work of the cases: requests, prompt files, vectors, stores and generators, all of exactly known size."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import NormalDist

import numpy as np

from nla_engine.bench.session import expect
from nla_engine.capture.next_token import NextTokenTap
from nla_engine.capture.row_range import RowRange
from nla_engine.capture.setup import MAX_PREFILL_TOKENS
from nla_engine.capture.tap import RowTap
from nla_engine.codec.rows import Codec
from nla_engine.engine import choose
from nla_engine.engine.choose import AnyGenerator
from nla_engine.engine.request import Request
from nla_engine.engine.stopping import StopAutomaton
from nla_engine.engine.tap import NoTap, Tap
from nla_engine.models.load import LanguageModel
from nla_engine.ops.backends import Kernels
from nla_engine.sites import Site
from nla_engine.store import Finish, LayerRows, SequenceRows, StoreWriter, row_flags

#: What texts are made of: each is one token of the bench's tokenizer.
LETTERS = "abcdefghijklmnopqrstuvwxyz"
#: Spread of the logarithm of document lengths; common for web text.
_SIGMA = 0.8
_SHORTEST = 16
#: Rows of a written sequence, and distinct rows in a written store.
_SEQUENCE_ROWS, _DISTINCT_ROWS = 128, 4096
#: Sequences that a writer gets in one call.
_ENDED_AT_ONCE = 64


def texts(lengths: Sequence[int], seed: int = 0) -> list[str]:
    """Random letters."""
    rng, letters = np.random.default_rng(seed), np.frombuffer(LETTERS.encode(), np.uint8)
    return [rng.choice(letters, size).tobytes().decode() for size in lengths]


def prompt_file(path: Path, lengths: Sequence[int]) -> Path:
    """One prompt per line, with these lengths in tokens."""
    path.write_text("\n".join(texts(lengths)) + "\n", encoding="ascii")
    return path


def document_lengths(count: int, mean: int, longest: int) -> list[int]:
    """Lognormal lengths truncated at `longest`, with this mean after truncation; the same every time, shuffled."""
    z = np.array([NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)])
    low, high = 0.0, math.log(longest)
    for _ in range(40):
        mu = (low + high) / 2
        lengths = np.clip(np.exp(mu + _SIGMA * z), min(_SHORTEST, mean), longest)
        low, high = (mu, high) if lengths.mean() < mean else (low, mu)
    return [int(size) for size in np.random.default_rng(0).permutation(lengths.round())]


def ragged_lengths(count: int, shortest: int, longest: int) -> list[int]:
    """Lengths spread evenly over the logarithm, both ends included; the same every time, shuffled."""
    lengths = np.geomspace(shortest, longest, count).round().astype(int)
    return [int(size) for size in np.random.default_rng(0).permutation(lengths)]


def requests(lm: LanguageModel, lengths: Sequence[int], new_tokens: Sequence[int]) -> list[Request]:
    """Random prompts of these lengths, each to be continued by its number of new tokens."""
    rng = np.random.default_rng(0)
    ids = [tuple(map(int, rng.integers(0, lm.vocab_size, size))) for size in lengths]
    return [Request(i, prompt, new) for i, (prompt, new) in enumerate(zip(ids, new_tokens, strict=True))]


@contextmanager
def open_generator(
    lm: LanguageModel,
    *,
    slots: int,
    length: int,
    new_tokens: int,
    layers: Sequence[Site | int] = (),
    positions: str = "generated",
    prompt: int = 0,
    max_prefill: int | None = None,
    next_token: int | None = None,
    blocks: int | None = None,
    kernels: Kernels = Kernels(),
) -> Iterator[AnyGenerator]:
    """A generator that never stops early; with `layers`, tapped into staging buffers as in capture (int8).

    prompt: tokens of the shortest prompt, from which the number of rows to keep is computed. blocks: as `Runner`.
    next_token: as `--next-token` of capture
    """
    budget = max_prefill or MAX_PREFILL_TOKENS[lm.device.type]
    keep = RowRange.parse(positions)
    tap: Tap = NoTap()
    if layers:
        tap = RowTap(
            layers,
            Codec.named("int8", lm.d_model),
            keep,
            rows_per_slot=max(keep.end(prompt, prompt + new_tokens) - prompt, 1),
            sink_norm={Site.at(site): math.inf for site in layers},
            device=lm.device,
        )
    following = None
    if next_token is not None:
        room = keep.count(prompt, length)
        following = NextTokenTap(next_token, keep, rows_per_slot=room, device=lm.device)
    generator = choose.open_generator(
        lm,
        slots=slots,
        blocks=blocks,
        length=length,
        tap=tap,
        kernels=kernels,
        how={
            "max_new_tokens": new_tokens,
            "stop": StopAutomaton([b""] * lm.vocab_size, ()) if new_tokens else None,
            "read_last": bool(layers and new_tokens),
            "max_prefill_tokens": budget,
            "following": following,
        },
    )
    with generator.runner:
        yield generator


def run_all(generator: AnyGenerator, work: Sequence[Request]) -> tuple[int, int]:
    """Tokens generated and rows collected over all of `work`. Every request must run to its full length."""
    ended = tokens = rows = 0
    for completion in generator.run(iter(work)):
        ended += 1
        tokens += len(completion.generated)
        rows += sum(len(kept.norm) for kept in completion.rows.values())
    expect("sequences ended", ended, len(work))
    expect("tokens generated", tokens, sum(r.max_new_tokens for r in work))
    return tokens, rows


def vectors(count: int, width: int) -> np.ndarray:
    """float32 [count, width], normal."""
    return np.random.default_rng(0).standard_normal((count, width), dtype=np.float32)


def encoded_sequences(codec: Codec, layer: int, rows: int) -> list[SequenceRows]:
    """At least `rows` rows as a writer takes them, in sequences of 128. A few are encoded and repeated."""
    n = _SEQUENCE_ROWS
    pool = vectors(min(max(rows, n), _DISTINCT_ROWS), codec.d_model)
    tokens = np.zeros(n, np.int32)
    position = np.arange(n, dtype=np.int32)
    distinct = [
        SequenceRows(
            token_id=tokens,
            next_token_id=np.append(tokens[1:], np.int32(-1)),
            position=position,
            flags=row_flags(position, 1, n),
            layers={Site(layer): LayerRows.encode(codec, pool[start : start + n], math.inf)},
            tokens=tokens,
            prompt_size=1,
            finish=Finish.LENGTH,
            source=b"{}",
        )
        for start in range(0, len(pool) - n + 1, n)
    ]
    return [distinct[i % len(distinct)] for i in range(-(-rows // n))]


def write_store(path: Path, codec: Codec, layer: int, sequences: Sequence[SequenceRows]) -> None:
    """Write a complete store of these sequences."""
    with StoreWriter.create(
        path,
        layers=[layer],
        codec=codec,
        sink_norm={Site(layer): math.inf},
        vocabulary=[b"a"],
        provenance={},
        options={},
        overwrite=True,
    ) as writer:
        for start in range(0, len(sequences), _ENDED_AT_ONCE):
            writer.append_many(sequences[start : start + _ENDED_AT_ONCE])
