"""The compiled extension `nla_engine._C`: whether it is there, and what its absence costs.

Prints nothing; `--version` shows `why_missing()`.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType


@functools.cache
def _import() -> tuple[ModuleType | None, str]:
    """The module, or None and why it could not be imported."""
    try:
        return importlib.import_module("nla_engine._C"), ""
    except ImportError as error:
        return None, str(error)


def load() -> ModuleType | None:
    """The extension, or None where it was not built."""
    return _import()[0]


def architectures() -> tuple[str, ...]:
    """What the CUDA part is compiled for, as nvcc names it: sm_86 is machine code, compute_86 PTX.

    Empty without that part. `ops.backends.cuda_fault` says whether a device runs it.
    """
    return tuple(getattr(load(), "cuda_architectures", "").split())


def why_missing() -> str:
    """What is missing and what that makes slower, in one line; empty if nothing is missing."""
    module, fault = _import()
    if module is None:
        return (
            f"the compiled extension is missing ({fault}): shards are written by Python, CUDA rows are encoded by "
            "plain torch and products are not tuned, all slower; install a C++ compiler and reinstall nla-engine"
        )
    if not module.cuda:
        return (
            "the compiled extension has no CUDA part: CUDA rows are encoded by plain torch, slower; "
            "put nvcc on PATH and reinstall nla-engine with NLA_CUDA=1"
        )
    return ""
