"""Ways to store a row, for comparison: the store's codecs, and others that it might have used. Plain numpy, host only.

Each scheme is fitted on the first rows (most learn nothing from them), then returns rows as they would be read back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from nla_engine.codec.rows import Codec

#: A fitted scheme: rows [n, d] -> the same rows after they were stored and read back, float32.
Trip = Callable[[np.ndarray], np.ndarray]
_NORM_BYTES = 4
#: Fractions of the first rows' values that an affine code may clip at either end of a channel.
_SPANS = (0.0, 0.0001, 0.001, 0.01)


@dataclass(frozen=True)
class Scheme:
    """name; row_bytes: stored bytes of a row of width d; fit: float32 [m, d], the first rows -> its trip."""

    name: str
    row_bytes: Callable[[int], float]
    fit: Callable[[np.ndarray], Trip]


def schemes() -> list[Scheme]:
    """The store's codecs first."""
    return [
        *(Scheme(name, _codec_bytes(name), _codec(name)) for name in ("int8", "int4", "bf16")),
        Scheme(
            "int8 per row", lambda d: d + _NORM_BYTES, lambda first: lambda x: _absmax(x, x.shape[1], 127)
        ),
        Scheme(
            "int8 per 128, no rotation", lambda d: d + 2 * _groups(d, 128) + _NORM_BYTES, _grouped(128, 127)
        ),
        Scheme("int8 affine per channel", lambda d: d + _NORM_BYTES, _affine(8)),
        Scheme("int4 affine per channel", lambda d: d / 2 + _NORM_BYTES, _affine(4)),
        Scheme(
            "int4 per 32, no rotation", lambda d: d / 2 + 2 * _groups(d, 32) + _NORM_BYTES, _grouped(32, 7)
        ),
        Scheme("fp8 e4m3 per row", lambda d: d + _NORM_BYTES, lambda first: _fp8),
    ]


def _groups(d: int, most: int) -> int:
    return d // math.gcd(d, most)


def _codec_bytes(name: str) -> Callable[[int], float]:
    return lambda d: Codec.named(name, d).row_bytes


def _codec(name: str) -> Callable[[np.ndarray], Trip]:
    def fit(first: np.ndarray) -> Trip:
        codec = Codec.named(name, first.shape[1])
        return lambda x: codec.decode(codec.encode(x))

    return fit


def _grouped(most: int, top: int) -> Callable[[np.ndarray], Trip]:
    return lambda first: lambda x: _absmax(x, math.gcd(x.shape[1], most), top)


def _absmax(x: np.ndarray, group: int, top: int) -> np.ndarray:
    """Codes -top..top on a float16 scale (float32 for a whole row) for each `group` channels, relative to the norm."""
    rms = np.linalg.norm(x, axis=1, keepdims=True) / math.sqrt(x.shape[1])
    y = (x / rms).reshape(len(x), -1, group)
    scale = np.abs(y).max(axis=2, keepdims=True) / top
    scale = scale.astype(np.float16).astype(np.float32) if group < x.shape[1] else scale
    codes = np.clip(np.rint(np.divide(y, scale, out=np.zeros_like(y), where=scale > 0)), -top, top)
    return np.asarray((codes * scale).reshape(x.shape) * rms, np.float32)


def _affine(bits: int) -> Callable[[np.ndarray], Trip]:
    """A zero point and a step for each channel, fixed by the range of the first rows; later rows are clamped to it.

    Rows are divided by their norm, as in the codecs. The one of _SPANS with the least error on the first rows is used.
    """
    levels = (1 << bits) - 1

    def trip_of(low: np.ndarray, high: np.ndarray) -> Trip:
        step = np.maximum((high - low) / levels, np.float32(1e-12))

        def trip(x: np.ndarray) -> np.ndarray:
            rms = np.linalg.norm(x, axis=1, keepdims=True) / math.sqrt(x.shape[1])
            codes = np.clip(np.rint((x / rms - low) / step), 0, levels)
            return np.asarray((codes * step + low) * rms, np.float32)

        return trip

    def fit(first: np.ndarray) -> Trip:
        unit = _unit(first)
        spans = np.quantile(unit, [*_SPANS, *(1 - span for span in _SPANS)], axis=0).astype(np.float32)
        trips = [trip_of(*pair) for pair in zip(spans[: len(_SPANS)], spans[len(_SPANS) :], strict=True)]
        return min(trips, key=lambda trip: float(np.square(trip(unit) - unit).sum()))

    return fit


def _unit(x: np.ndarray) -> np.ndarray:
    return np.asarray(x * (math.sqrt(x.shape[1]) / np.linalg.norm(x, axis=1, keepdims=True)), np.float32)


def _fp8(x: np.ndarray) -> np.ndarray:
    """float8 e4m3 with one scale per row: its largest value becomes 448."""
    scale = np.abs(x).max(axis=1, keepdims=True) / np.float32(448.0)
    small = torch.from_numpy(x / scale).to(torch.float8_e4m3fn).float().numpy()
    return np.asarray(small * scale, np.float32)
