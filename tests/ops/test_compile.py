"""Triton kernels compile for every card, within its shared memory, on a machine without a GPU too."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nla_engine.ops import (
    attention,
    delta,
    divergence,
    fp8,
    gate,
    lane_attention,
    latent,
    norm,
    places,
    rotary,
    sampling,
    truncation,
)
from nla_engine.ops.cards import SHARED_KIB, Card
from nla_engine.ops.tile_sizes import LONG_PART, PREFIX_ROWS, cut_for, head_width

INT, LONG, BYTE, HALF, FLOAT, CODE = "i32", "*i64", "*u8", "*bf16", "fp32", "*fp8e4nv"
BEST = {
    "logits": HALF, "lanes": LONG, "sequence": LONG, "position": LONG, "best_order": "*i32", "best_token": "*i32",
    "logits_row": INT, "vocabulary": INT, "logits_divisor": FLOAT, "noise_divisor": FLOAT, "key": INT,
}  # fmt: skip
ADVANCE = {
    "best_order": "*i32", "best_token": "*i32", "lanes": LONG, "token": LONG, "position": LONG, "active": BYTE,
    "closing": BYTE, "stop_state": BYTE, "count": LONG, "limit": LONG, "generated": LONG, "table": BYTE,
    "parts": INT, "most": INT, "table_row": INT, "stopped": INT,
}  # fmt: skip
REDRAW = BEST | dict.fromkeys(("active", "closing"), BYTE) | {
    **dict.fromkeys(("parts", "top_k"), INT), "chosen": "*i32",
    **dict.fromkeys(("temperature", "removed", "min_p", "units"), FLOAT),
}  # fmt: skip
QUANTISE = {"x": HALF, "codes": CODE, "scale": "*fp32", "width": INT}
NORM = {
    "x": HALF,
    "add": HALF,
    "weight": HALF,
    "codes": CODE,
    "scale": "*fp32",
    "d": INT,
    "eps": FLOAT,
    "offset": FLOAT,
}
PLACES = dict.fromkeys(("slot", "position", "first", "end", "out"), LONG) | {
    "tokens": INT,
    "rows_per_slot": INT,
}
GATE = {"both": HALF, "codes": CODE, "scale": "*fp32", "width": INT}
RMS_NORM = dict.fromkeys(("x", "weight", "residual", "y"), HALF) | {
    **dict.fromkeys(("x_row", "residual_row", "d"), INT), "eps": FLOAT, "offset": FLOAT,
}  # fmt: skip
ROTATE = {
    **dict.fromkeys(("row", "cos", "sin", "q", "keys", "values", "query_weight", "key_weight"), HALF),
    **dict.fromkeys(("slot", "place"), LONG), "table": "*i32",
    **dict.fromkeys(("row_token", "cos_token", "cos_channel", "table_slot", "kv_block", "kv_place", "kv_head"), INT),
    "eps": FLOAT, "offset": FLOAT,
}  # fmt: skip
LATENT = dict.fromkeys(("row", "weight", "turned", "query", "keys"), HALF) | {
    **dict.fromkeys(("cos", "sin"), "*fp32"), **dict.fromkeys(("slot", "place"), LONG), "table": "*i32",
    **dict.fromkeys(("row_token", "cos_token", "cos_channel", "turned_token", "turned_head"), INT),
    **dict.fromkeys(("table_slot", "key_block", "key_place"), INT), "eps": FLOAT, "factor": FLOAT,
}  # fmt: skip
GATED_NORM = dict.fromkeys(("x", "gate", "weight", "y"), HALF) | {
    **dict.fromkeys(("x_row", "gate_row", "d"), INT), "eps": FLOAT,
}  # fmt: skip
CONVOLVE = dict.fromkeys(("row", "weight", "kept", "out"), HALF) | {
    **dict.fromkeys(("slots", "positions"), LONG), "channels": INT,
}  # fmt: skip
DELTA = dict.fromkeys(("x", "a", "b", "dt_bias", "out"), HALF) | {
    **dict.fromkeys(("a_log", "states"), "*fp32"), "slots": LONG, "a_token": INT, "b_token": INT, "scale": FLOAT,
}  # fmt: skip
DIVERGENCE = {
    **dict.fromkeys(("x", "y"), HALF), **dict.fromkeys(("row", "token"), LONG),
    **dict.fromkeys(("out", "found"), "*fp32"), "first": "*i32",
    **dict.fromkeys(("x_row", "y_row", "found_kind", "lanes", "vocabulary", "part"), INT),
}  # fmt: skip
LANES = {
    **dict.fromkeys(("q", "lane_keys", "lane_values", "keys", "values", "out"), HALF),
    **dict.fromkeys(("tile_token", "tile_count", "tile_sequence", "positions"), LONG),
    **dict.fromkeys(("q_token", "q_head", "tokens", "window"), INT),
    **{f"lane_{held}_{by}": INT for held in ("key", "value") for by in ("token", "head")},
    **{f"{held}_{by}": INT for held in ("key", "value") for by in ("sequence", "head", "position")},
    "scale": FLOAT, "softcap": FLOAT,
}  # fmt: skip
#: kernel, its arguments, its constants (an argument that is 1 is one), warps
CASES: list[tuple[Any, dict[str, str], dict[str, Any], int]] = [
    (sampling._best_kernel, BEST, {"SAMPLE": False, "BLOCK": 4096}, 8),
    (sampling._best_kernel, BEST, {"SAMPLE": True, "BLOCK": 4096}, 8),
    (sampling._advance_kernel, ADVANCE, {"READ_LAST": True, "PARTS": 64}, 1),
    (
        sampling._advance_kernel,
        ADVANCE,
        {"READ_LAST": False, "PARTS": 1, "parts": 1, "most": 1, "stopped": 1},
        1,
    ),
    (truncation._redraw_kernel, REDRAW, {"TOP_K": True, "TOP_P": True, "PARTS": 64, "BLOCK": 4096}, 16),
    (fp8._quantise_kernel, QUANTISE, {"BLOCK": 4096}, 8),
    (fp8._norm_kernel, NORM, {"ADD": True, "BLOCK": 4096}, 8),
    (fp8._norm_kernel, NORM, {"ADD": False, "BLOCK": 4096}, 8),
    (fp8._gate_kernel, GATE, {"SILU": True, "BLOCK": 4096, "PIECES": 5}, 16),
    (fp8._gate_kernel, GATE, {"SILU": False, "BLOCK": 4096, "PIECES": 5}, 16),
    (gate._gate_kernel, {"both": HALF, "y": HALF, "width": INT}, {"SILU": True, "BLOCK": 2048}, 4),
    (divergence._softmax_kernel, DIVERGENCE, {"BLOCK": divergence._BLOCK}, divergence._WARPS),
    (
        divergence._divergence_kernel,
        DIVERGENCE,
        {"PARTS": divergence._PARTS, "BLOCK": divergence._BLOCK},
        divergence._WARPS,
    ),
    *(
        (
            lane_attention._lanes_kernel,
            LANES,
            {
                "GROUP": group,
                "HEAD": size,
                "BLOCK_H": size,
                "BLOCK_M": rows,
                "BLOCK_N": 32,
                "WINDOW": window,
                "SOFTCAP": False,
                "PRECISION": "tf32",
                **one,
            },
            lane_attention._WARPS,
        )
        for group, size, rows, window, one in (
            (7, 128, 64, False, {"tokens": 1}),
            (2, 256, 32, True, {}),
        )
    ),
    (places._places_kernel, PLACES, {"BLOCK": 256}, 4),
    (delta._convolve_kernel, CONVOLVE, {"TAPS": 4, "BLOCK": 512}, 4),
    (
        delta._delta_kernel,
        DELTA,
        {
            "KEY_HEADS": 16,
            "VALUE_HEADS": 48,
            "KEY": 128,
            "VALUE": 128,
            "BLOCK_K": 128,
            "BLOCK_V": 32,
            "EPS": 1e-6,
            "MOST": 2.0,
        },
        4,
    ),
    (norm._gated_norm_kernel, GATED_NORM, {"BLOCK": 128}, 1),
    (norm._rms_norm_kernel, RMS_NORM, {"ADD": True, "BLOCK": 8192}, 16),
    (
        rotary._rotate_kernel,
        ROTATE,
        {
            "GROUP": 7,
            "HALF": 64,
            "HIGH": 64,
            "BLOCK_G": 8,
            "BLOCK_H": 64,
            "NORM": True,
            "BLOCK": 64,
            "cos_channel": 1,
        },
        2,
    ),
    *(
        (
            latent._latent_kernel,
            LATENT,
            {
                "HEADS": heads,
                "LATENT": 512,
                "HALF": 32,
                "BLOCK_L": 512,
                "BLOCK_H": block,
                "BLOCK_R": 32,
                "INTERLEAVED": interleaved,
                "BLOCK": 64,
            },
            4,
        )
        for heads, block, interleaved in ((16, 32, True), (128, 256, False))
    ),
]
#: The cards that Triton's kernels run on. A 4090 has no more shared memory than others of 8.6, 8.9 and 12.0.
CARDS = [
    Card(0, "card", capability, 1024 * SHARED_KIB[capability])
    for capability in SHARED_KIB
    if capability >= (8, 0)
]
compiled_here = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreted kernel is not compiled"
)
#: Compute capability, dtype, size of heads and further channels of queries and keys: where the least memory meets the
#: largest rows.
HEADS = [
    *(((8, 9), dtype, size, 0) for dtype in ("bf16", "fp32") for size in (128, 256)),
    *(((12, 0), "bf16", size, 0) for size in (128, 256)),
    *((capability, "bf16", 128, 0) for capability in ((8, 0), (9, 0), (10, 0))),
    *((capability, "bf16", 512, 0) for capability in ((8, 9), (9, 0))),
    *((capability, "bf16", 512, 64) for capability in ((8, 0), (8, 9), (9, 0), (10, 0))),
    ((8, 9), "fp32", 512, 64),
]


@pytest.fixture(autouse=True)
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")


def compiled(
    kernel: Any, arguments: dict[str, str], constants: dict[str, Any], card: Card, **options: int
) -> Any:
    signature = {n: arguments[n] if n not in constants else "constexpr" for n in kernel.arg_names}
    index = kernel.arg_names.index
    aligned = {
        (index(n),): [["tt.divisibility", 16]]
        for n, kind in signature.items()
        if kind[0] == "*" or kind == INT
    }
    places = {(index(name),): value for name, value in constants.items()}
    major, minor = card.capability
    made = triton.compile(
        ASTSource(kernel, signature, places, aligned),
        target=GPUTarget("cuda", 10 * major + minor, 32),
        options=options,
    )
    assert made.asm["cubin"]
    assert made.metadata.shared <= card.shared_bytes
    return made


def on_every_card(cases: list[tuple[Any, dict[str, str], dict[str, Any], int]]) -> Callable[..., Any]:
    """A test of each card with each of these: kernel, its arguments, its constants, warps."""
    card = pytest.mark.parametrize("card", CARDS, ids=lambda card: card.capability)
    case = pytest.mark.parametrize(
        ("kernel", "arguments", "constants", "warps"),
        cases,
        ids=[f"{c[0].__name__}{i}" for i, c in enumerate(cases)],
    )
    return lambda test: compiled_here(card(case(test)))


@on_every_card(CASES)
def test_a_kernel_compiles(
    card: Card, kernel: Any, arguments: dict[str, str], constants: dict[str, Any], warps: int
) -> None:
    if CODE in arguments.values() and card.capability < (8, 9):
        pytest.skip("fp8 takes 8.9 or more")
    made = compiled(kernel, arguments, constants, card, num_warps=warps)
    assert ".local" not in made.asm["ptx"]  # a stack


@compiled_here
@pytest.mark.slow
@pytest.mark.parametrize(("capability", "dtype", "size", "rest"), HEADS, ids=str)
def test_attention_fits_the_shared_memory(
    capability: tuple[int, int], dtype: str, size: int, rest: int
) -> None:
    """Triton takes no more of it than `Cut` says; on a 4090 the cut of an H100 would be too large."""
    card = next(card for card in CARDS if card.capability == capability)
    itemsize = 2 if dtype == "bf16" else 4
    kernels = [
        (attention.prefix_kernel, {}),
        (attention.attend_kernel, {"SHARED": True, "PART": 0}),
        (attention.attend_kernel, {"SHARED": False, "PART": LONG_PART}),
        (attention.join_kernel, {"PART": LONG_PART, "BLOCK_P": 32}),
    ]
    if size == 128:  # no model with biases by distance has wider heads
        kernels += [
            (attention.prefix_kernel, {"ROUND": tl.bfloat16, "COARSE": True}),
            (attention.attend_kernel, {"SHARED": True, "PART": 0, "ROUND": tl.bfloat16}),
        ]
    for kernel, how in kernels:
        cut = cut_for(size, itemsize, PREFIX_ROWS, card, rest=rest)
        constants = {
            "GROUP": 7, "HEAD": size, "BLOCK_H": head_width(size), "BLOCK_M": cut.rows, "BLOCK_N": cut.keys,
            "REST": rest, "BLOCK_R": head_width(rest),
            "SOFTCAP": False, "SINKS": True, "PRECISION": "tf32" if itemsize == 2 else "ieee",
            "WINDOW": True, "PREFIX": True, "SIZE": 64, "ROUND": None, "COARSE": False, **how,
        }  # fmt: skip
        if constants["ROUND"] is None:
            constants["slopes"] = None  # and with it the biases
        constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
        arguments = dict.fromkeys(kernel.arg_names, INT)
        for name in kernel.arg_names:
            if name in ("q", "keys", "values", "prefix_keys", "prefix_values", "out", "sinks"):
                arguments[name] = f"*{dtype}"
            elif name in ("slopes", "partial", "sums", "biggests") or name.startswith("part_"):
                arguments[name] = "*fp32"
            elif name.startswith("tile_") or name == "positions":
                arguments[name] = LONG
            elif name == "table":
                arguments[name] = "*i32"
            elif name in ("scale", "softcap"):
                arguments[name] = FLOAT
        made = compiled(kernel, arguments, constants, card, num_warps=cut.warps, num_stages=cut.stages)
        # Triton 3.6 keeps more of a wide head on a Blackwell card than later ones, and still fits it.
        wide = triton.__version__.startswith("3.6.") and capability == (10, 0)
        most = card.shared_bytes if wide else cut.shared_bytes(size, itemsize, card, rest)
        assert made.metadata.shared <= most
        assert not rest or ".local" not in made.asm["ptx"]  # a stack
