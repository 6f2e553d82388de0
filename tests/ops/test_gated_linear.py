"""The gated product: two launches anywhere, one on Hopper (test_gpu_products.py); which tile; what is refused."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from nla_engine import extension
from nla_engine.ops import gated_linear as module
from nla_engine.ops.gated_linear import Tile, choose_tile, gated_linear, gated_linear_reference, tried_tiles

TILES = ((128, 128), (128, 120), (128, 112), (128, 96), (128, 72), (64, 120), (64, 112), (64, 96), (64, 72))


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_it_is_a_product_and_a_gate(activation: str) -> None:
    x, w = torch.randn(5, 16), torch.randn(2 * 12, 16)
    assert tried_tiles(w, activation) == ()
    g, u = (x.double() @ w.double().T).chunk(2, 1)
    act = torch.nn.functional
    truth = (act.silu(g) if activation == "silu" else act.gelu(g, approximate="tanh")) * u
    torch.testing.assert_close(gated_linear(x, w, activation, ()).double(), truth, rtol=1e-5, atol=1e-6)


def test_a_tile_that_computes_something_else_is_not_taken(monkeypatch) -> None:
    """Its trial, once for a shape, with a stand-in for the kernel."""
    tried: list[Tile] = []

    def kernel(x, w, activation, tile, out):
        tried.append(tile)
        if tile == TILES[3]:
            raise RuntimeError("the driver has none")
        if tile == TILES[1]:
            return out  # nothing written
        made = gated_linear_reference(x, w, activation)
        if tile == TILES[4]:
            made[300, 5] += 1  # one element of all
        return made * (1.1 if tile == TILES[2] else 1)

    monkeypatch.setattr(module, "_tried", {})
    monkeypatch.setattr(module, "has_kernel", lambda device: True)
    monkeypatch.setattr(module.extension, "load", lambda: SimpleNamespace(gated_tiles=list(TILES)))
    monkeypatch.setattr(module, "gated_linear_cuda", kernel)
    for _ in range(3):
        w = torch.randn(2 * 64, 256).to(torch.bfloat16) / 16
        assert tried_tiles(w, "gelu") == (TILES[0], *TILES[5:])
        assert (
            tried_tiles(w[:, 1:], "gelu")
            == tried_tiles(w.float(), "gelu")
            == tried_tiles(w[:24], "gelu")
            == ()
        )
    assert tried == list(TILES)
    tried_tiles(w, "silu")
    tried_tiles(w[:64], "silu")
    assert tried == 3 * list(TILES)


@pytest.mark.parametrize("n", [18944, 14336, 15360, 8])
@pytest.mark.parametrize("m", [1, 64, 65, 512, 896, 1000, 8192])
def test_the_chosen_tile_keeps_no_multiprocessor_longer_than_another_would(m: int, n: int) -> None:
    chosen = choose_tile(TILES, m, n, 132)
    assert chosen[0] == (64 if m <= 64 else 128)

    def busiest(tile: tuple[int, int]) -> int:
        """Columns of results of a tile's rows, one after the other."""
        given = [0] * 132
        for number in range(-(-m // tile[0]) * -(-n // tile[1])):
            given[number % 132] += tile[1]
        return max(given)

    waves = math.ceil(busiest(chosen) / chosen[1])
    for tile in TILES:
        if tile[0] == chosen[0]:
            assert busiest(chosen) + 8 * waves <= busiest(tile) * (1 + 8 / tile[1]) + 1e-6


def test_the_tiles_that_were_measured_fastest_are_chosen() -> None:
    """docs/performance.md: rows of a step and of passes of Qwen2.5-7B."""
    fastest = {64: (64, 72), 256: (128, 96), 512: (128, 96), 896: (128, 128), 8192: (128, 128)}
    assert {m: choose_tile(TILES, m, 18944, 132) for m in fastest} == fastest
    assert choose_tile(TILES[:2], 7, 18944, 132) in TILES[:2]  # where the lowest did not pass its trial


@pytest.mark.skipif(not getattr(extension.load(), "gated_tiles", []), reason="no kernel for Hopper is built")
def test_the_kernel_refuses_what_it_cannot_compute() -> None:
    built = extension.load()
    assert built is not None and set(built.gated_tiles) == set(TILES)
    good = {"m": 3, "n": 8, "k": 64, "silu": True, "tile": TILES[0], "x": 16, "w": 16, "out": 16}
    wrong = {
        "m, n or k: 0 is not positive": {"m": 0},
        "n: 12 is not a multiple of 8": {"n": 12},
        "k: 96 is not a multiple of 64": {"k": 96},
        "m, n, k: are too large": {"n": 2**33},
        "tile: 128 rows by 64 columns": {"tile": (128, 64)},
        "x, w or out: is a null pointer": {"w": 0},
        "x, w or out: is not at a multiple of 16": {"out": 24},
    }
    for message, change in wrong.items():
        with pytest.raises(ValueError, match=message):
            built.gated_linear(0, 0, **(good | change))
