"""Triton kernels compile for Hopper, on a machine without a GPU too."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nla_engine.ops import choose, fp8, gate, places

INT, LONG, BYTE, HALF, FLOAT, CODE = "i32", "*i64", "*u8", "*bf16", "fp32", "*fp8e4nv"
BEST = {
    "logits": HALF, "lanes": LONG, "sequence": LONG, "position": LONG, "best_order": "*i32", "best_token": "*i32",
    "logits_row": INT, "vocabulary": INT, "temperature": FLOAT, "key": INT,
}  # fmt: skip
ADVANCE = {
    "best_order": "*i32", "best_token": "*i32", "lanes": LONG, "token": LONG, "position": LONG, "active": BYTE,
    "closing": BYTE, "stop_state": BYTE, "count": LONG, "limit": LONG, "generated": LONG, "table": BYTE,
    "parts": INT, "most": INT, "table_row": INT, "stopped": INT,
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
#: kernel, its arguments, its constants (an argument that is 1 is one), warps
CASES: list[tuple[Any, dict[str, str], dict[str, Any], int]] = [
    (choose._best_kernel, BEST, {"SAMPLE": False, "BLOCK": 4096}, 8),
    (choose._best_kernel, BEST, {"SAMPLE": True, "BLOCK": 4096}, 8),
    (choose._advance_kernel, ADVANCE, {"READ_LAST": True, "PARTS": 64}, 1),
    (
        choose._advance_kernel,
        ADVANCE,
        {"READ_LAST": False, "PARTS": 1, "parts": 1, "most": 1, "stopped": 1},
        1,
    ),
    (fp8._quantise_kernel, QUANTISE, {"BLOCK": 4096}, 8),
    (fp8._norm_kernel, NORM, {"ADD": True, "BLOCK": 4096}, 8),
    (fp8._norm_kernel, NORM, {"ADD": False, "BLOCK": 4096}, 8),
    (fp8._gate_kernel, GATE, {"SILU": True, "BLOCK": 4096}, 8),
    (fp8._gate_kernel, GATE, {"SILU": False, "BLOCK": 4096}, 8),
    (gate._gate_kernel, {"both": HALF, "y": HALF, "width": INT}, {"SILU": True, "BLOCK": 2048}, 4),
    (places._places_kernel, PLACES, {"BLOCK": 256}, 4),
]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreted kernel is not compiled")
@pytest.mark.parametrize(
    ("kernel", "arguments", "constants", "warps"),
    CASES,
    ids=[f"{c[0].__name__}{i}" for i, c in enumerate(CASES)],
)
def test_a_kernel_compiles_for_hopper(
    kernel: Any, arguments: dict[str, str], constants: dict[str, Any], warps: int, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    signature = {n: arguments[n] if n not in constants else "constexpr" for n in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, places)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    assert compiled.asm["cubin"]
    assert ".local" not in compiled.asm["ptx"]  # a stack
