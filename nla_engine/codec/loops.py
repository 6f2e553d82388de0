"""The loops over rows of `nla_engine.codec.rows`, compiled by numba: norms, encoding, decoding, bfloat16.

They release the interpreter's lock. Callers check shapes and types.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np

#: Rows whose norm is outside this range (but not 0) are kept exactly: 1 / rms would leave the range of float32.
NORM_RANGE = (np.float32(1e-30), np.float32(1e30))
_LEAST_NORM, _MOST_NORM = NORM_RANGE
_LARGEST = np.finfo(np.float32).max
_SMALLEST_NORMAL_HALF = np.float32(6.103515625e-05)


def compiled(loop: Callable[..., Any]) -> Callable[..., Any]:
    """Compile with numba, to run without the interpreter's lock. The result is cached where a cache can be written."""
    try:
        return numba.njit(cache=True, nogil=True)(loop)
    except RuntimeError:  # no cache can be written, neither beside this file nor below HOME
        return numba.njit(nogil=True)(loop)


@compiled
def norms(x, norm):
    """norm[i] = the L2 norm of row i, summed in float64."""
    for i in range(x.shape[0]):
        total = 0.0
        for j in range(x.shape[1]):
            value = np.float64(x[i, j])
            total += value * value
        norm[i] = np.float32(math.sqrt(total))


@compiled
def _rotate(row, block):
    """In place y = sqrt(block) H x on each block: butterflies of step 1, 2, 4 ..."""
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


@compiled
def _half(value):
    """float32 rounded to the nearest float16 value (even on ties), as float32, for 0 <= value < 65504."""
    if value < _SMALLEST_NORMAL_HALF:  # subnormal halves are multiples of 2**-24
        return np.float32(np.rint(value * np.float32(16777216.0)) * np.float32(5.9604644775390625e-08))
    _, exponent = math.frexp(value)
    ulp = np.float32(math.ldexp(1.0, exponent - 11))
    return np.float32(np.rint(value / ulp) * ulp)


@compiled
def _code(value, reciprocal, top):
    """The product of two float32, exact in float64, rounded to a whole number (even on ties) and clamped to +-top."""
    return np.float32(min(max(np.rint(np.float64(value) * np.float64(reciprocal)), -top), top))


@compiled
def _reciprocal(scale, factor):
    """The multiplier of rotated values that gives y / scale."""
    return min(np.float32(1.0) / scale * factor, _LARGEST) if scale > 0 else np.float32(0.0)


@compiled
def _cheapest(values, reciprocal, divisors):
    """The divisor that costs a group the least; of equal ones the first. reciprocal: as for codes at clip 1"""
    fine = np.empty(values.shape[0], np.int32)
    to_fine = min(reciprocal * np.float32(4096.0 / divisors[0]), _LARGEST)
    for j in range(values.shape[0]):
        fine[j] = np.int32(np.rint(np.float64(values[j]) * np.float64(to_fine)))
    best, least = divisors[0], np.float32(np.inf)
    for divisor in divisors:
        total = np.int32(0)
        for j in range(values.shape[0]):
            distance = np.int32(np.int8((np.int32(16 * divisor) * fine[j] + np.int32(128)) >> 8))
            total += distance * distance
        cost = np.float32(total) * np.float32(1.0 / (divisor * divisor))
        if cost < least:
            best, least = divisor, cost
    return best


@compiled
def encode(x, norm, sqrt_d, block, group, top, divisors, codes, scales):
    """Codes int8 [n, d] and scales float32 [n, d / group] of the ordinary rows; others are left unchanged."""
    d = x.shape[1]
    one = np.float32(1.0)
    unit = np.float32(1.0 / math.sqrt(block))
    row = np.empty(d, np.float32)
    for i in range(x.shape[0]):
        if not (norm[i] >= _LEAST_NORM and norm[i] <= _MOST_NORM):
            continue
        row[:] = x[i]
        _rotate(row, block)
        factor = one / (norm[i] / sqrt_d) * unit
        for g in range(d // group):
            values = row[g * group : (g + 1) * group]
            largest = np.float32(0.0)
            for j in range(group):
                largest = max(largest, abs(values[j]))
            largest *= factor
            scale = _half(largest * (one / top))
            if len(divisors) > 1 and scale >= _SMALLEST_NORMAL_HALF:
                divisor = _cheapest(values, _reciprocal(scale, factor), divisors)
                scale = _half((largest * np.float32(divisors[0] / divisor)) * (one / top))
            scales[i, g] = scale
            reciprocal = _reciprocal(scale, factor)
            for j in range(group):
                codes[i, g * group + j] = np.int8(_code(values[j], reciprocal, top))


@compiled
def _bits(value):
    """float32 -> uint16 bfloat16 bits."""
    bits = np.float32(value).view(np.uint32)
    rounded = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    if value != value:
        rounded = bits | np.uint32(0x400000)
    return np.uint16(rounded >> np.uint32(16))


@compiled
def narrow(x, out):
    """float32 [n] -> uint16 [n], bfloat16 bits."""
    for i in range(x.shape[0]):
        out[i] = _bits(x[i])


@compiled
def widen(bits, out):
    """uint16 [n], bfloat16 bits -> uint32 [n], float32 bits."""
    for i in range(bits.shape[0]):
        out[i] = np.uint32(bits[i]) << np.uint32(16)


@compiled
def _fold(source, target, half):
    """Sums of neighbours into the first half, their differences into the second: one step of the rotation."""
    for j in range(half):
        p, q = source[2 * j], source[2 * j + 1]
        target[j] = p + q
        target[j + half] = p - q


@cache
def decoder(group: int, block: int, packed: bool, to_bits: bool) -> Callable[..., None]:
    """The decoding loop for one shape of block and group: LLVM vectorises loops of known length.

    A fold works on the lowest bit of the channel number and moves it to the top. So log2(block) folds are the
    butterflies of step 1, 2, 4 ... and end in natural order. The first log2(group) of them work on the integer codes.
    The scale is applied after them, when code j of group g is at j * groups + g. That gives the same bits as the
    stated order: a product of code and scale has at most 7 + 11 significant bits and a sum of 64 of them at most 24,
    so nothing is rounded before the last step of a group of 128, and that step rounds the same exact value once.
    """
    half, groups, unit = block // 2, block // group, np.float32(1.0 / math.sqrt(block))
    pairs, odd = divmod(max(group.bit_length() - 2, 0), 2)  # folds of integers after the first
    wide_pairs, wide_odd = divmod(groups.bit_length() - 1, 2)  # folds of float32

    @compiled
    def decode(codes, scales, norm, sqrt_d, out):
        a, b = np.zeros(block, np.int16), np.zeros(block, np.int16)
        y, z = np.empty(block, np.float32), np.empty(block, np.float32)
        for i in range(out.shape[0]):
            if not (norm[i] >= _LEAST_NORM and norm[i] <= _MOST_NORM):
                out[i, :] = 0
                continue
            rms = norm[i] / sqrt_d
            for k in range(out.shape[1] // block):
                if block == 1:
                    a[0] = codes[i, k]
                first = k * (half if packed else block)
                for j in range(half):
                    if packed:
                        byte = codes[i, first + j]
                        p, q = np.int16(byte & 15) - np.int16(8), np.int16(byte >> 4) - np.int16(8)
                    else:
                        p, q = np.int16(codes[i, first + 2 * j]), np.int16(codes[i, first + 2 * j + 1])
                    a[j] = p + q
                    a[j + half] = p - q
                for _ in range(pairs):
                    _fold(a, b, half)
                    _fold(b, a, half)
                if odd:
                    _fold(a, b, half)
                sums = b if odd else a
                for j in range(group):
                    for g in range(groups):
                        y[j * groups + g] = np.float32(sums[j * groups + g]) * scales[i, k * groups + g]
                for _ in range(wide_pairs):
                    _fold(y, z, half)
                    _fold(z, y, half)
                if wide_odd:
                    _fold(y, z, half)
                rotated = z if wide_odd else y
                for j in range(block):
                    value = (rotated[j] * unit) * rms
                    out[i, k * block + j] = _bits(value) if to_bits else value

    return decode
