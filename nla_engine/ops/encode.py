"""Encode rows of the residual stream into a stage, and decode them: reference, numba and CUDA, one contract.

    for every row t with dest[t] >= 0:    stage.codes/scales/norm[dest[t]] = codec(hidden[t])
    and if the codec cannot hold it:      stage.exact[k] = bfloat16(hidden[t]), stage.exact_dest[k] = dest[t]

where k counts up from `stage.exact_count`. `nla_engine.codec.rows` is the contract, also for the bits, and names the
one exception. The order of rows in the exact pool is free.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from nla_engine import extension
from nla_engine.codec.rows import (
    INT4_DIVISORS,
    INT4_TOP,
    INT8_TOP,
    NORM_RANGE,
    Codec,
    EncodedRows,
    bf16_bits,
    exact_rows,
)
from nla_engine.errors import RequestError
from nla_engine.ops.backends import cuda_fault
from nla_engine.ops.cards import card_of

BACKENDS = ("cuda", "numba", "torch")
INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LARGEST = torch.finfo(torch.float32).max
CODE_DTYPES = {"int8": torch.int8, "int4": torch.uint8, "bf16": torch.int16}


@dataclass(frozen=True)
class RowStage:
    """Preallocated tensors that rows are encoded into: R places, and room for E exact rows.

    codes: int8 [R, d] | uint8 [R, d/2] | int16 [R, d] (bfloat16 bits)
    scales: float16 [R, d/group], width 0 for bf16;  norm: float32 [R]
    exact: int16 [E, d], bfloat16 bits;  exact_dest: int64 [E], the place of each in the stage
    exact_count: int32 [1]; only grows. Rows past E are not kept: the code that empties the stage must check.
    """

    codec: Codec
    codes: Tensor
    scales: Tensor
    norm: Tensor
    exact: Tensor
    exact_dest: Tensor
    exact_count: Tensor

    @classmethod
    def allocate(cls, codec: Codec, rows: int, exact_capacity: int, device: torch.device | str) -> RowStage:
        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            codec,
            codes=zeros(rows, codec.code_width, dtype=CODE_DTYPES[codec.name]),
            scales=zeros(rows, codec.scale_width, dtype=torch.float16),
            norm=zeros(rows, dtype=torch.float32),
            exact=zeros(exact_capacity, codec.d_model, dtype=torch.int16),
            exact_dest=zeros(exact_capacity, dtype=torch.int64),
            exact_count=zeros(1, dtype=torch.int32),
        )

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.codes, self.scales, self.norm, self.exact, self.exact_dest, self.exact_count)


def backend(device: torch.device | str, override: str | None = None, codec: Codec | None = None) -> str:
    """The implementation for tensors on `device`: 'cuda', 'numba' or 'torch'.

    codec: for 'cuda' its rows must fit the card's shared memory; None: not checked
    Raises RequestError if `override` is unknown or cannot run there.
    """
    device = torch.device(device)
    kind = device.type
    if override is None:
        if kind == "cpu":
            return "numba"
        return "cuda" if kind == "cuda" and not cuda_fault(device) and _fits(codec, device) else "torch"
    if override not in BACKENDS:
        raise RequestError(f"encode backend '{override}' is unknown: choose one of {', '.join(BACKENDS)}")
    if (override, kind) in (("cuda", "cpu"), ("numba", "cuda")):
        raise RequestError(f"encode backend '{override}' cannot work on device '{device}': use 'torch'")
    if override == "cuda" and (fault := cuda_fault(device)):
        raise RequestError(f"encode backend 'cuda' is not available: {fault}")
    return override


def _fits(codec: Codec | None, device: torch.device) -> bool:
    """Whether a row and its scales, as float32, fit the shared memory of a block, as csrc/encode.cu may need."""
    return codec is None or 4 * (codec.d_model + codec.scale_width) <= card_of(device).shared_bytes


def encode_rows(
    hidden: Tensor, dest: Tensor, stage: RowStage, sink_norm: float, *, with_backend: str | None = None
) -> None:
    """Encode the selected rows of `hidden` into `stage`; on CUDA one launch on the current stream, no synchronisation.

    hidden: float32, bfloat16 or float16 [T, d]; rows may be strided, the channels of a row may not
    dest: int64 [T]; the row's place in the stage, negative to skip it. Places must differ and be below R. This is not
        checked, because a check would cost a synchronisation.
    sink_norm: rows with a larger norm are also kept exactly (math.inf: no rows)
    Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    _check_encode(hidden, dest, stage)
    run = {"cuda": _encode_cuda, "numba": _encode_numba, "torch": encode_rows_reference}
    run[backend(hidden.device, with_backend, stage.codec)](hidden, dest, stage, sink_norm)


def decode_rows(
    codes: Tensor,
    scales: Tensor,
    norm: Tensor,
    codec: Codec,
    out_dtype: torch.dtype = torch.float32,
    *,
    with_backend: str | None = None,
) -> Tensor:
    """Decode n encoded rows (layout of RowStage) to float32 or bfloat16 [n, d]. Exact rows are not restored here.

    Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    _check_decode(codes, scales, norm, codec, out_dtype)
    run = {"cuda": _decode_cuda, "numba": _decode_numba, "torch": decode_rows_reference}
    return run[backend(codes.device, with_backend, codec)](codes, scales, norm, codec, out_dtype)


# ---- reference: plain torch, any device, every step written out ----


def encode_rows_reference(hidden: Tensor, dest: Tensor, stage: RowStage, sink_norm: float) -> None:
    """`encode_rows` in plain torch: no data-dependent shape, so no synchronisation on CUDA."""
    codec = stage.codec
    x = hidden.to(torch.float32)
    norm = x.double().square().sum(dim=1).sqrt().float()
    ordinary = (norm >= float(NORM_RANGE[0])) & (norm <= float(NORM_RANGE[1]))
    bits = _bf16_bits(x)
    if codec.name == "bf16":
        codes, scales = bits, stage.scales.new_zeros((len(x), 0))
    else:
        # The divisor is a tensor, because torch on CUDA replaces division by a Python number by a product.
        inverse = 1.0 / (norm / _scalar(math.sqrt(codec.d_model), x))
        factor = torch.where(ordinary, inverse * _unit(codec, x), 0.0)[:, None]
        rotated = torch.where(ordinary[:, None], _rotate(x, codec.block), 0.0)
        raw, scales = _quantise(rotated.view(len(x), codec.scale_width, codec.group), factor, codec)
        codes = raw if codec.name == "int8" else _pack_nibbles(raw)

    for rows, value in ((stage.codes, codes), (stage.scales, scales), (stage.norm, norm)):
        _put(rows, value, dest, dest >= 0)

    if codec.name != "bf16":
        exact = (dest >= 0) & (norm != 0) & ~(ordinary & (norm <= sink_norm))
        slot = stage.exact_count + exact.cumsum(0) - 1
        kept = exact & (slot < len(stage.exact))
        _put(stage.exact, bits, slot, kept)
        _put(stage.exact_dest, dest, slot, kept)
        stage.exact_count.add_(exact.sum())


def decode_rows_reference(
    codes: Tensor, scales: Tensor, norm: Tensor, codec: Codec, out_dtype: torch.dtype
) -> Tensor:
    """`decode_rows` in plain torch."""
    if codec.name == "bf16":
        return codes.view(torch.bfloat16).to(out_dtype)
    raw = codes if codec.name == "int8" else _unpack_nibbles(codes)
    grouped = raw.float().view(len(raw), codec.scale_width, codec.group) * scales.float()[:, :, None]
    y = _rotate(grouped.view(len(raw), codec.d_model), codec.block) * _unit(codec, norm)
    rms = norm / _scalar(math.sqrt(codec.d_model), norm)
    ordinary = (norm >= float(NORM_RANGE[0])) & (norm <= float(NORM_RANGE[1]))
    return torch.where(ordinary[:, None], y * rms[:, None], 0.0).to(out_dtype)


def _scalar(value: float, like: Tensor) -> Tensor:
    """float32(value) as a 0-dimensional tensor on the device of `like`."""
    return torch.full((), value, dtype=torch.float32, device=like.device)


def _unit(codec: Codec, like: Tensor) -> Tensor:
    """The factor that makes the rotation orthonormal: float32(1 / sqrt(block))."""
    return _scalar(1.0 / math.sqrt(codec.block), like)


def _rotate(x: Tensor, block: int) -> Tensor:
    """sqrt(block) H x on each block of x [n, d]: butterflies of step 1, 2, 4 ..."""
    shape, step = x.shape, 1
    while step < block:
        a, b = x.reshape(shape[0], shape[1] // (2 * step), 2, step).unbind(dim=2)
        x = torch.stack((a + b, a - b), dim=2)
        step *= 2
    return x.reshape(shape)


def _quantise(v: Tensor, factor: Tensor, codec: Codec) -> tuple[Tensor, Tensor]:
    """y = v * factor, of v [n, groups, group] and factor [n, 1] -> int8 [n, d], float16 [n, groups]."""
    top = INT8_TOP if codec.name == "int8" else INT4_TOP
    inverse_top = 1.0 / _scalar(top, v)
    largest = v.abs().amax(dim=2) * factor
    scale = (largest * inverse_top).half()
    if codec.name == "int4":
        clip = torch.where(scale >= torch.finfo(torch.float16).smallest_normal, _clip(v, factor, scale), 1.0)
        scale = (largest * clip * inverse_top).half()
    codes = _nearest(v, _reciprocal(factor, scale)).clamp(-top, top)
    return codes.to(torch.int8).view(len(v), codec.d_model), scale


def _clip(v: Tensor, factor: Tensor, scale: Tensor) -> Tensor:
    """int4's clip of least cost for each group, float32 [n, groups]. scale: float16 [n, groups], at clip 1"""
    first = INT4_DIVISORS[0]
    to_fine = (_reciprocal(factor, scale) * _scalar(4096.0 / first, v)).clamp(max=_LARGEST)
    fine = _nearest(v, to_fine).to(torch.int32)
    least, clip = torch.full_like(to_fine, math.inf), torch.ones_like(to_fine)
    for divisor in INT4_DIVISORS:
        distance = ((16 * divisor * fine + 128) >> 8).to(torch.int8).to(torch.int32)
        cost = (distance * distance).sum(dim=2).float() * _scalar(1.0 / divisor**2, v)
        clip = torch.where(cost < least, _scalar(first / divisor, v), clip)
        least = torch.minimum(cost, least)
    return clip


def _reciprocal(factor: Tensor, scale: Tensor) -> Tensor:
    """factor / scale with one rounded reciprocal, 0 where the scale is 0: float32 [n, groups]."""
    wide = scale.float()
    return (torch.where(wide > 0, 1.0 / wide, 0.0) * factor).clamp(max=_LARGEST)


def _nearest(v: Tensor, reciprocal: Tensor) -> Tensor:
    """v * reciprocal, exact until it is rounded to a whole number: float64 [n, groups, group]."""
    return (v.double() * reciprocal[:, :, None].double()).round()


def _bf16_bits(x: Tensor) -> Tensor:
    """float32 [...] -> int16 [...]: `codec.bf16_bits`, NaN payloads included."""
    bits = x.contiguous().view(torch.int32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return torch.where(x.isnan(), (bits >> 16) | 0x0040, rounded).to(torch.int16)


def _pack_nibbles(raw: Tensor) -> Tensor:
    shifted = (raw + 8).to(torch.uint8)
    return shifted[:, 0::2] | (shifted[:, 1::2] << 4)


def _unpack_nibbles(packed: Tensor) -> Tensor:
    both = torch.stack((packed & 15, packed >> 4), dim=2)
    return both.view(len(packed), 2 * packed.shape[1]).to(torch.int8) - 8


def _put(stage: Tensor, value: Tensor, place: Tensor, chosen: Tensor) -> None:
    """stage[place[i]] = value[i] where chosen[i]. The others repeat the first one that is chosen, or stage[0]."""
    if not stage.numel() or not len(value):
        return
    some, first = chosen.any(), chosen.to(torch.uint8).argmax()
    source = torch.where(chosen, torch.arange(len(value), device=value.device), first)
    target = torch.where(some, place[source], 0)
    stage.index_copy_(0, target, torch.where(some, value[source], stage[:1]))


# ---- numba: CPU tensors, through the host codec ----


def _encode_numba(hidden: Tensor, dest: Tensor, stage: RowStage, sink_norm: float) -> None:
    chosen = dest >= 0
    rows, places = hidden[chosen].float().numpy(), dest[chosen].numpy()
    encoded = stage.codec.encode(rows)
    stage.codes.numpy()[places] = encoded.codes.view(stage.codes.numpy().dtype)
    stage.scales.numpy()[places] = encoded.scales
    stage.norm.numpy()[places] = encoded.norm
    if stage.codec.name == "bf16":
        return
    exact = np.flatnonzero(exact_rows(encoded.norm, sink_norm))
    count = int(stage.exact_count)
    kept = exact[: max(0, len(stage.exact) - count)]
    stage.exact.numpy()[count : count + len(kept)] = bf16_bits(rows[kept]).view(np.int16)
    stage.exact_dest.numpy()[count : count + len(kept)] = places[kept]
    stage.exact_count.add_(len(exact))


def _decode_numba(
    codes: Tensor, scales: Tensor, norm: Tensor, codec: Codec, out_dtype: torch.dtype
) -> Tensor:
    stored = codes.numpy().view(codec.code_dtype)
    return torch.from_numpy(codec.decode(EncodedRows(stored, scales.numpy(), norm.numpy()))).to(out_dtype)


# ---- CUDA: the extension, csrc/encode*.cu and csrc/decode.cu ----


def _extension() -> ModuleType:
    module = extension.load()
    assert module is not None  # `backend` has checked
    return module


def _where(tensor: Tensor) -> tuple[int, int]:
    """Device index and current stream's handle."""
    index = tensor.device.index if tensor.device.index is not None else torch.cuda.current_device()
    return index, torch.cuda.current_stream(index).cuda_stream


def _shape(codec: Codec) -> dict[str, str | int]:
    return {"codec": codec.name, "d": codec.d_model, "block": codec.block, "group": codec.group}


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _encode_cuda(hidden: Tensor, dest: Tensor, stage: RowStage, sink_norm: float) -> None:
    _extension().encode_rows(
        *_where(hidden),
        **_shape(stage.codec),
        hidden=hidden.data_ptr(),
        hidden_dtype=_dtype_name(hidden.dtype),
        row_stride=hidden.stride(0),
        rows=len(hidden),
        dest=dest.data_ptr(),
        codes=stage.codes.data_ptr(),
        scales=stage.scales.data_ptr(),
        norm=stage.norm.data_ptr(),
        sink_norm=sink_norm,
        exact=stage.exact.data_ptr(),
        exact_dest=stage.exact_dest.data_ptr(),
        exact_count=stage.exact_count.data_ptr(),
        exact_capacity=len(stage.exact),
    )


def _decode_cuda(codes: Tensor, scales: Tensor, norm: Tensor, codec: Codec, out_dtype: torch.dtype) -> Tensor:
    out = torch.empty((len(norm), codec.d_model), dtype=out_dtype, device=codes.device)
    _extension().decode_rows(
        *_where(codes),
        **_shape(codec),
        codes=codes.data_ptr(),
        scales=scales.data_ptr(),
        norm=norm.data_ptr(),
        rows=len(norm),
        out=out.data_ptr(),
        out_dtype=_dtype_name(out_dtype),
    )
    return out


# ---- checks, at the boundary ----


def _check(holds: bool, thing: str, fault: str) -> None:
    if not holds:
        raise ValueError(f"{thing}: {fault}")


def _check_encode(hidden: Tensor, dest: Tensor, stage: RowStage) -> None:
    d = stage.codec.d_model
    _check(
        hidden.dim() == 2 and hidden.shape[1] == d,
        "hidden",
        f"shape {tuple(hidden.shape)} is not [rows, {d}]",
    )
    _check(
        hidden.dtype in INPUT_DTYPES, "hidden", f"dtype {hidden.dtype} is not float32, bfloat16 or float16"
    )
    _check(d == 1 or hidden.stride(1) == 1, "hidden", "the channels of a row are not contiguous")
    _check(dest.shape == hidden.shape[:1], "dest", f"shape {tuple(dest.shape)} is not [{len(hidden)}]")
    _check(dest.dtype == torch.int64 and dest.is_contiguous(), "dest", "is not contiguous int64")
    for tensor in (dest, *stage.tensors):
        _check(tensor.device == hidden.device, "device", f"{tensor.device} beside hidden on {hidden.device}")
    _check(
        all(tensor.is_contiguous() for tensor in stage.tensors),
        "stage",
        "has a tensor that is not contiguous",
    )


def _check_decode(codes: Tensor, scales: Tensor, norm: Tensor, codec: Codec, out_dtype: torch.dtype) -> None:
    n = len(norm)
    for name, tensor, shape, dtype in (
        ("codes", codes, (n, codec.code_width), CODE_DTYPES[codec.name]),
        ("scales", scales, (n, codec.scale_width), torch.float16),
        ("norm", norm, (n,), torch.float32),
    ):
        _check(tensor.shape == shape, name, f"shape {tuple(tensor.shape)} is not {list(shape)}")
        _check(tensor.dtype == dtype and tensor.is_contiguous(), name, f"is not contiguous {dtype}")
        _check(tensor.device == codes.device, "device", f"{tensor.device} beside codes on {codes.device}")
    _check(
        out_dtype in (torch.float32, torch.bfloat16), "out_dtype", f"{out_dtype} is not float32 or bfloat16"
    )
