"""Compressed keys: their kernel, and attention over rows whose first channels are the values, by numpy in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from interpreted import DEVICE, LAUNCHES, run_in_the_interpreter, runs_kernels, starts_the_interpreter
from kernel_checks import DTYPES

from nla_engine.engine.attention import decode_tiles, prefill_tiles
from nla_engine.ops import attention, latent, tile_sizes
from nla_engine.ops.attention import Shape, Tiles
from nla_engine.ops.attention_cpu import attend_cpu
from nla_engine.ops.cards import Card
from nla_engine.ops.key_values import KeyValues
from nla_engine.ops.tile_sizes import cut_for

#: Query heads, channels of the latent and of the rotated part: of DeepSeek-V2-Lite, and ugly ones.
SIZES = [(16, 512, 64), (20, 24, 6), (1, 100, 2), (128, 32, 16)]
#: With dtypes: the interpreter is slow, so each of these sizes meets one there.
CASES = [
    (sizes, dtype)
    for number, sizes in enumerate(SIZES)
    for dtype in DTYPES
    if DEVICE == "cuda" or dtype == (torch.float32 if number % 2 else torch.float16)
]
SLOTS, BLOCK, COLUMNS = 4, 64, 3
RUNS = {
    "decode": [(0, 0, 1), (3, 110, 1), (1, 63, 1), (2, 64, 1)],  # slot, place, tokens
    "prefill": [(0, 0, 2), (3, 109, 3), (1, 62, 4), (2, 0, 1)],
}


def near(found: torch.Tensor, truth: np.ndarray, dtype: torch.dtype) -> None:
    """No further off than a few roundings of the dtype."""
    limit = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    assert found.isfinite().all() and found.dtype == dtype
    apart = np.linalg.norm(found.double().cpu().numpy() - truth)
    assert apart <= limit * (np.linalg.norm(truth) + 1e-3)


def drawn(rng: np.random.Generator, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(shape)).to(DEVICE, dtype)


class Case:
    """A cache with a shared prefix, NaN in every row that no query may see, and queries."""

    def __init__(
        self,
        rng: np.random.Generator,
        sizes: tuple[int, int, int],
        prefix: int,
        dtype: torch.dtype,
        runs: list[tuple[int, int, int]],
    ) -> None:
        heads, self.latent, rotated = sizes
        width, columns = self.latent + rotated, np.array(runs, np.int64).T.copy()
        slot, place, count = columns
        self.shape = Shape(0.7 * width**-0.5)
        keys = drawn(rng, SLOTS * COLUMNS + 2, BLOCK, 1, width, dtype=dtype)
        table = rng.permutation(SLOTS * COLUMNS + 2)[: SLOTS * COLUMNS].reshape(SLOTS, COLUMNS)
        held = np.full((SLOTS, COLUMNS + 1), 1 << 20, np.int32)  # the last column leads nowhere
        held[:, :-1] = table
        seen = torch.zeros(keys.shape[:2], dtype=torch.bool, device=DEVICE)
        for s, end in zip(slot, place + count, strict=True):
            for at in range(end):
                seen[table[s, at // BLOCK], at % BLOCK] = True
        keys[~seen] = float("nan")
        shared = drawn(rng, prefix, 1, width, dtype=dtype)
        values, shared_values = keys[..., : self.latent], shared[..., : self.latent]
        self.kv = KeyValues(keys, values, shared, shared_values, torch.from_numpy(held).to(DEVICE))
        self.query = drawn(rng, int(count.sum()), heads, width, dtype=dtype)
        self.own = np.concatenate([prefix + np.arange(p, p + n) for _, p, n in runs])
        own, self.of = torch.from_numpy(self.own).to(DEVICE), np.repeat(slot, count)
        if (count == 1).all():
            slots = torch.from_numpy(slot).to(DEVICE)
            self.tiles: Tiles = decode_tiles(slots, own, heads, int(own.max()) + 1)
        else:
            self.tiles = prefill_tiles(np.stack([slot, prefix + place, count], 1), heads, own)

    def truth(self) -> np.ndarray:
        """float64 [T, H, latent], row by row."""
        kv, table = self.kv, self.kv.table.cpu().numpy()
        keys, shared = kv.keys.double().cpu().numpy(), kv.prefix_keys.double().cpu().numpy()[:, 0]
        out = []
        for query, slot, own in zip(self.query.double().cpu().numpy(), self.of, self.own, strict=True):
            places = range(own + 1 - len(shared))
            mine = [keys[table[slot, at // BLOCK], at % BLOCK, 0] for at in places]
            rows = np.stack([*shared, *mine])
            scores = query @ rows.T * self.shape.scale
            weights = np.exp(scores - scores.max(1, keepdims=True))
            out.append(weights / weights.sum(1, keepdims=True) @ rows[:, : self.latent])
        return np.stack(out)

    def check(self, run: Any) -> None:
        near(run(self.query, self.kv, self.tiles, self.shape), self.truth(), self.query.dtype)


@runs_kernels
@pytest.mark.parametrize(("sizes", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("prefix", [0, 37])
@pytest.mark.parametrize("runs", RUNS)
def test_attention(rng, dtype, sizes: tuple[int, int, int], prefix: int, runs: str) -> None:
    Case(rng, sizes, prefix, dtype, RUNS[runs]).check(attention.attend_triton)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("prefix", [0, 37])
@pytest.mark.parametrize("runs", RUNS)
@pytest.mark.parametrize("run", [attention.attend_torch, attend_cpu])
def test_references(rng, sizes: tuple[int, int, int], prefix: int, runs: str, run: Any) -> None:
    if DEVICE == "cuda" and run is attend_cpu:
        pytest.skip("of tensors on a CPU")
    Case(rng, sizes, prefix, torch.float32, RUNS[runs]).check(run)


@runs_kernels
@pytest.mark.parametrize("prefix", [0, 37])
@pytest.mark.parametrize("sizes", SIZES[:2])
def test_attention_over_divided_sequences(rng, monkeypatch, prefix: int, sizes: tuple[int, int, int]) -> None:
    monkeypatch.setattr(tile_sizes, "LONG_PART", 64)
    monkeypatch.setattr(tile_sizes, "DIVIDED_FROM", 30)
    monkeypatch.setattr(attention, "join_kernel", joined := _Counted(attention.join_kernel))
    Case(rng, sizes, prefix, torch.float32, RUNS["decode"]).check(attention.attend_triton)
    assert joined.grids == [(4, sizes[0])]


class _Counted:
    """A kernel whose grids are listed."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.grids.append(grid)
        return self.kernel[grid]


@runs_kernels
def test_several_programs_of_a_tile(rng, monkeypatch) -> None:
    small = Card(0, "small", (8, 9), 50 << 10)
    monkeypatch.setattr(attention, "card_or_interpreter", lambda device: small)
    assert cut_for(128, 4, 64, small, rest=16).rows < 64
    Case(rng, (64, 128, 16), 5, torch.float32, RUNS["decode"]).check(attention.attend_triton)


@runs_kernels
def test_values_that_are_no_part_of_the_keys_are_refused(rng) -> None:
    case = Case(rng, SIZES[1], 0, torch.float32, RUNS["decode"])
    kv = case.kv
    other = KeyValues(kv.keys, kv.values.clone(), kv.prefix_keys, kv.prefix_values, kv.table)
    with pytest.raises(ValueError, match="the values are not their first channels"):
        attention.attend_triton(case.query, other, case.tiles, case.shape)


def stored(
    rng: np.random.Generator, sizes: tuple[int, int, int], dtype: torch.dtype, interleaved: bool, form: str
) -> tuple[tuple[Any, ...], np.ndarray, np.ndarray]:
    """Arguments of `store_latent` before and after `query` and `keys`; in float64 keys [T, L + R] and queries."""
    heads, size, rotated = sizes
    tokens, factor = 6, 1.5
    row = drawn(rng, tokens, 2 * (size + rotated), dtype=dtype)[:, : size + rotated] * 3
    queries = drawn(rng, tokens, heads, 5 + rotated, dtype=dtype)[..., 5:]
    norm = latent.LatentNorm(drawn(rng, size, dtype=dtype), 1e-3, factor)
    angle = rng.standard_normal((tokens, rotated // 2))
    if form == "complex":
        turn = torch.polar(torch.ones(angle.shape), torch.from_numpy(angle).float()).to(DEVICE)
        cos, sin = turn.real, turn.imag
    else:
        both = torch.from_numpy(np.concatenate([angle, angle], 1)).to(DEVICE)
        cos, sin = (each.to(dtype)[:, : rotated // 2] for each in (both.cos(), both.sin()))
    slot = torch.tensor([0, 0, 2, 3, 1, 2], device=DEVICE)
    place = torch.tensor([0, 1, 8, 4, 0, 3], device=DEVICE)
    table = torch.from_numpy(rng.permutation(12).astype(np.int32).reshape(4, 3)).to(DEVICE)
    turns = cos.double().cpu().numpy() + 1j * sin.double().cpu().numpy()

    def turned(x: torch.Tensor) -> np.ndarray:
        x = x.double().cpu().numpy()
        pairs = (x[..., ::2], x[..., 1::2]) if interleaved else np.split(x, 2, -1)
        product = (pairs[0] + 1j * pairs[1]) * (turns if x.ndim == 2 else turns[:, None])
        return np.concatenate([product.real, product.imag], -1)

    wide = row[:, :size].double().cpu().numpy()
    wide /= np.sqrt((wide**2).mean(1, keepdims=True) + 1e-3)
    wide *= norm.weight.double().cpu().numpy() * factor
    keys = np.concatenate([wide, turned(row[:, size:])], 1)
    given = (row, norm, latent.Angles(cos, sin, interleaved), queries), (table, slot, place)
    return given, keys, turned(queries)


@pytest.mark.parametrize(
    "run", ["store_latent_reference", pytest.param("store_latent_triton", marks=LAUNCHES)]
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("interleaved", "form"), [(True, "complex"), (True, "halves"), (False, "halves")])
def test_a_row_goes_to_its_place(
    rng, run: str, dtype, sizes: tuple[int, int, int], interleaved: bool, form: str
) -> None:
    heads, size, rotated = sizes
    (before, after), wanted, turned = stored(rng, sizes, dtype, interleaved, form)
    query = torch.full((6, heads, size + rotated), float("nan"), dtype=dtype, device=DEVICE)
    keys = torch.full((12, 3, 1, size + rotated), float("nan"), dtype=dtype, device=DEVICE)
    getattr(latent, run)(*before, query, keys, *after)
    table, slot, place = after
    found = keys[table.long()].flatten(1, 2)[:, :, 0]
    near(found[slot, place], wanted, dtype)
    assert int(found.isfinite().all(-1).sum()) == 6 == int(found.isfinite().any(-1).sum())
    near(query[..., size:], turned, dtype)
    assert query[..., :size].isnan().all()


def test_queries_and_keys_are_turned_as_by_transformers(rng) -> None:
    """Their products are the same; the order of channels need not be."""
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import apply_rotary_emb
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
        apply_rotary_pos_emb,
        apply_rotary_pos_emb_interleave,
    )

    q, k = (torch.from_numpy(rng.standard_normal((1, n, 5, 8))).float() for n in (3, 1))
    angle = torch.from_numpy(rng.standard_normal((1, 5, 4))).float()
    both = angle.repeat(1, 1, 2)
    halves, turn = (both.cos(), both.sin()), torch.polar(torch.ones_like(angle), angle)
    for (own_q, own_k), angles in (
        (apply_rotary_emb(q, k, turn), latent.Angles(turn.real[0], turn.imag[0], True)),
        (apply_rotary_pos_emb_interleave(q, k, *halves), latent.Angles(*(h[0, :, :4] for h in halves), True)),
        (apply_rotary_pos_emb(q, k, *halves), latent.Angles(*(h[0, :, :4] for h in halves), False)),
    ):
        row = torch.cat([torch.ones(5, 2), k[0, 0]], 1)
        query, keys = torch.zeros(5, 3, 10), torch.zeros(1, 5, 1, 10)
        norm, slot = latent.LatentNorm(torch.ones(2), 0.0), torch.zeros(5, dtype=torch.int64)
        at = torch.zeros(1, 1, dtype=torch.int32), slot, torch.arange(5)
        latent.store_latent_reference(row, norm, angles, q[0].transpose(0, 1), query, keys, *at)
        found = torch.einsum("thr,sr->hts", query[..., 2:], keys[0, :, 0, 2:])
        assert torch.allclose(found, torch.einsum("htr,sr->hts", own_q[0], own_k[0, 0]), atol=1e-5)


@starts_the_interpreter
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__)
