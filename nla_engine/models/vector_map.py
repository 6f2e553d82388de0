"""Linear maps around an AV or AR: an affine map, and a whitening with its way back. Files are safetensors.

    map         weight [k * d, in], bias [k * d], prefix [p, d]      y = weight @ v + bias, as k vectors of width d
    whitening   mean [d], matrix [d, d], inverse [d, d], norm []     w = (v - mean) @ matrix
                                                                     v = w * norm / ||w|| @ inverse + mean

bias, prefix, inverse and norm may be missing. A key beside these is refused: it may change the map. Knows neither
checkpoints nor sidecars: `map_files` does.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from nla_engine.errors import CheckpointError, first_line
from nla_engine.models.adapters.tensors import fingerprint

#: A computed inverse may be wrong by this share of its norm if rounding the file's numbers can do that.
_INVERSE_ERROR = 0.1
#: A given inverse may differ from that of the matrix by this share, beyond what the rounding of both explains.
_MISMATCH = 0.01
#: Random vectors that a given inverse is tried on.
_TRIALS = 8
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class VectorMap:
    """An affine map. weight float32 [rows, in], bias float32 [rows] or None, prefix float32 [p, d] or None.

    checksum: of the file
    """

    path: Path
    checksum: str
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    prefix: torch.Tensor | None = None

    @classmethod
    def read(cls, path: Path) -> VectorMap:
        """From safetensors. CheckpointError for keys, shapes and values that are no map's."""
        tensors = _read(path, {"weight": 2, "bias": 1, "prefix": 2}, ("weight",))
        weight, bias, prefix = (tensors.get(name) for name in ("weight", "bias", "prefix"))
        assert weight is not None
        if bias is not None and len(bias) != len(weight):
            raise CheckpointError(
                f"{path}: bias has shape {list(bias.shape)}, weight {list(weight.shape)}: they are of two maps"
            )
        wide = {
            name: tensor.float()
            for name, tensor in (("bias", bias), ("prefix", prefix))
            if tensor is not None
        }
        return cls(path, fingerprint(path), weight.float(), wide.get("bias"), wide.get("prefix"))

    @property
    def width(self) -> int:
        """Of the vectors that it takes."""
        return self.weight.shape[1]

    def count(self, d_model: int) -> int:
        """How many vectors of width d_model it makes of one. CheckpointError if its rows are no multiple of that."""
        rows = len(self.weight)
        if rows % d_model or (self.prefix is not None and self.prefix.shape[1] != d_model):
            part = self.weight if rows % d_model else self.prefix
            assert part is not None
            raise CheckpointError(
                f"{self.path}: {'weight' if rows % d_model else 'prefix'} has shape {list(part.shape)}, which makes no "
                f"vectors of width {d_model}: give the map of this model"
            )
        return rows // d_model

    def apply(self, vectors: torch.Tensor, d_model: int) -> torch.Tensor:
        """float32 [n, in] -> [n, k, d_model]."""
        return torch.nn.functional.linear(vectors, self.weight, self.bias).unflatten(1, (-1, d_model))

    def to(self, device: torch.device) -> VectorMap:
        """The same on another device."""
        return replace(
            self,
            weight=self.weight.to(device),
            bias=_moved(self.bias, device),
            prefix=_moved(self.prefix, device),
        )


@dataclass(frozen=True)
class Whitening:
    """mean float32 [d], matrix float32 [d, d], inverse float32 [d, d] or None if it is not needed.

    norm: to which a vector is brought before the way back: a reconstructor's training fixes the direction alone
    checksum: of the file; content: sha256 over mean and matrix in float64, None if the file holds them rounded
    """

    path: Path
    checksum: str
    mean: torch.Tensor
    matrix: torch.Tensor
    inverse: torch.Tensor | None
    norm: float
    content: str | None

    @classmethod
    def read(cls, path: Path, *, back: bool) -> Whitening:
        """From safetensors. back: whether the way back is needed.

        An inverse that the file lacks is computed in float64. CheckpointError for keys, shapes and values that are no
        whitening's, a matrix without a dependable inverse, an inverse of another matrix.
        """
        shapes = {"mean": 1, "matrix": 2, "inverse": 2, "norm": None}
        tensors = _read(path, shapes, ("mean", "matrix"))
        mean, matrix, inverse = tensors["mean"], tensors["matrix"], tensors.get("inverse")
        for name in ("matrix", "inverse"):
            if name in tensors and tuple(tensors[name].shape) != (len(mean), len(mean)):
                raise CheckpointError(
                    f"{path}: {name} has shape {list(tensors[name].shape)}, mean {list(mean.shape)}: "
                    "they are of two whitenings"
                )
        norm = float(tensors["norm"]) if "norm" in tensors else math.sqrt(len(mean))
        if norm <= 0:
            raise CheckpointError(f"{path}: norm is {norm}: it must be above 0")
        if inverse is not None:
            _check_inverse(path, matrix, inverse)
        elif back:
            inverse = _inverse(path, matrix)
        exact = mean.dtype == matrix.dtype == torch.float64
        return cls(
            path,
            fingerprint(path),
            mean.float(),
            matrix.float(),
            None if inverse is None else inverse.float(),
            norm,
            _content(mean, matrix) if exact else None,
        )

    @property
    def width(self) -> int:
        """Of the vectors on both sides."""
        return len(self.mean)

    @property
    def symmetric(self) -> bool:
        """Whether the matrix is symmetric, up to its rounding, as that of a ZCA is."""
        return bool((self.matrix - self.matrix.T).norm() <= _MISMATCH * self.matrix.norm())

    def white(self, vectors: torch.Tensor) -> torch.Tensor:
        """Captured vectors float32 [n, d] -> white ones [n, d]."""
        return (vectors - self.mean) @ self.matrix

    def captured(self, white: torch.Tensor) -> torch.Tensor:
        """White vectors of any length float32 [n, d], not zero -> captured ones [n, d]; NaN for zero."""
        assert self.inverse is not None
        return white * (self.norm / white.norm(dim=1, keepdim=True)) @ self.inverse + self.mean

    def to(self, device: torch.device) -> Whitening:
        """The same on another device."""
        mean, matrix = self.mean.to(device), self.matrix.to(device)
        return replace(self, mean=mean, matrix=matrix, inverse=_moved(self.inverse, device))


def _read(path: Path, known: dict[str, int | None], needed: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The tensors of a file as it holds them. known: dimensions by key; None: a single number."""
    try:
        with safe_open(path, framework="pt") as file:
            keys = sorted(file.keys())
            if unknown := [key for key in keys if key not in known]:
                raise CheckpointError(
                    f"{path}: holds {', '.join(unknown[:4])}, which is not known and may change the map: "
                    f"it may hold {', '.join(known)}"
                )
            tensors = {key: file.get_tensor(key) for key in keys}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as safetensors ({first_line(error)}): fetch or convert it again"
        ) from error
    if missing := [key for key in needed if key not in tensors]:
        raise CheckpointError(
            f"{path}: holds {', '.join(keys) or 'nothing'}, and no {missing[0]}: convert it again"
        )
    for key, tensor in tensors.items():
        dimensions, shape = known[key], list(tensor.shape)
        fits = tensor.numel() == 1 if dimensions is None else tensor.ndim == dimensions and tensor.numel() > 0
        if not fits:
            wanted = "one number" if dimensions is None else f"{dimensions} dimension{'s'[: dimensions - 1]}"
            raise CheckpointError(
                f"{path}: {key} has shape {shape}, it must be of {wanted}: convert it again"
            )
        if tensor.dtype not in _FLOATS:
            raise CheckpointError(
                f"{path}: {key} holds {tensor.dtype}, not floating-point numbers: convert it again"
            )
        if not bool(tensor.float().isfinite().all()):
            raise CheckpointError(f"{path}: {key} holds NaN or Inf in float32: fetch or make it again")
    return tensors


def _inverse(path: Path, matrix: torch.Tensor) -> torch.Tensor:
    """float64 [d, d]. CheckpointError if the matrix has none, or none that its rounding leaves dependable."""
    wide, most = (
        matrix.double(),
        _INVERSE_ERROR / max(torch.finfo(matrix.dtype).eps, torch.finfo(torch.float32).eps),
    )
    try:
        inverse = torch.linalg.inv(wide)
    except torch.linalg.LinAlgError:
        raise CheckpointError(
            f"{path}: matrix is singular, so vectors cannot be brought back: give the whitening that was trained with"
        ) from None
    condition = float(torch.linalg.matrix_norm(wide, 1) * torch.linalg.matrix_norm(inverse, 1))
    if not condition <= most:
        raise CheckpointError(
            f"{path}: matrix is badly conditioned ({condition:.2g} in the 1-norm, {most:.2g} at most in its "
            f"{str(matrix.dtype).removeprefix('torch.')}): put the inverse of the training into the file as inverse"
        )
    return inverse


def _check_inverse(path: Path, matrix: torch.Tensor, inverse: torch.Tensor) -> None:
    """CheckpointError unless matrix @ inverse is 1 up to rounding, tried on random vectors."""
    wide, back, size = matrix.double(), inverse.double(), len(matrix)
    trial = torch.randn(size, _TRIALS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    left = float((wide @ (back @ trial) - trial).norm() / trial.norm())
    eps = max(torch.finfo(tensor.dtype).eps for tensor in (matrix, inverse))
    rounding = float((wide.square().sum(0) * back.square().sum(1)).sum().sqrt()) / math.sqrt(size)
    if not left <= _MISMATCH + eps * rounding:
        raise CheckpointError(
            f"{path}: inverse is not that of matrix (their product is {left:.2g} away from 1): they are of two "
            "whitenings: convert it again"
        )


def _moved(tensor: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(device)


def _content(mean: torch.Tensor, matrix: torch.Tensor) -> str:
    """sha256 over the bytes of mean and matrix, float64 in rows, as the trainers of whitened pairs write it down."""
    digest = hashlib.sha256(mean.contiguous().numpy().astype("<f8").tobytes())
    digest.update(matrix.contiguous().numpy().astype("<f8").tobytes())
    return digest.hexdigest()
