"""Attention kernels against their references: in the interpreter on a CPU, on a GPU in bfloat16 too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from interpreted import DEVICE, run_in_the_interpreter, runs_kernels, starts_the_interpreter
from kernel_checks import DTYPES, ROUNDED, close, randn

from nla_engine.ops import attention, tile_sizes
from nla_engine.ops.cards import Card
from nla_engine.ops.key_values import KeyValues

#: Groups of seven heads: of a 7B model on a GPU, half as many where the interpreter runs program after program.
SEVENS = (28, 4) if DEVICE == "cuda" else (14, 2)


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "groups", "size"), [(4, 2, 32), (7, 1, 64), (*SEVENS, 128), (6, 2, 24), (3, 3, 80)]
)
@pytest.mark.parametrize(
    ("prefix", "window", "softcap"), [(0, 0, 0.0), (13, 0, 0.0), (70, 9, 0.0), (5, 80, 20.0)]
)
def test_attention(
    rng, dtype, heads: int, groups: int, size: int, prefix: int, window: int, softcap: float
) -> None:
    check_attention(rng, dtype, heads, groups, size, prefix, window, softcap)


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "groups", "size"), [(4, 2, 32), (*SEVENS, 64), (3, 3, 80)])
@pytest.mark.parametrize(("prefix", "window"), [(0, 0), (13, 0), (70, 9), (0, 80)])
def test_attention_with_sinks(
    rng, dtype, heads: int, groups: int, size: int, prefix: int, window: int
) -> None:
    sinks = randn(rng, heads, dtype=dtype) * 3
    check_attention(rng, dtype, heads, groups, size, prefix, window, 0.0, sinks)


def some_slopes(
    rng, heads: int, rounded: torch.dtype | None = None, coarse: bool = False
) -> attention.Slopes:
    """Of both signs."""
    return attention.Slopes(randn(rng, heads) * 0.5, rounded, coarse)


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "groups", "size", "prefix", "window", "rounded", "coarse"),
    [
        (4, 4, 32, 0, 0, None, False),
        (7, 1, 64, 310, 9, None, False),
        *(
            (*shape, rounded, coarse)
            for rounded in ROUNDED
            for shape, coarse in (((7, 1, 64, 310, 0), False), ((4, 4, 32, 70, 0), True))
        ),
    ],
)
def test_attention_with_slopes(
    rng,
    dtype,
    heads: int,
    groups: int,
    size: int,
    prefix: int,
    window: int,
    rounded: torch.dtype | None,
    coarse: bool,
) -> None:
    slopes = some_slopes(rng, heads, rounded, coarse)
    check_attention(rng, dtype, heads, groups, size, prefix, window, 0.0, slopes=slopes)


def test_a_slope_biases_scores_by_the_key_s_position(rng) -> None:
    """By numpy in float64; rounded biases are those of the table that transformers makes."""
    keys, values = rng.standard_normal((2, 400, 2, 8))
    query, slopes = rng.standard_normal((1, 4, 8)), rng.uniform(0.05, 0.9, 4).astype(np.float32)
    kv, empty = [torch.from_numpy(held)[None] for held in (keys, values)], torch.zeros(0, 2, 8).double()
    held = KeyValues(*kv, empty, empty, torch.zeros(1, 2, dtype=torch.int32))
    one, last = torch.tensor([1]), torch.tensor([399])
    tiles = attention.Tiles(one - 1, one, one - 1, last, last, 16, 400)
    given, at = torch.from_numpy(slopes), torch.arange(400)
    tables = {
        (None, False): given[:, None].double() * at,
        (torch.bfloat16, False): (given[:, None] * at).bfloat16(),
        (torch.bfloat16, True): given.bfloat16()[:, None] * at,
    }
    for (rounded, coarse), table in tables.items():
        own = attention.Slopes(given.bfloat16().float() if coarse else given, rounded, coarse)
        scores = np.einsum("khc,hc->hk", np.repeat(keys, 2, 1), query[0]) * 0.3 + table.double().numpy()
        weights = np.exp(scores - scores.max(1, keepdims=True))
        wanted = np.einsum("hk,khc->hc", weights / weights.sum(1, keepdims=True), np.repeat(values, 2, 1))
        for run in (attention.attend_one_each, attention.attend_reference):
            found = run(torch.from_numpy(query), held, tiles, attention.Shape(0.3, slopes=own))
            np.testing.assert_allclose(found[0].numpy(), wanted, rtol=1e-4, atol=1e-5)


def test_a_sink_takes_its_part_of_the_weight(rng) -> None:
    """By numpy in float64: the values' weights are exp(score) / (exp(sink) + sum of exp(scores))."""
    keys, values = rng.standard_normal((2, 6, 2, 8))
    query, sinks = rng.standard_normal((1, 4, 8)), rng.standard_normal(4) * 2
    scores = np.exp(np.einsum("khc,hc->hk", np.repeat(keys, 2, 1), query[0]) * 0.3)
    weights = scores / (np.exp(sinks)[:, None] + scores.sum(1, keepdims=True))
    wanted = np.einsum("hk,khc->hc", weights, np.repeat(values, 2, 1))
    kv, empty = [torch.from_numpy(held)[None] for held in (keys, values)], torch.zeros(0, 2, 8).double()
    held = KeyValues(*kv, empty, empty, torch.zeros(1, 2, dtype=torch.int32))
    one, five = torch.tensor([1]), torch.tensor([5])
    tiles = attention.Tiles(one - 1, one, one - 1, five, five, 16, 6)
    shape = attention.Shape(0.3, sinks=torch.from_numpy(sinks))
    found = [
        run(torch.from_numpy(query), held, tiles, shape)
        for run in (attention.attend_one_each, attention.attend_reference)
    ]
    for each in found:
        np.testing.assert_allclose(each[0].numpy(), wanted, rtol=1e-5, atol=1e-6)


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "groups", "size"), [(10, 2, 32), (3, 3, 80)])
@pytest.mark.parametrize(("prefix", "chunk"), [(0, 61), (0, 62), (13, 8), (70, 65), (13, 500)])
def test_attention_in_chunks(rng, dtype, heads: int, groups: int, size: int, prefix: int, chunk: int) -> None:
    """Some runs of three tokens cross from one chunk to the next; some chunks begin in the prefix."""
    check_attention(rng, dtype, heads, groups, size, prefix, chunk, 0.0, chunked=True)


def test_a_query_sees_its_own_chunk_up_to_itself(rng) -> None:
    """By numpy in float64, position by position."""
    keys, values, queries = rng.standard_normal((3, 11, 2, 8))
    kv, empty = [torch.from_numpy(held)[None] for held in (keys, values)], torch.zeros(0, 2, 8).double()
    held = KeyValues(*kv, empty, empty, torch.zeros(1, 2, dtype=torch.int32))
    shape, all_ = attention.Shape(0.3, 4, chunked=True), torch.arange(11)
    one = torch.ones_like(all_)
    singly = attention.Tiles(all_, one, one - 1, all_, all_, 16, 11)
    together = attention.Tiles(all_[:1], one[:1] * 11, all_[:1], all_[:1], all_, 32, 11)
    wanted = np.empty((11, 2, 8))
    for own in range(11):
        seen = slice(own // 4 * 4, own + 1)
        scores = np.exp(np.einsum("khc,hc->hk", keys[seen], queries[own]) * 0.3)
        wanted[own] = np.einsum("hk,khc->hc", scores / scores.sum(1, keepdims=True), values[seen])
    for run, tiles in ((attention.attend_one_each, singly), (attention.attend_reference, together)):
        np.testing.assert_allclose(
            run(torch.from_numpy(queries), held, tiles, shape).numpy(), wanted, rtol=1e-5, atol=1e-6
        )


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "groups"), [SEVENS, (40, 1)])
@pytest.mark.parametrize(("prefix", "window"), [(0, 0), (70, 9)])
def test_attention_in_small_parts(
    rng, monkeypatch, dtype, heads: int, groups: int, prefix: int, window: int
) -> None:
    """On a card with little shared memory several programs share a tile."""
    small = Card(0, "small", (8, 9), 26 << 10)
    monkeypatch.setattr(attention, "card_or_interpreter", lambda device: small)
    assert attention.cut_for(128, 4, 64, small).rows == 16
    check_attention(rng, dtype, heads, groups, 128, prefix, window, 0.0)


def test_sinks_and_slopes_are_refused_together() -> None:
    slopes = attention.Slopes(torch.ones(4), None, False)
    with pytest.raises(ValueError, match="sinks and slopes"):
        attention.Shape(0.3, sinks=torch.zeros(4), slopes=slopes)


@runs_kernels
@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "groups", "size"), [(7, 1, 64), (*SEVENS, 128), (6, 2, 24)])
@pytest.mark.parametrize(
    ("prefix", "window", "softcap", "sunk", "sloped", "chunked"),
    [
        (0, 0, 0.0, False, False, False),
        (13, 0, 0.0, True, False, False),
        (0, 80, 20.0, False, True, False),
        (70, 70, 0.0, True, False, False),
        (0, 100, 0.0, False, False, True),
        (13, 70, 0.0, False, False, True),
    ],
)
def test_attention_over_divided_sequences(
    rng,
    monkeypatch,
    dtype,
    heads: int,
    groups: int,
    size: int,
    prefix: int,
    window: int,
    softcap: float,
    sunk: bool,
    sloped: bool,
    chunked: bool,
    few: bool,
) -> None:
    """Sequences of up to 112 places in parts of 64, as they are long or few: one part, two, and two of which a window
    sees one."""
    if few:
        card = replace(attention.card_or_interpreter(torch.device("cpu")), processors=10 * groups)
        monkeypatch.setattr(attention, "card_or_interpreter", lambda device: card)
        monkeypatch.setattr(tile_sizes, "LEAST_PART", 64)
    else:
        monkeypatch.setattr(tile_sizes, "LONG_PART", 64)
        monkeypatch.setattr(tile_sizes, "DIVIDED_FROM", 30)
    joined: list[tuple[int, ...]] = []
    monkeypatch.setattr(attention, "join_kernel", _Counted(attention.join_kernel, joined))
    sinks = randn(rng, heads, dtype=dtype) * 3 if sunk else None
    slopes = some_slopes(rng, heads) if sloped else None
    check_attention(rng, dtype, heads, groups, size, prefix, window, softcap, sinks, slopes, chunked)
    assert joined == [(4, heads)]  # where each tile has one query


class _Counted:
    """A kernel whose grids are listed."""

    def __init__(self, kernel: Any, grids: list[tuple[int, ...]]) -> None:
        self.kernel, self.grids = kernel, grids

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.grids.append(grid)
        return self.kernel[grid]


def paged(rng, block: int, *held: torch.Tensor) -> list[torch.Tensor]:
    """Tensors [slots, size, ...] as blocks [n, block, ...] in random order, others between them; and the table."""
    slots, size = held[0].shape[:2]
    columns = size // block
    number = rng.permutation(slots * columns + 3)[: slots * columns].reshape(slots, columns)
    table = np.full((slots, columns + 1), 1 << 20, np.int32)  # the last column leads nowhere
    table[:, :-1] = number
    made = []
    for tensor in held:
        blocks = torch.full((slots * columns + 3, block, *tensor.shape[2:]), float("nan")).to(tensor)
        blocks[torch.from_numpy(number.flatten())] = tensor.reshape(-1, block, *tensor.shape[2:])
        made.append(blocks)
    return [*made, torch.from_numpy(table).to(DEVICE)]


def check_attention(
    rng,
    dtype,
    heads: int,
    groups: int,
    size: int,
    prefix: int,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None = None,
    slopes: attention.Slopes | None = None,
    chunked: bool = False,
) -> None:
    slots, room = 5, 192
    kv = [randn(rng, *shape, groups, size, dtype=dtype) for shape in ((slots, room),) * 2 + ((prefix,),) * 2]
    kv[0][:, 120:] = float("nan")  # what no query may see
    kv[1][:, 120:] = float("nan")
    kv[0], kv[1], table = paged(rng, 64, kv[0], kv[1])
    shape = attention.Shape(size**-0.5, window, softcap, sinks, slopes, chunked)
    runs = [
        (0, prefix + 0, 3),
        (3, prefix + 110, 1),
        (1, prefix + 60, 1),
        (4, prefix, 1),
    ]  # slot, position, tokens
    for tokens in (1, 3):
        chosen = [(slot, position, min(count, tokens)) for slot, position, count in runs]
        counts = [count for _, _, count in chosen]
        columns = [
            np.cumsum([0, *counts[:-1]]),
            counts,
            [run[0] for run in chosen],
            [run[1] for run in chosen],
        ]
        rows = attention.tile_rows(tokens, heads // groups)
        if rows // (heads // groups) < tokens:
            continue
        tensors = [torch.tensor(np.asarray(column), dtype=torch.int64, device=DEVICE) for column in columns]
        own = np.concatenate([np.arange(start, start + count) for _, start, count in chosen])
        tiles = attention.Tiles(
            *tensors, own=torch.from_numpy(own).to(DEVICE), rows=rows, longest=prefix + 112
        )
        query = randn(rng, sum(counts), heads, size, dtype=dtype)
        held = KeyValues(*kv, table)
        wide = KeyValues(*(tensor.double() for tensor in kv), table)
        truth = attention.attend_reference(query.double(), wide, tiles, shape)
        reference = attention.attend_reference(query, held, tiles, shape)
        close(attention.attend_triton(query, held, tiles, shape), reference, truth)
        if tokens == 1:
            close(attention.attend_one_each(query, held, tiles, shape), reference, truth)


@starts_the_interpreter
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__)
