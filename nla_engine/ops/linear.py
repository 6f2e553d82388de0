"""The products of a block: x w^T (+ bias), or added to a residual in place. By torch, or by the fastest way measured.

Torch takes the first algorithm that cublasLt proposes for a shape; another one is often a few percent faster. `tune`
measures all of them for one number of rows, on real weights. From then on this process computes that product by the
winner. Algorithms sum in different orders, so two of them may round differently: tune before a run, never in it.
The choice depends on timings, so two processes may choose differently.
Reference: `torch.nn.functional.linear` and `addmm_`, which also compute every product that was not tuned.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from nla_engine import extension

#: An algorithm must be this much faster than torch's to take its place.
_GAIN = 1.02
_WORKSPACE_BYTES = 32 << 20
#: One measurement: seconds of products between two events, after a spin (in cycles) that lets the host get ahead.
_SECONDS, _HOLD_CYCLES = 6e-3, 1_000_000
#: All are measured once, then this many of the fastest again, this many times.
_FINALISTS, _ROUNDS = 4, 3
#: Largest relative L2 difference from torch's product: bfloat16 rounds each to 2^-9.
DIFFERENCE = 2**-7
_COMPARED_ROWS = 256

#: way(x, w, bias, out) computes a product into `out`.
_Way = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor], None]
#: device, m, n, k, with bias, added to a residual
_Key = tuple[int, int, int, int, bool, bool]


@dataclass(frozen=True)
class _Algorithm:
    """One way to compute a product. plan: `_C.Matmul`."""

    plan: Any
    number: int
    device: int

    def __call__(
        self, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
    ) -> None:
        self.plan.run(
            self.number,
            torch.cuda.current_stream(self.device).cuda_stream,
            x=x.data_ptr(),
            w=w.data_ptr(),
            bias=0 if bias is None else bias.data_ptr(),
            out=out.data_ptr(),
            workspace=_workspace(self.device, threading.get_ident()).data_ptr(),
        )


#: The measured products: the algorithm that beats torch's, or None if none does.
_tuned: dict[_Key, _Algorithm | None] = {}


def linear(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """x [m, k], w [n, k], bias [n] or None -> x w^T + bias [m, n], in `out` if that is given."""
    best = _tuned.get(_key(x, w, bias, add=False))
    if best is None or not _fit(x, w, bias, out):
        if out is None:
            return torch.nn.functional.linear(x, w, bias)
        _multiply_by_torch(x, w, bias, out)
        return out
    if out is None:
        out = x.new_empty((len(x), len(w)))
    best(x, w, bias, out)
    return out


def add_linear_(residual: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """residual [m, n] += x [m, k] w [n, k]^T, in place; returned."""
    best = _tuned.get(_key(x, w, None, add=True))
    if best is None or not _fit(residual, x, w):
        return residual.addmm_(x, w.t())
    best(x, w, None, residual)
    return residual


@torch.inference_mode()
def tune(
    rows: int, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None] = (), add: bool = False
) -> None:
    """Measure the products of `rows` rows with these weights [n, k] of one shape, used in turn as in a pass.

    Does nothing if the extension, a known cublasLt or bfloat16 CUDA weights are missing, or for a tuned product.
    """
    weight = weights[0]
    module = extension.load()
    if (
        not weight.is_cuda
        or weight.dtype != torch.bfloat16
        or module is None
        or not module.matmul_available()
    ):
        return
    bias = biases[0] if biases else None
    random = torch.Generator(weight.device).manual_seed(0)  # the caller's random state does not change
    x = torch.randn(rows, weight.shape[1], device=weight.device, generator=random).to(weight.dtype)
    key = _key(x, weight, bias, add)
    if key in _tuned or any(w.shape != weight.shape for w in weights):
        return
    out = x.new_empty((rows, len(weight)))

    def in_turn(way: _Way) -> Callable[[int], None]:
        return lambda i: way(x, weights[i % len(weights)], biases[i % len(biases)] if biases else None, out)

    def sample(way: _Way) -> torch.Tensor:
        out.fill_(1.0)
        way(x, weight, bias, out)
        return out[:: math.ceil(rows / _COMPARED_ROWS)].float()

    def agrees(way: _Way) -> bool:
        """Whether an algorithm runs, and computes what torch computes."""
        try:
            return bool((sample(way) - wanted).norm() <= DIFFERENCE * wanted.norm())
        except RuntimeError:
            return False

    with torch.cuda.device(weight.device):
        shape = {
            "m": rows,
            "n": len(weight),
            "k": weight.shape[1],
            "bias": bias is not None,
            "accumulate": add,
        }
        plan = module.Matmul(key[0], **shape, workspace_bytes=_WORKSPACE_BYTES)
        usual: _Way = _add_by_torch if add else _multiply_by_torch
        wanted = sample(usual)
        ways = [_Algorithm(plan, number, key[0]) for number in range(plan.algorithms)]
        ways = [way for way in ways if agrees(way)]
        every: list[_Way] = [usual, *ways]
        seconds = _race([in_turn(way) for way in every])
    best = min(range(len(seconds)), key=seconds.__getitem__)
    _tuned[key] = ways[best - 1] if seconds[0] > _GAIN * seconds[best] else None


def _key(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, add: bool) -> _Key:
    return (-1 if x.device.index is None else x.device.index, len(x), *w.shape, bias is not None, add)


def _fit(*tensors: torch.Tensor | None) -> bool:
    """Whether the algorithms can take these tensors as they are in memory. They always can for those of a block."""
    there = [tensor for tensor in tensors if tensor is not None]
    return all(t.dtype == torch.bfloat16 and t.is_contiguous() and t.data_ptr() % 256 == 0 for t in there)


@functools.cache
def _workspace(device: int, thread: int) -> torch.Tensor:
    """One per thread: the products of one thread follow each other, those of two threads (AV and AR) may overlap."""
    return torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=f"cuda:{device}")


def _multiply_by_torch(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    """What `torch.nn.functional.linear` launches."""
    if bias is None:
        torch.mm(x, w.t(), out=out)
    else:
        torch.addmm(bias, x, w.t(), out=out)


def _add_by_torch(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    out.addmm_(x, w.t())


def _race(runs: Sequence[Callable[[int], None]]) -> list[float]:
    """Seconds per product of each; infinite for those dropped after the first round."""
    for _ in range(2):  # the second is warm
        first = [_time(run, 3) for run in runs]
    calls = max(3, min(64, math.ceil(_SECONDS / first[0])))
    first = [_time(run, calls) for run in runs]
    ahead = [0, *sorted(range(1, len(runs)), key=first.__getitem__)[:_FINALISTS]]
    rounds = [[_time(runs[i], calls) for i in ahead] for _ in range(_ROUNDS)]
    seconds = [math.inf] * len(runs)
    for i, times in zip(ahead, zip(*rounds, strict=True), strict=True):
        seconds[i] = median(times)
    return seconds


def _time(run: Callable[[int], None], calls: int) -> float:
    """Seconds per call, on the device only."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(_HOLD_CYCLES)
    start.record()
    for i in range(calls):
        run(i)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls
