"""What tests of kernels share: dtypes, random tensors, and how a kernel is compared with its reference."""

from __future__ import annotations

import numpy as np
import torch
from interpreted import DEVICE

#: The interpreter multiplies bfloat16 operands of a dot as raw bits, so bfloat16 is for GPUs only.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
#: The interpreter cuts off where a GPU rounds to bfloat16.
ROUNDED = DTYPES[1:]


def randn(rng: np.random.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).to(DEVICE, dtype)


def close(actual: torch.Tensor, reference: torch.Tensor, truth: torch.Tensor, floor: float = 1e-6) -> None:
    """The kernel's error against float64 truth is at most twice that of the torch reference of the same dtype."""
    assert torch.isfinite(actual).all()
    scale = float(truth.norm()) or 1.0
    error, allowed = float((actual.double() - truth).norm()), float((reference.double() - truth).norm())
    assert error <= 2 * allowed + floor * (scale + 0.1)
