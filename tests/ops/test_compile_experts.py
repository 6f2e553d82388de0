"""Triton kernels of mixtures of experts, and of gpt-oss's rotations, compile for every card, as in test_compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_compile import (
    CARDS,
    FLOAT,
    HALF,
    INT,
    LONG,
    ROTATE,
    compiled,
    compiled_here,
    compiler,
    on_every_card,
)

from nla_engine.ops import expert_order, expert_products, rotary, routing
from nla_engine.ops.cards import Card

assert compiler  # a fixture for every test here

ORDER: dict[str, str] = {
    "chosen": LONG, **dict.fromkeys(("token", "place", "ends", "tile_expert", "tile_row"), "*i32"), "rows": INT,
}  # fmt: skip
ROUTE = {
    **dict.fromkeys(("logits", "weights"), HALF), "chosen": LONG, "tokens": INT, "experts": INT, "scale": FLOAT,
}  # fmt: skip
SUM = {**dict.fromkeys(("rows", "weights", "out"), HALF), "place": "*i32", "d": INT}
PRODUCT = dict.fromkeys(("x", "w", "bias", "out"), HALF) | {
    **dict.fromkeys(("token", "ends", "tile_expert", "tile_row"), "*i32"),
    **dict.fromkeys(("k", "n", "w_expert", "w_channel", "w_column"), INT), "alpha": FLOAT, "limit": FLOAT,
}  # fmt: skip
#: kernel, its arguments, its constants, warps
CASES: list[tuple[Any, dict[str, str], dict[str, Any], int]] = [
    (expert_order._order_kernel, ORDER, {"TOP": 8, "HEIGHT": 64, "BLOCK": expert_order._BLOCK}, 4),
    (expert_order._sum_kernel, SUM, {"TOP": 8, "BLOCK": 1024}, 4),
    (
        routing._route_kernel,
        ROUTE,
        {"TOP": 8, "RENORMED": True, "ROWS": routing._ROWS, "BLOCK_E": 128, "BLOCK_K": 8},
        routing._ROWS,
    ),
    (
        routing._route_kernel,
        ROUTE | {"logits": "*fp32", "weights": "*fp32"},
        {"TOP": 6, "RENORMED": False, "ROWS": routing._ROWS, "BLOCK_E": 64, "BLOCK_K": 8},
        routing._ROWS,
    ),
    (
        rotary._rotate_kernel,
        ROTATE,
        {"GROUP": 8, "HALF": 32, "HIGH": 0, "BLOCK_G": 16, "BLOCK_H": 32, "NORM": False, "BLOCK": 64},
        2,
    ),
]


@on_every_card(CASES)
def test_a_kernel_compiles(
    card: Card, kernel: Any, arguments: dict[str, str], constants: dict[str, Any], warps: int
) -> None:
    assert ".local" not in compiled(kernel, arguments, constants, card, num_warps=warps).asm["ptx"]  # a stack


@compiled_here
@pytest.mark.parametrize("height", [64, 128])
@pytest.mark.parametrize(
    ("gate", "transposed"), [(0, True), (0, False), (1, False), (2, False), (3, True)], ids=str
)
@pytest.mark.parametrize("capability", [(8, 6), (9, 0)], ids=str)
def test_products_of_experts_fit_the_shared_memory(
    capability: tuple[int, int], gate: int, transposed: bool, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = next(card for card in CARDS if card.capability == capability)
    monkeypatch.setattr(expert_products, "card_of", lambda device: card)
    tile = expert_products.tile_for(height, torch.device("cuda"), 2)
    constants = {
        "GATE": gate, "EVEN": True, "ROWS": tile.rows, "COLUMNS": tile.columns, "CHANNELS": tile.channels,
        "w_column" if transposed else "w_channel": 1,
    }  # fmt: skip
    if not transposed:
        constants["bias"] = None
    how = {"num_warps": tile.warps, "num_stages": tile.stages}
    made = compiled(expert_products._product_kernel, PRODUCT, constants, card, **how)
    assert ".local" not in made.asm["ptx"]  # a stack
    assert ("wgmma" in made.asm["ptx"]) is (capability == (9, 0))
