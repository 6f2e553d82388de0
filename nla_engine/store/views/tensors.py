"""Rows of a layer as torch tensors, decoded on the device that wants them: any rows at once, or all in bulk.

In bulk, a shard's bytes are read straight into memory that the device copies from. On a CUDA device, the next shard is
read while the last one is copied and decoded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nla_engine.codec.rows import Codec, bf16_values
from nla_engine.errors import RequestError
from nla_engine.ops.encode import CODE_DTYPES, decode_rows
from nla_engine.store.layer import StoredLayer
from nla_engine.store.records import LayerRows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Bytes of float32 values read at once for a CPU: small enough for the allocator to reuse the memory.
BLOCK_BYTES = 16 << 20


def decode_tensor(
    rows: LayerRows, codec: Codec, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Tensor:
    """n rows as a tensor [n, d] of a dtype in DTYPES (None: float32), with the exact rows in their places.

    Does not wait for a CUDA device if the rows lie in pinned memory. RequestError for other dtypes.
    """
    dtype, device = checked_dtype(dtype), torch.device(device)
    if device.type == "cpu":
        out = _decode_on_host(rows, codec, dtype)
    else:
        stored = (rows.codes.view(np.int16) if codec.name == "bf16" else rows.codes, rows.scales, rows.norm)
        codes, scales, norm = (torch.from_numpy(part).to(device, non_blocking=True) for part in stored)
        wide = torch.float32 if dtype == torch.float16 else dtype
        out = decode_rows(codes, scales, norm, codec, wide).to(dtype)
    if len(rows.exact_index):
        exact = torch.from_numpy(bf16_values(rows.exact)).to(device, dtype)
        out[torch.from_numpy(rows.exact_index).to(device)] = exact
    return out


def block_tensors(
    layer: StoredLayer,
    start: int = 0,
    stop: int | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    threads: int = 0,
) -> Iterator[tuple[int, Tensor]]:
    """Rows [start, stop) of a layer in order, one block at a time: (number of the first row, tensor [n, d]).

    threads: blocks read (for a CPU, also decoded) ahead of the caller; 0: everything in the caller's thread
    Raises StoreError on damaged bytes, RequestError for a dtype not in DTYPES or a negative number of threads.
    """
    dtype, target = checked_dtype(dtype), torch.device(device)
    if threads < 0:
        raise RequestError(f"threads is {threads}: it must be 0 or more")
    return _block_tensors(layer, range(*slice(start, stop).indices(len(layer))), target, dtype, threads)


def _block_tensors(
    layer: StoredLayer, rows: range, target: torch.device, dtype: torch.dtype, threads: int
) -> Iterator[tuple[int, Tensor]]:
    on_host = target.type == "cpu"
    size = block_rows(layer) if on_host else layer.shard_rows
    # One block is copied and decoded, `threads` blocks are being read, one is read and waits.
    places = deque(_Place.allocate(layer, size, pinned=not on_host) for _ in range(threads + 2))

    def read(part: range, place: _Place) -> LayerRows | Tensor:
        stored = place.read(layer, part.start, part.stop)
        return decode_tensor(stored, layer.codec, target, dtype) if on_host else stored

    def take(part: range, place: _Place, done: LayerRows | Tensor) -> tuple[int, Tensor]:
        if isinstance(done, LayerRows):
            done = decode_tensor(done, layer.codec, target, dtype)
            place.used(target)
        places.append(place)
        return part.start, done

    blocks = range(rows.start // size, -(-rows.stop // size) if rows else 0)
    parts = [range(max(rows.start, b * size), min(rows.stop, (b + 1) * size)) for b in blocks]
    if threads == 0:
        for part in parts:
            place = places.popleft()
            yield take(part, place, read(part, place))
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="store-reader") as pool:
        waiting: deque[tuple[range, _Place, Future[LayerRows | Tensor]]] = deque()
        for part in parts:
            if len(waiting) > threads:
                first, place, future = waiting.popleft()
                yield take(first, place, future.result())
            place = places.popleft()
            waiting.append((part, place, pool.submit(read, part, place)))
        for first, place, future in waiting:
            yield take(first, place, future.result())


def block_rows(layer: StoredLayer) -> int:
    """Rows read at once for a CPU: a power of two, so that no block lies in two shards."""
    fitting = max(BLOCK_BYTES // (4 * layer.codec.d_model), 1)
    return min(layer.shard_rows, max(1 << (fitting.bit_length() - 1), layer.arrays["codes"].spec.chunk_rows))


@dataclass
class _Place:
    """Memory for one block as stored; pinned, and with an event, if a CUDA device copies from it."""

    parts: dict[str, Tensor]
    copied: torch.cuda.Event | None

    @classmethod
    def allocate(cls, layer: StoredLayer, rows: int, pinned: bool) -> _Place:
        parts = {}
        dtypes = {"codes": CODE_DTYPES[layer.codec.name], "scales": torch.float16, "norm": torch.float32}
        for name in dtypes.keys() & layer.arrays.keys():
            spec = layer.arrays[name].spec
            shape = (max(rows, spec.chunk_rows), *spec.trailing)
            parts[name] = torch.empty(shape, dtype=dtypes[name], pin_memory=pinned)
        return cls(parts, torch.cuda.Event() if pinned else None)

    def read(self, layer: StoredLayer, start: int, stop: int) -> LayerRows:
        """Rows [start, stop), all of one block, as views of this memory."""
        if self.copied is not None:
            self.copied.synchronize()
        rows = {"scales": np.empty((stop - start, 0), np.float16)}
        for name, memory in self.parts.items():
            array = layer.arrays[name]
            size = array.spec.chunk_rows
            chunks = range(start // size, -(-stop // size))
            values = memory.numpy().view(array.spec.dtype)[: len(chunks) * size]
            array.read_shard(
                start // array.spec.shard_rows, chunks, values.reshape(-1, size, *array.spec.trailing)
            )
            rows[name] = values[start - chunks.start * size : stop - chunks.start * size]
        return LayerRows(rows["codes"], rows["scales"], rows["norm"], *layer.exact_between(start, stop))

    def used(self, device: torch.device) -> None:
        """Note that the device copies from here: the next `read` waits for it."""
        if self.copied is not None:
            self.copied.record(torch.cuda.current_stream(device))


def checked_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """`dtype`, float32 for None. Raises RequestError unless rows can be read in it."""
    if dtype not in (None, *DTYPES):
        raise RequestError(f"rows cannot be read as {dtype}: choose float32, bfloat16 or float16")
    return dtype or torch.float32


def _decode_on_host(rows: LayerRows, codec: Codec, dtype: torch.dtype) -> Tensor:
    # numpy allocates the memory, because it uses huge pages: without them page faults take longer than decoding.
    shape = (len(rows.norm), codec.d_model)
    if dtype == torch.bfloat16:
        bits = codec.decode(rows.encoded, np.empty(shape, np.uint16))
        return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(codec.decode(rows.encoded)).to(dtype)
