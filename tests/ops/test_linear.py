"""Products: what torch computes, and the wrapper of cublasLt over a stand-in that computes on the CPU."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nla_engine import extension
from nla_engine.ops import linear

USE = r"""
import ctypes, sys
import torch
from nla_engine import _C
assert not _C.matmul_available()
ctypes.CDLL(sys.argv[1])
assert _C.matmul_available()
def tensor(*shape):
    whole = torch.empty(torch.Size(shape).numel() + 256, dtype=torch.bfloat16)
    start = -whole.data_ptr() % 256 // 2
    return whole[start : start + torch.Size(shape).numel()].view(shape).copy_(torch.randn(shape))
m, n, k = 5, 7, 3
workspace = tensor(512)
for bias in (False, True):
    for add in (False, True):
        plan = _C.Matmul(0, m=m, n=n, k=k, bias=bias, accumulate=add, workspace_bytes=1024)
        assert plan.algorithms == 2
        x, w, b, out = tensor(m, k), tensor(n, k), tensor(n), tensor(m, n)
        wanted = x.double() @ w.double().T + b.double() * bias + out.double() * add
        args = {"x": x, "w": w, "out": out, "workspace": workspace}
        args = {name: tensor.data_ptr() for name, tensor in args.items()} | {"bias": b.data_ptr() * bias}
        plan.run(0, 77, **args)
        assert (out.double() - wanted).abs().max() <= 2**-8 * wanted.abs().max(), (bias, add)
        for wrong in ({"x": args["x"] + 2}, {"out": 0}, {"bias": 0 if bias else b.data_ptr()}):
            try:
                plan.run(0, 77, **(args | wrong))
            except ValueError:
                continue
            raise SystemExit(f"{wrong} was taken")
        for number, error in ((1, RuntimeError), (2, ValueError), (-1, ValueError)):
            try:
                plan.run(number, 77, **args)
            except error:
                continue
            raise SystemExit(f"algorithm {number} was taken")
"""

#: What csrc/matmul.cpp declares of cublasLt, against the header: values, and size and kind of everything passed.
DECLARED = r"""
#if !__has_include(<cublasLt.h>)
#error no cublasLt.h
#else
#include <cublasLt.h>
#include <cstddef>
#include <type_traits>
#include "matmul.cpp"
namespace nla {
template <typename R, typename... A, typename S, typename... B>
constexpr bool alike(R (*)(A...), S (*)(B...)) {
    if constexpr (sizeof...(A) != sizeof...(B)) return false;
    else return ((sizeof(A) == sizeof(B) && std::is_pointer_v<A> == std::is_pointer_v<B>) && ...);
}
#define SAME(ours, theirs) static_assert(int(ours) == int(theirs))
#define ALIKE(ours, theirs) static_assert(alike(decltype(Library::ours){}, decltype(&theirs){}))
SAME(kFloat32, CUDA_R_32F);
SAME(kBfloat16, CUDA_R_16BF);
SAME(kComputeFloat32, CUBLAS_COMPUTE_32F);
SAME(kTranspose, CUBLAS_OP_T);
SAME(kDescTransA, CUBLASLT_MATMUL_DESC_TRANSA);
SAME(kDescEpilogue, CUBLASLT_MATMUL_DESC_EPILOGUE);
SAME(kDescBiasPointer, CUBLASLT_MATMUL_DESC_BIAS_POINTER);
SAME(kEpilogueBias, CUBLASLT_EPILOGUE_BIAS);
SAME(kPreferWorkspaceBytes, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES);
SAME(0, CUBLAS_STATUS_SUCCESS);
SAME(sizeof(Status), sizeof(cublasStatus_t));
SAME(sizeof(Algorithm), sizeof(cublasLtMatmulAlgo_t));
using Theirs = cublasLtMatmulHeuristicResult_t;
SAME(sizeof(Heuristic), sizeof(Theirs));
SAME(offsetof(Heuristic, algorithm), offsetof(Theirs, algo));
SAME(offsetof(Heuristic, workspace), offsetof(Theirs, workspaceSize));
SAME(offsetof(Heuristic, state), offsetof(Theirs, state));
SAME(offsetof(Heuristic, waves), offsetof(Theirs, wavesCount));
ALIKE(create, cublasLtCreate);
ALIKE(desc_create, cublasLtMatmulDescCreate);
ALIKE(desc_set, cublasLtMatmulDescSetAttribute);
ALIKE(desc_destroy, cublasLtMatmulDescDestroy);
ALIKE(layout_create, cublasLtMatrixLayoutCreate);
ALIKE(layout_destroy, cublasLtMatrixLayoutDestroy);
ALIKE(prefer_create, cublasLtMatmulPreferenceCreate);
ALIKE(prefer_set, cublasLtMatmulPreferenceSetAttribute);
ALIKE(prefer_destroy, cublasLtMatmulPreferenceDestroy);
ALIKE(heuristic, cublasLtMatmulAlgoGetHeuristic);
ALIKE(matmul, cublasLtMatmul);
}  // namespace nla
#endif
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_what_is_declared_of_the_library_is_what_its_header_says(tmp_path: Path) -> None:
    """Of the toolkit's header if it has one, else of that in torch's own package of the library."""
    source = tmp_path / "declared.cpp"
    source.write_text(DECLARED)
    package = importlib.util.find_spec("nvidia")
    places = (package.submodule_search_locations if package else None) or []
    headers = [header for place in places for header in Path(place).glob("*/include/cublasLt.h")]
    includes = [Path(__file__).parents[2] / "csrc", *(header.parent for header in headers)]
    command = ["nvcc", "-std=c++17", *(f"-I{place}" for place in includes), "-c", str(source)]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "declared.o")], capture_output=True, text=True, check=False
    )
    if "#error no cublasLt.h" in done.stderr:
        pytest.skip("neither the CUDA toolkit nor a package brings cublasLt.h")
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(extension.load() is None, reason="the extension is not built")
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ for the stand-in")
@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has brought the true library along")
def test_the_wrapper_asks_for_the_right_product(tmp_path: Path) -> None:
    library = tmp_path / "libcublasLt.so.13"
    source = Path(__file__).parents[1] / "stand_in_cublaslt.cpp"
    options = ["-O1", "-shared", "-fPIC", f"-Wl,-soname,{library.name}"]
    subprocess.run(["g++", *options, str(source), "-o", str(library)], check=True)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", USE, str(library)], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(extension.load() is None, reason="the extension is not built")
@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has brought the library along")
def test_without_the_library_nothing_is_tuned() -> None:
    module = extension.load()
    assert module is not None and not module.matmul_available()
    with pytest.raises(RuntimeError, match="no cublasLt"):
        module.Matmul(0, m=1, n=1, k=1, bias=False, accumulate=False, workspace_bytes=0)


def test_products_are_those_of_torch() -> None:
    x, w, bias, residual = torch.randn(3, 8), torch.randn(5, 8), torch.randn(5), torch.randn(3, 5)
    linear.tune(3, [w], [bias])
    assert torch.equal(linear.linear(x, w, bias), torch.nn.functional.linear(x, w, bias))
    wanted = torch.addmm(residual, x, w.t())
    assert linear.add_linear_(residual, x, w) is residual
    assert torch.equal(residual, wanted)
    assert not linear._tuned


def test_the_race_finds_the_fastest_and_measures_it_again(monkeypatch) -> None:
    true = {0: 10.0, 1: 12.0, 2: 9.0, 3: 30.0, 4: 11.0, 5: 8.0, 6: 20.0}
    measured: list[int] = []

    def clock(run, calls: int) -> float:
        measured.append(run(0))
        return true[measured[-1]]

    monkeypatch.setattr(linear, "_time", clock)
    seconds = linear._race([lambda i, number=number: number for number in true])  # type: ignore[misc]
    assert min(range(7), key=seconds.__getitem__) == 5 and seconds[0] == 10.0
    assert measured.count(5) == measured.count(0) == 3 + linear._ROUNDS
    assert seconds[3] == seconds[6] == float("inf")
