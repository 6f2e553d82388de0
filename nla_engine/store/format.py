"""Store format, version 2: which arrays there are, their types, and how each is cut into shards.

The words and numbers here are the contract of docs/store_format.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntFlag
from typing import Any

import numpy as np

from nla_engine.codec.rows import Codec
from nla_engine.engine.request import Finish
from nla_engine.errors import StoreError
from nla_engine.sites import EMBEDDINGS, PARTS, RESID_POST, Site

FORMAT_VERSION = 2
#: From this version on sequences are stored in any order, and this array holds their numbers.
NUMBERED_VERSION, NUMBER = 2, "sequences/number"
ATTRIBUTE = "nla_engine"
#: The option that marks a store as an imported one: its tokens are not known.
IMPORTED = "imported"
EARLY_POSITIONS = 50
NO_TOKEN = -1

CHUNK_ROWS = 128
MAX_SHARD_ROWS = 4096
MAX_SHARD_BYTES = 16 << 20
#: Narrow arrays are all those with one entry per row, except `codes`. Each file costs a sync however small it is, so
#: their shards hold more rows.
NARROW_SHARD_FACTOR = 16
#: Every commit rewrites the last shard of each array: those of narrow arrays must be small beside that of `codes`.
MAX_NARROW_SHARD_BYTES = 4 << 20
EXACT_CHUNK_ROWS = 16
EXACT_SHARD_BYTES = 2 << 20

CHECKSUM_BYTES = 4

LAYER_CONVENTION = (
    f"layer K is {PARTS[RESID_POST]}: "
    "transformers hidden_states[K+1] for every block but the last. A row belongs to the token that was read."
)


class RowFlag(IntFlag):
    """Bits of rows/flags."""

    GENERATED = 1
    PROMPT_END = 2
    SEQUENCE_END = 4
    EARLY = 8
    SINK = 16
    NONFINITE = 32


FLAG_MEANINGS = {
    RowFlag.GENERATED: "the token read was generated",
    RowFlag.PROMPT_END: "the token read is the last prompt token",
    RowFlag.SEQUENCE_END: "the token read is the last one of the sequence",
    RowFlag.EARLY: f"position < {EARLY_POSITIONS}: outside the training data of released NLAs",
    RowFlag.SINK: "kept exactly: norm > sink_norm in some layer",
    RowFlag.NONFINITE: "kept exactly: the vector of some layer holds NaN or Inf",
}
FINISH_MEANINGS = {
    Finish.EOS: "the model wrote its end token",
    Finish.LENGTH: "the limit of new tokens was reached",
    Finish.STOP: "a stop string was reached",
    Finish.GIVEN: "the text was given, nothing was generated",
    Finish.PARTIAL: "the run stopped before the reply ended",
}


def row_flags(
    position: np.ndarray,
    prompt_size: int | np.ndarray,
    size: int | np.ndarray,
    sink: np.ndarray | bool = False,
    nonfinite: np.ndarray | bool = False,
) -> np.ndarray:
    """RowFlag bits, uint8 [n], of the rows at `position` int [n] in a sequence of `size` tokens.

    prompt_size, size: int, or int [n] where rows are of different sequences
    sink, nonfinite: masks [n], true where that holds in any layer.
    """
    bits = {
        RowFlag.GENERATED: position >= prompt_size,
        RowFlag.PROMPT_END: position == prompt_size - 1,
        RowFlag.SEQUENCE_END: position == size - 1,
        RowFlag.EARLY: position < EARLY_POSITIONS,
        RowFlag.SINK: sink,
        RowFlag.NONFINITE: nonfinite,
    }
    flags = np.zeros(position.shape, np.uint8)
    for bit, mask in bits.items():
        flags |= np.multiply(mask, np.uint8(bit))
    return flags


def flagged(flags: np.ndarray, flag: RowFlag) -> np.ndarray:
    """bool [n]: which rows have a flag, of flags uint8 [n]. `flags & flag` would be int64: eight times the memory."""
    marked: np.ndarray = flags & np.uint8(flag) != 0
    return marked


@dataclass(frozen=True)
class ArraySpec:
    """One array of the store: everything about it except its length.

    unit: what its length counts, a key of `Manifest.lengths`
    trailing: shape after the first axis
    """

    path: str
    dtype: np.dtype
    dimensions: tuple[str, ...]
    unit: str
    chunk_rows: int
    shard_rows: int
    trailing: tuple[int, ...] = ()

    @property
    def shard_chunks(self) -> int:
        return self.shard_rows // self.chunk_rows

    def shards_bytes(self, length: int) -> int:
        """Total size of the shard files of `length` rows."""
        chunks, shards = -(-length // self.chunk_rows), -(-length // self.shard_rows)
        chunk_bytes = self.chunk_rows * math.prod(self.trailing) * self.dtype.itemsize
        return chunks * (chunk_bytes + CHECKSUM_BYTES) + shards * index_bytes(self.shard_chunks)

    def shard_path(self, shard: int) -> str:
        """Path of a shard file, relative to the store: the default chunk key of Zarr v3."""
        return f"{self.path}/c/{shard}" + "/0" * len(self.trailing)

    def metadata(self, length: int) -> dict[str, Any]:
        """The array's zarr.json."""
        little: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}
        # Zarr allows no byte order for one-byte types.
        raw = little if self.dtype.itemsize > 1 else {"name": "bytes"}
        sharding = {
            "chunk_shape": [self.chunk_rows, *self.trailing],
            "codecs": [raw, {"name": "crc32c"}],
            "index_codecs": [little, {"name": "crc32c"}],
            "index_location": "end",
        }
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [length, *self.trailing],
            "data_type": self.dtype.name,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [self.shard_rows, *self.trailing]},
            },
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": 0,
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "attributes": {},
            "dimension_names": list(self.dimensions),
            "storage_transformers": [],
        }


def index_bytes(shard_chunks: int) -> int:
    """Size of the index at the end of a shard of `shard_chunks` inner chunks, its checksum included."""
    return 16 * shard_chunks + CHECKSUM_BYTES


def default_shard_rows(codec: Codec) -> int:
    """Rows per shard: 4096, or the power of two that keeps a shard of codes within 16 MiB; at least 128."""
    return _shard_rows(
        codec.code_width * codec.code_dtype.itemsize, MAX_SHARD_ROWS, MAX_SHARD_BYTES, CHUNK_ROWS
    )


def default_narrow_shard_rows(codec: Codec, shard_rows: int) -> int:
    """Rows per shard of a narrow array: 16 * shard_rows, or the power of two that keeps each shard within 4 MiB.

    Never fewer than shard_rows.
    """
    row_bytes = max(2 * codec.scale_width, 8)  # of the widest narrow array: `scales` or `rows/sequence`
    return _shard_rows(row_bytes, NARROW_SHARD_FACTOR * shard_rows, MAX_NARROW_SHARD_BYTES, shard_rows)


def next_token_arrays(top: int | None) -> tuple[str, ...]:
    """Names of the arrays of the group `rows` that hold next tokens, `top` of the likeliest; None: there are none."""
    return () if top is None else ("next_logprob", "top_id", "top_logprob")[: 3 if top else 1]


def array_specs(
    layers: Sequence[Site | int],
    codec: Codec,
    shard_rows: int,
    narrow_shard_rows: int,
    next_token: int | None = None,
    version: int = FORMAT_VERSION,
) -> dict[str, ArraySpec]:
    """Every array of a store of this format version, by path, in the order in which they are written.

    next_token: see `Manifest`
    """
    for name, rows in (("shard_rows", shard_rows), ("narrow_shard_rows", narrow_shard_rows)):
        if rows < 1 or rows & (rows - 1):
            raise StoreError(f"{name} {rows} is not a power of two")
    if narrow_shard_rows < shard_rows:
        raise StoreError(f"narrow_shard_rows {narrow_shard_rows} is less than shard_rows {shard_rows}")
    specs: list[ArraySpec] = []

    def flat(
        group: str, names: str, dtype: str, dimension: str, unit: str, shard: int, chunk: int = 0
    ) -> None:
        for name in names.split():
            path = f"{group}/{name}"
            specs.append(ArraySpec(path, np.dtype(dtype), (dimension,), unit, chunk or shard, shard))

    def wide(path: str, dtype: np.dtype, dimension: str, width: int, shard: int) -> None:
        chunk = min(CHUNK_ROWS, shard_rows)
        specs.append(ArraySpec(path, dtype, ("row", dimension), "rows", chunk, shard, (width,)))

    flat("rows", "token_id next_token_id position", "<i4", "row", "rows", narrow_shard_rows, shard_rows)
    flat("rows", "sequence", "<i8", "row", "rows", narrow_shard_rows, shard_rows)
    flat("rows", "flags", "u1", "row", "rows", narrow_shard_rows, shard_rows)
    if next_token is not None:
        flat("rows", "next_logprob", "<f4", "row", "rows", narrow_shard_rows, shard_rows)
    if next_token:
        shard = _shard_rows(
            4 * next_token, narrow_shard_rows, MAX_NARROW_SHARD_BYTES, min(CHUNK_ROWS, shard_rows)
        )
        wide("rows/top_id", np.dtype("<i4"), "rank", next_token, shard)
        wide("rows/top_logprob", np.dtype("<f4"), "rank", next_token, shard)
    d = codec.d_model
    exact_shard = _shard_rows(2 * d, 256, EXACT_SHARD_BYTES, EXACT_CHUNK_ROWS)
    for layer in layers:
        group, exact = layer_group(layer), exact_unit(layer)
        channel = "channel_pair" if codec.code_width != d else "channel"
        code_dtype = codec.code_dtype.newbyteorder("<")
        wide(f"{group}/codes", code_dtype, channel, codec.code_width, shard_rows)
        if codec.scale_width:
            wide(f"{group}/scales", np.dtype("<f2"), "group", codec.scale_width, narrow_shard_rows)
        flat(group, "norm", "<f4", "row", "rows", narrow_shard_rows, shard_rows)
        flat(group, "exact_row", "<i8", "exact", exact, 4096)
        specs.append(
            ArraySpec(
                f"{group}/exact",
                np.dtype("<u2"),
                ("exact", "channel"),
                exact,
                EXACT_CHUNK_ROWS,
                exact_shard,
                (d,),
            )
        )
    if version >= NUMBERED_VERSION:  # one read finds any number, so its shards are larger
        flat("sequences", "number", "<i8", "sequence", "sequences", 1 << 16, 1 << 12)
    flat("sequences", "row_start row_size token_start token_size", "<i8", "sequence", "sequences", 4096)
    flat("sequences", "source_start source_size", "<i8", "sequence", "sequences", 4096)
    flat("sequences", "prompt_size", "<i4", "sequence", "sequences", 4096)
    flat("sequences", "finish", "u1", "sequence", "sequences", 4096)
    flat("sequences", "tokens", "<i4", "token", "tokens", 1 << 16, 1 << 13)
    flat("sequences", "source", "u1", "byte", "source_bytes", 1 << 20, 1 << 16)
    flat("vocabulary", "start", "<i8", "boundary", "vocabulary_boundaries", 1 << 16)
    flat("vocabulary", "text", "u1", "byte", "vocabulary_bytes", 1 << 20, 1 << 16)
    return {spec.path: spec for spec in specs}


def layer_group(site: Site | int) -> str:
    """Name of the group that holds a site: layer_20, layer_20_attn_out, embeddings."""
    return EMBEDDINGS if str(site) == EMBEDDINGS else f"layer_{site}"


def group_site(group: str) -> Site:
    """The site of a group. ValueError if the group is none of a site's."""
    return Site.parse(group.removeprefix("layer_"))


def exact_unit(site: Site | int) -> str:
    """The unit of length of a site's exact arrays."""
    return f"exact_{site}"


def _shard_rows(row_bytes: int, most_rows: int, most_bytes: int, least_rows: int) -> int:
    rows = most_rows
    while rows > least_rows and rows * row_bytes > most_bytes:
        rows //= 2
    return rows
