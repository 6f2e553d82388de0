"""Row codecs: float32 rows <-> the bytes that a store keeps. Runs on the host; the loops are in `codec.loops`.

A row x of width d is stored as its exact L2 norm and a quantised direction. With rms = norm / sqrt(d):

    y     = (H x) / rms            H: orthonormal Hadamard matrix on each block of `block` channels
    scale = float16(clip * max|y| / top)         one per group of `group` channels
    code  = clamp(round_half_even(y / scale), -top, top)
    x'    = rms * H (scale * code)               H is its own inverse

y / scale is H x times the float32 (1 / rms) * (1 / scale), which is capped at the largest float32. y / scale is exact
until it is rounded to the code.

`int8`: top 127, group = block, clip 1.
`int4`: top 7, group 32, code + 8 in a nibble, even channel low. The clip is 29 / m, for the m of INT4_DIVISORS that
costs the group the least; of equal ones the first. The largest magnitude is then 7 m / 29 < 7.5 scales, so it is still
rounded to 7. Costs are sums of whole numbers, the same in any order:

    fine     = round_half_even(y / s * 4096 / 29)     s: the scale at clip 1; y / scale is 16 m fine / 2^16
    distance = (16 m fine + 128) >> 8, the lowest 8 bits as a signed number: from the nearest code, in scale / 256
    cost     = sum of distance^2 over the group * float32(1 / m^2)

If s is less than 2^-14, the smallest normal float16, the clip is 1.
`bf16`: the row itself, rounded to bfloat16 bits; no rotation, no scales.

Every float32 operation is a single IEEE addition or multiplication in a stated order, never fused except for codes and
fine codes. So the CUDA and torch versions (`nla_engine.ops.encode`) give the same bits. One exception is the CUDA
encoder of int8 and int4 for rows of 16-bit floats: tensor cores sum six of the seven steps of the rotation in their own
order. Where the float32 sums of a block are exact (magnitudes within a factor of about 2^9 in bfloat16, 2^6 in float16)
this changes nothing. Elsewhere the last bits of a sum may differ. Then a code may differ by one where y / scale is next
to a tie. More rarely, a scale differs by one unit in the last place, or an int4 group whose costs are next to each
other takes the other clip, and with it the codes of the block or group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from nla_engine.codec import loops as loops
from nla_engine.codec.loops import NORM_RANGE
from nla_engine.errors import RequestError

MAX_BLOCK = 128
INT4_GROUP = 32
INT4_TOP = 7
INT8_TOP = 127
#: int4 clips a group's range to 29 / m of its largest magnitude, for one m of these.
INT4_DIVISORS = (29, 30, 31)

CODEC_NAMES = ("int8", "int4", "bf16")
#: A row is an attention sink if its norm is this many times the median of its layer.
SINK_FACTOR = 8.0
#: What rows can be decoded to on the host: float32, or bfloat16 as its bits.
DECODED_DTYPES = (np.dtype(np.float32), np.dtype(np.uint16))


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
                f"codec int4 packs two channels per byte: d_model {d_model} is odd, use int8 or bf16"
            )
        if name == "bf16":
            return cls(name, d_model, block=1, group=1)
        return cls(name, d_model, block=block, group=block if name == "int8" else min(block, INT4_GROUP))

    @property
    def code_dtype(self) -> np.dtype:
        return np.dtype({"int8": np.int8, "int4": np.uint8, "bf16": np.uint16}[self.name])

    @property
    def code_width(self) -> int:
        """Stored code elements per row."""
        return self.d_model // 2 if self.name == "int4" else self.d_model

    @property
    def scale_width(self) -> int:
        """Stored scales per row."""
        return 0 if self.name == "bf16" else self.d_model // self.group

    @property
    def row_bytes(self) -> int:
        """Bytes per row in the store, including its norm."""
        return self.code_width * self.code_dtype.itemsize + 2 * self.scale_width + 4

    def to_dict(self) -> dict[str, Any]:
        """The scheme in words and numbers, for a store's attributes."""
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
        """Encode float32 [n, d]. Rows that are not ordinary (see `ordinary_rows`) get codes of 0 and scales of 0."""
        x = np.ascontiguousarray(rows, dtype=np.float32)
        if x.ndim != 2 or x.shape[1] != self.d_model:
            raise ValueError(f"rows of shape {x.shape} do not have width {self.d_model}")
        n = x.shape[0]
        norm = np.empty(n, np.float32)
        codes = np.zeros((n, self.code_width), self.code_dtype)
        scales = np.zeros((n, self.scale_width), np.float16)
        loops.norms(x, norm)
        if self.name == "bf16":
            codes[:] = bf16_bits(x)
        else:
            raw = np.zeros((n, self.d_model), np.int8)
            wide = np.zeros((n, self.scale_width), np.float32)
            top, divisors = (INT8_TOP, (1,)) if self.name == "int8" else (INT4_TOP, INT4_DIVISORS)
            loops.encode(
                x,
                norm,
                _f32_sqrt(self.d_model),
                self.block,
                self.group,
                np.float32(top),
                np.array(divisors),
                raw,
                wide,
            )
            scales[:] = wide.astype(np.float16)
            codes[:] = raw if self.name == "int8" else _pack_nibbles(raw)
        return EncodedRows(codes, scales, norm)

    def decode(self, encoded: EncodedRows, out: np.ndarray | None = None) -> np.ndarray:
        """Decode n rows. Rows that are kept exactly elsewhere come out as zeros here, except in bf16, which holds all.

        out: C-contiguous [n, d] to fill and return, float32 or uint16 (bfloat16 bits of the float32 values, rounded to
            nearest even); None for a new float32 one
        Raises ValueError for an `out` of another kind.
        """
        shape = (len(encoded.norm), self.d_model)
        if out is None:
            out = np.empty(shape, np.float32)
        elif out.shape != shape or out.dtype not in DECODED_DTYPES or not out.flags.c_contiguous:
            raise ValueError(f"out is {out.dtype} {out.shape}, not contiguous float32 or uint16 {shape}")
        if self.name == "bf16":
            if out.dtype == np.uint16:
                out[:] = encoded.codes
            else:
                loops.widen(np.ascontiguousarray(encoded.codes).reshape(-1), out.view(np.uint32).reshape(-1))
            return out
        loops.decoder(self.group, self.block, self.name == "int4", out.dtype == np.uint16)(
            np.ascontiguousarray(encoded.codes),
            np.ascontiguousarray(encoded.scales.astype(np.float32)),
            np.ascontiguousarray(encoded.norm),
            _f32_sqrt(self.d_model),
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


def relative_errors(codec: Codec, rows: np.ndarray) -> np.ndarray:
    """||x' - x|| / ||x|| of float32 rows [n, d], finite and not zero, through the codec: float64 [n]."""
    lost = (codec.decode(codec.encode(rows)) - rows).astype(np.float64)
    return np.asarray(np.linalg.norm(lost, axis=1) / np.linalg.norm(rows.astype(np.float64), axis=1))


def describe_errors(errors: np.ndarray) -> dict[str, float | int]:
    """What a store records of its codec's relative L2 errors on a sample."""
    p99 = float(np.percentile(errors, 99))
    return {"mean": float(errors.mean()), "p99": p99, "worst": float(errors.max()), "rows": len(errors)}


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
    x = np.ascontiguousarray(rows, dtype=np.float32)
    out = np.empty(x.shape, np.uint16)
    loops.narrow(x.reshape(-1), out.reshape(-1))
    return out


def bf16_values(bits: np.ndarray) -> np.ndarray:
    """uint16 [...] bfloat16 bits -> float32 [...], exact."""
    stored = np.ascontiguousarray(bits, dtype=np.uint16)
    out = np.empty(stored.shape, np.uint32)
    loops.widen(stored.reshape(-1), out.reshape(-1))
    return out.view(np.float32)


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
