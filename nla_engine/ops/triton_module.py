"""Triton, if it is installed: a torch built for CUDA brings it along, one built for CPUs does not.

Without it, `triton` and `tl` are stand-ins with which modules that hold kernels can be imported; no kernel can run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["MISSING", "tl", "triton"]


class _Absent:
    """What the modules use of triton outside their kernels."""

    @staticmethod
    def jit(kernel: Callable[..., Any] | None = None, **_: Any) -> Any:
        """The function as it is, with or without options of the decorator."""
        return kernel or (lambda function: function)

    @staticmethod
    def constexpr(value: Any) -> Any:
        """The value."""
        return value

    @staticmethod
    def cdiv(a: int, b: int) -> int:
        """a / b, rounded up."""
        return -(-a // b)

    @staticmethod
    def next_power_of_2(n: int) -> int:
        """The smallest power of two that is at least n, for n >= 1."""
        return 1 << (n - 1).bit_length()


#: Why Triton cannot be used; empty if it is there.
MISSING = ""
triton: Any
tl: Any
try:
    import triton  # type: ignore[no-redef]
    import triton.language as tl  # type: ignore[no-redef]
except ImportError as error:
    MISSING = f"Triton is not installed ({error})"
    triton = tl = _Absent()
