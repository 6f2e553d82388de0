"""What a writer is given: the rows of one finished sequence, and the test that they agree with themselves.

Knows nothing of files or of where in a store the sequence goes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nla_engine.codec import Codec, EncodedRows, bf16_bits, bf16_values, exact_rows, ordinary_rows
from nla_engine.errors import StoreError
from nla_engine.store.format import NO_TOKEN, Finish


@dataclass(frozen=True)
class LayerRows:
    """n rows of one layer as they are stored.

    codes, scales, norm: as in `EncodedRows` (scales has width 0 for bf16)
    exact_index: int64 [m], ascending: which of the n rows are also kept exactly
    exact: uint16 [m, d], their bfloat16 bits
    """

    codes: np.ndarray
    scales: np.ndarray
    norm: np.ndarray
    exact_index: np.ndarray
    exact: np.ndarray

    @classmethod
    def encode(cls, codec: Codec, rows: np.ndarray, sink_norm: float) -> LayerRows:
        """Encode float32 [n, d] on the host; rows above sink_norm or beyond the codec are kept exactly."""
        encoded = codec.encode(rows)
        index = np.flatnonzero(exact_rows(encoded.norm, sink_norm))
        return cls(
            encoded.codes, encoded.scales, encoded.norm, index.astype(np.int64), bf16_bits(rows[index])
        )

    @property
    def encoded(self) -> EncodedRows:
        """The quantised part."""
        return EncodedRows(self.codes, self.scales, self.norm)

    def decode(self, codec: Codec) -> np.ndarray:
        """float32 [n, d], the exact rows in their places."""
        rows = codec.decode(self.encoded)
        rows[self.exact_index] = bf16_values(self.exact)
        return rows


@dataclass(frozen=True)
class SequenceRows:
    """One finished sequence: its t tokens, and n <= t rows of it (ascending positions).

    token_id, next_token_id, position: int32 [n]; flags: uint8 [n] of RowFlag bits
    tokens: int32 [t], prompt and generated; source: the user's prompt record, UTF-8 JSON
    """

    token_id: np.ndarray
    next_token_id: np.ndarray
    position: np.ndarray
    flags: np.ndarray
    layers: Mapping[int, LayerRows]
    tokens: np.ndarray
    prompt_size: int
    finish: Finish
    source: bytes

    def check(self, layers: Sequence[int], codec: Codec) -> None:
        """Raise StoreError unless shapes, types and values agree with layers, codec and each other."""
        n, t, d = len(self.position), len(self.tokens), codec.d_model
        _check_array("tokens", self.tokens, np.dtype(np.int32), (t,))
        for name in ("token_id", "next_token_id", "position"):
            _check_array(name, getattr(self, name), np.dtype(np.int32), (n,))
        _check_array("flags", self.flags, np.dtype(np.uint8), (n,))
        if not 0 <= self.prompt_size <= t:
            raise StoreError(f"prompt_size {self.prompt_size} does not fit a sequence of {t} tokens")
        if n and (self.position[0] < 0 or self.position[-1] >= t or np.any(np.diff(self.position) <= 0)):
            raise StoreError(f"position is not ascending within the {t} tokens of the sequence")
        followed = np.append(self.tokens, np.int32(NO_TOKEN))
        if not np.array_equal(self.token_id, self.tokens[self.position]):
            raise StoreError("token_id does not hold tokens[position]")
        if not np.array_equal(self.next_token_id, followed[self.position + 1]):
            raise StoreError("next_token_id does not hold tokens[position + 1] (-1 after the last)")
        try:
            json.loads(self.source)
        except ValueError as error:
            raise StoreError(f"source is not UTF-8 JSON: {error}") from None
        if set(self.layers) != set(layers):
            raise StoreError(f"layers {sorted(self.layers)} were given, the store holds {sorted(layers)}")
        for layer, rows in self.layers.items():
            where = f"layer {layer} "
            m = len(rows.exact_index)
            _check_array(where + "codes", rows.codes, codec.code_dtype, (n, codec.code_width))
            _check_array(where + "scales", rows.scales, np.dtype(np.float16), (n, codec.scale_width))
            _check_array(where + "norm", rows.norm, np.dtype(np.float32), (n,))
            _check_array(where + "exact_index", rows.exact_index, np.dtype(np.int64), (m,))
            _check_array(where + "exact", rows.exact, np.dtype(np.uint16), (m, d))
            index = rows.exact_index
            if m and (index[0] < 0 or index[-1] >= n or np.any(np.diff(index) <= 0)):
                raise StoreError(f"{where}exact_index is not ascending within its {n} rows")
            lost = ~ordinary_rows(rows.norm) & (rows.norm != 0)
            lost[index] = False
            if codec.name != "bf16" and lost.any():
                raise StoreError(f"{where}row {np.flatnonzero(lost)[0]} has a norm that needs an exact copy")


def _check_array(name: str, array: np.ndarray, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    if array.dtype != dtype or array.shape != shape:
        raise StoreError(f"{name} is {array.dtype} {list(array.shape)}, it must be {dtype} {list(shape)}")
