"""Whitenings and maps for tests, computed with numpy in float64."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file


def zca(rows: np.ndarray, shrinkage: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """mean, matrix and inverse of the ZCA of rows [n, d], float64. shrinkage: towards the identity."""
    rows = rows.astype(np.float64)
    covariance = np.cov(rows.T)
    level = np.trace(covariance) / len(covariance)
    values, basis = np.linalg.eigh((1 - shrinkage) * covariance + shrinkage * level * np.eye(len(covariance)))
    return rows.mean(0), (basis * values**-0.5) @ basis.T, (basis * values**0.5) @ basis.T


def save_whitening(path: Path, dtype: torch.dtype = torch.float64, **parts: np.ndarray) -> str:
    """Write a whitening; the sha256 that its trainers write into a sidecar."""
    save_file({name: torch.from_numpy(np.array(array)).to(dtype) for name, array in parts.items()}, path)
    return hashlib.sha256(
        np.ascontiguousarray(parts["mean"]).tobytes() + np.ascontiguousarray(parts["matrix"]).tobytes()
    ).hexdigest()


def save_map(path: Path, weight: np.ndarray, bias: np.ndarray | None = None) -> None:
    """Write an affine map in float32."""
    tensors = {"weight": weight} | ({} if bias is None else {"bias": bias})
    save_file({name: torch.from_numpy(array).float() for name, array in tensors.items()}, path)
