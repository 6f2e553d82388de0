"""Row codecs: float32 rows <-> the bytes that a store keeps. Host side, numba.

A row x of width d is stored as its exact L2 norm and a quantised direction. With rms = norm / sqrt(d):

    y     = H (x / rms)            H: orthonormal Hadamard matrix on each block of `block` channels
    scale = float16(clip * max|y| / top)         one for each group of `group` channels
    code  = clamp(round_half_even(y / scale), -top, top)
    x'    = rms * H (scale * code)               H is its own inverse

`int8`: top 127, group = block, clip 1.  `int4`: top 7, group 32, clip = the candidate of least squared error,
code + 8 in a nibble, even channel low.  `bf16`: the row itself, rounded to bfloat16 bits; no rotation, no scales.

Every float32 operation below is a single IEEE addition or multiplication in a stated order, never fused, so that
the CUDA and torch versions (`nla_engine.ops.encode`) give the same bits. Knows nothing of files, layers or sequences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np

from nla_engine.errors import RequestError

MAX_BLOCK = 128
INT4_GROUP = 32
INT4_TOP = 7
INT8_TOP = 127
#: Fractions of the group's largest magnitude that int4 tries as its range, in this order; the first best wins.
INT4_CLIPS = np.array([1.0, 0.92, 0.84, 0.76, 0.68, 0.6], dtype=np.float32)
#: Rows whose norm lies outside this range (but is not 0) are kept exactly: 1 / rms would leave float32.
NORM_RANGE = (np.float32(1e-30), np.float32(1e30))
_LEAST_NORM, _MOST_NORM = NORM_RANGE

CODEC_NAMES = ("int8", "int4", "bf16")


@dataclass(frozen=True)
class EncodedRows:
    """n encoded rows.

    codes: int8 [n, d] (int8) | uint8 [n, d/2] (int4) | uint16 [n, d] (bf16 bits)
    scales: float16 [n, d/group], relative to norm/sqrt(d); width 0 for bf16
    norm: float32 [n], exact L2 norm (summed in float64)
    """

    codes: np.ndarray
    scales: np.ndarray
    norm: np.ndarray


@dataclass(frozen=True)
class Codec:
    """How rows of width `d_model` are stored. Build one with `Codec.named`."""

    name: str
    d_model: int
    block: int
    group: int

    @classmethod
    def named(cls, name: str, d_model: int) -> Codec:
        """The codec `name` for rows of width d_model: block is the largest power of two <= 128 that divides it."""
        if name not in CODEC_NAMES:
            raise RequestError(f"codec '{name}' is unknown: choose one of {', '.join(CODEC_NAMES)}")
        if d_model < 1:
            raise RequestError(f"d_model {d_model} is not a width")
        block = math.gcd(d_model, MAX_BLOCK)
        if name == "int4" and d_model % 2:
            raise RequestError(
                f"codec int4 packs two channels a byte: d_model {d_model} is odd, use int8 or bf16"
            )
        if name == "bf16":
            return cls(name, d_model, block=1, group=1)
        return cls(name, d_model, block=block, group=block if name == "int8" else min(block, INT4_GROUP))

    @property
    def code_dtype(self) -> np.dtype:
        return np.dtype({"int8": np.int8, "int4": np.uint8, "bf16": np.uint16}[self.name])

    @property
    def code_width(self) -> int:
        """Stored code elements a row."""
        return self.d_model // 2 if self.name == "int4" else self.d_model

    @property
    def scale_width(self) -> int:
        """Stored scales a row."""
        return 0 if self.name == "bf16" else self.d_model // self.group

    @property
    def row_bytes(self) -> int:
        """Bytes a row takes in the store, its norm included."""
        return self.code_width * self.code_dtype.itemsize + 2 * self.scale_width + 4

    def to_dict(self) -> dict[str, Any]:
        """The scheme in words and numbers, as it stands in a store's attributes."""
        described = {
            "int8": "x' = norm/sqrt(d) * H(scale * code); H orthonormal Hadamard per block; scale float16 per group",
            "int4": "as int8 with code = nibble - 8, even channel in the low nibble; scale float16 per group",
            "bf16": "codes are the bfloat16 bits of the row",
        }
        return {
            "name": self.name,
            "d_model": self.d_model,
            "block": self.block,
            "group": self.group,
            "decode": described[self.name],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Codec:
        codec = cls.named(str(data["name"]), int(data["d_model"]))
        if (codec.block, codec.group) != (data["block"], data["group"]):
            raise RequestError(
                f"codec {codec.name} with block {data['block']} and group {data['group']} is not one this version reads"
            )
        return codec

    def encode(self, rows: np.ndarray) -> EncodedRows:
        """Encode float32 [n, d]. Rows that are not `ordinary` (see `ordinary_rows`) get codes of 0 and scales of 0."""
        x = np.ascontiguousarray(rows, dtype=np.float32)
        if x.ndim != 2 or x.shape[1] != self.d_model:
            raise ValueError(f"rows of shape {x.shape} do not have width {self.d_model}")
        n = x.shape[0]
        norm = np.empty(n, np.float32)
        codes = np.zeros((n, self.code_width), self.code_dtype)
        scales = np.zeros((n, self.scale_width), np.float16)
        _norms(x, norm)
        if self.name == "bf16":
            codes[:] = bf16_bits(x)
        else:
            raw = np.zeros((n, self.d_model), np.int8)
            wide = np.zeros((n, self.scale_width), np.float32)
            top, clips = (INT8_TOP, INT4_CLIPS[:1]) if self.name == "int8" else (INT4_TOP, INT4_CLIPS)
            _encode(
                x, norm, _f32_sqrt(self.d_model), self.block, self.group, np.float32(top), clips, raw, wide
            )
            scales[:] = wide.astype(np.float16)
            codes[:] = raw if self.name == "int8" else _pack_nibbles(raw)
        return EncodedRows(codes, scales, norm)

    def decode(self, encoded: EncodedRows) -> np.ndarray:
        """Decode to float32 [n, d]. Rows that are kept exactly elsewhere come out as zeros here."""
        if self.name == "bf16":
            return bf16_values(encoded.codes)
        raw = encoded.codes if self.name == "int8" else _unpack_nibbles(encoded.codes)
        out = np.empty((len(encoded.norm), self.d_model), np.float32)
        _decode(
            np.ascontiguousarray(raw),
            np.ascontiguousarray(encoded.scales.astype(np.float32)),
            np.ascontiguousarray(encoded.norm),
            _f32_sqrt(self.d_model),
            self.block,
            self.group,
            out,
        )
        return out


def decode_reference(codec: Codec, encoded: EncodedRows) -> np.ndarray:
    """The decoder as its formula reads, in float64 with an explicit Hadamard matrix: slow and obvious. [n, d]"""
    if codec.name == "bf16":
        return bf16_values(encoded.codes).astype(np.float64)
    raw = encoded.codes if codec.name == "int8" else _unpack_nibbles(encoded.codes)
    y = raw.astype(np.float64) * np.repeat(encoded.scales.astype(np.float64), codec.group, axis=1)
    hadamard = hadamard_matrix(codec.block)
    x = (y.reshape(len(y), codec.d_model // codec.block, codec.block) @ hadamard).reshape(
        len(y), codec.d_model
    )
    with np.errstate(invalid="ignore"):
        x *= (encoded.norm.astype(np.float64) / math.sqrt(codec.d_model))[:, None]
    x[~ordinary_rows(encoded.norm)] = 0.0
    return x


def hadamard_matrix(n: int) -> np.ndarray:
    """The orthonormal Sylvester-Hadamard matrix of order n (a power of two), float64 [n, n], symmetric."""
    matrix = np.ones((1, 1))
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / math.sqrt(n)


def ordinary_rows(norm: np.ndarray) -> np.ndarray:
    """Mask [n] of the rows that a quantising codec can hold: finite, not zero, norm inside NORM_RANGE."""
    return (norm >= NORM_RANGE[0]) & (norm <= NORM_RANGE[1])


def exact_rows(norm: np.ndarray, sink_norm: float) -> np.ndarray:
    """Mask [n] of the rows that must be kept exactly: non-finite, outside NORM_RANGE, or above sink_norm."""
    return ~(ordinary_rows(norm) & (norm <= sink_norm)) & (norm != 0)


def bf16_bits(rows: np.ndarray) -> np.ndarray:
    """float32 [...] -> uint16 [...]: bfloat16 bits, round to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(rows, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(rows), (bits >> 16) | 0x0040, rounded).astype(np.uint16)


def bf16_values(bits: np.ndarray) -> np.ndarray:
    """uint16 [...] bfloat16 bits -> float32 [...], exact."""
    return (np.ascontiguousarray(bits, dtype=np.uint16).astype(np.uint32) << 16).view(np.float32)


def _f32_sqrt(d_model: int) -> np.float32:
    return np.float32(math.sqrt(d_model))


def _pack_nibbles(raw: np.ndarray) -> np.ndarray:
    shifted = (raw + 8).astype(np.uint8)
    return shifted[:, 0::2] | (shifted[:, 1::2] << 4)


def _unpack_nibbles(packed: np.ndarray) -> np.ndarray:
    raw = np.empty((len(packed), packed.shape[1] * 2), np.int8)
    raw[:, 0::2] = (packed & 15).astype(np.int8) - 8
    raw[:, 1::2] = (packed >> 4).astype(np.int8) - 8
    return raw


@numba.njit(cache=True, nogil=True)
def _norms(x, norm):
    for i in range(x.shape[0]):
        total = 0.0
        for j in range(x.shape[1]):
            value = np.float64(x[i, j])
            total += value * value
        norm[i] = np.float32(math.sqrt(total))


@numba.njit(cache=True, nogil=True)
def _rotate(row, block, unit):
    """In place y = H x on each block: butterflies of step 1, 2, 4 ..., then one multiplication by 1/sqrt(block)."""
    for start in range(0, row.shape[0], block):
        step = 1
        while step < block:
            for i in range(start, start + block, 2 * step):
                for j in range(i, i + step):
                    a = row[j]
                    b = row[j + step]
                    row[j] = a + b
                    row[j + step] = a - b
            step *= 2
        for j in range(start, start + block):
            row[j] = row[j] * unit


@numba.njit(cache=True, nogil=True)
def _half(value):
    """float32 rounded to the nearest float16 value (even on ties), as float32, for 0 <= value < 65504."""
    if value < np.float32(6.103515625e-05):  # subnormal halves are multiples of 2**-24
        return np.float32(np.rint(value * np.float32(16777216.0)) * np.float32(5.9604644775390625e-08))
    _, exponent = math.frexp(value)
    ulp = np.float32(math.ldexp(1.0, exponent - 11))
    return np.float32(np.rint(value / ulp) * ulp)


@numba.njit(cache=True, nogil=True)
def _encode(x, norm, sqrt_d, block, group, top, clips, codes, scales):
    d = x.shape[1]
    one = np.float32(1.0)
    unit = np.float32(1.0 / math.sqrt(block))
    row = np.empty(d, np.float32)
    errors = np.empty(group, np.float32)
    for i in range(x.shape[0]):
        if not (norm[i] >= _LEAST_NORM and norm[i] <= _MOST_NORM):
            continue
        inverse = one / (norm[i] / sqrt_d)
        for j in range(d):
            row[j] = x[i, j] * inverse
        _rotate(row, block, unit)
        for g in range(d // group):
            start = g * group
            largest = np.float32(0.0)
            for j in range(start, start + group):
                largest = max(largest, abs(row[j]))
            best_error = np.float32(np.inf)
            for c in range(len(clips)):
                scale = _half((largest * clips[c]) * (one / top))
                reciprocal = one / scale if scale > 0 else np.float32(0.0)
                if len(clips) > 1:
                    for j in range(group):
                        code = min(max(np.rint(row[start + j] * reciprocal), -top), top)
                        product = code * scale
                        delta = row[start + j] - product
                        errors[j] = delta * delta
                    width = group // 2
                    while width > 0:  # the order of a warp's butterfly reduction
                        for j in range(width):
                            errors[j] = errors[j] + errors[j + width]
                        width //= 2
                    if not errors[0] < best_error:
                        continue
                    best_error = errors[0]
                scales[i, g] = scale
                for j in range(start, start + group):
                    codes[i, j] = np.int8(min(max(np.rint(row[j] * reciprocal), -top), top))


@numba.njit(cache=True, nogil=True)
def _decode(codes, scales, norm, sqrt_d, block, group, out):
    unit = np.float32(1.0 / math.sqrt(block))
    for i in range(codes.shape[0]):
        row = out[i]
        if not (norm[i] >= _LEAST_NORM and norm[i] <= _MOST_NORM):
            row[:] = 0.0
            continue
        for j in range(codes.shape[1]):
            row[j] = np.float32(codes[i, j]) * scales[i, j // group]
        _rotate(row, block, unit)
        rms = norm[i] / sqrt_d
        for j in range(codes.shape[1]):
            row[j] = row[j] * rms
