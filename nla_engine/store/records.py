"""What a writer is given: the rows of finished sequences, and the checks that their arrays agree."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nla_engine.codec.rows import Codec, EncodedRows, bf16_bits, bf16_values, exact_rows, ordinary_rows
from nla_engine.engine.request import NextTokens
from nla_engine.errors import StoreError
from nla_engine.sites import Site
from nla_engine.store.format import NO_TOKEN, Finish, next_token_arrays

_UINT8, _UINT16, _INT32, _INT64, _FLOAT16, _FLOAT32 = map(
    np.dtype, (np.uint8, np.uint16, np.int32, np.int64, np.float16, np.float32)
)

#: The logarithm of a probability may be this far above 0: it is a difference of two rounded numbers.
LARGEST_LOGPROB = 1e-3


@dataclass(frozen=True)
class LayerRows:
    """n rows of one layer as stored.

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
    def nbytes(self) -> int:
        """Of all arrays."""
        return sum(array.nbytes for array in vars(self).values())

    def copy(self) -> LayerRows:
        """A copy in its own memory."""
        return LayerRows(**{name: array.copy() for name, array in vars(self).items()})

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
    next_tokens: of the n rows, in a store that keeps them
    number: its place in the order of the prompts; None: the one after the highest in the store
    """

    token_id: np.ndarray
    next_token_id: np.ndarray
    position: np.ndarray
    flags: np.ndarray
    layers: Mapping[Site, LayerRows]
    tokens: np.ndarray
    prompt_size: int
    finish: Finish
    source: bytes
    next_tokens: NextTokens | None = None
    number: int | None = None


@dataclass(frozen=True)
class SequenceBatch:
    """k checked sequences, as flat arrays of all their n rows, t tokens and b source bytes.

    number, row_size, token_size, source_size: int64 [k]; prompt_size: int32 [k]; finish: uint8 [k]
    owner: int64 [n], which of the k sequences a row belongs to
    token_id, next_token_id, position: int32 [n]; flags: uint8 [n]; tokens: int32 [t]; source: uint8 [b]
    norm: float32 [n] for each site; exact_row: int64 [m] for each site, which of the n rows are also kept exactly
    next_tokens: the arrays of `NextTokens` by name, if the store keeps them
    The wide arrays are not copied: `rows` holds the layers of each sequence, or of all of them in one piece.
    """

    number: np.ndarray
    row_size: np.ndarray
    token_size: np.ndarray
    source_size: np.ndarray
    prompt_size: np.ndarray
    finish: np.ndarray
    owner: np.ndarray
    token_id: np.ndarray
    next_token_id: np.ndarray
    position: np.ndarray
    flags: np.ndarray
    tokens: np.ndarray
    source: np.ndarray
    norm: Mapping[Site, np.ndarray]
    exact_row: Mapping[Site, np.ndarray]
    rows: Sequence[Mapping[Site, LayerRows]]
    next_tokens: Mapping[str, np.ndarray]

    @classmethod
    def of(
        cls,
        sequences: Sequence[SequenceRows],
        layers: Sequence[Site | int],
        codec: Codec,
        first: int = 0,
        next_token: int | None = None,
    ) -> SequenceBatch:
        """One or more sequences. first: the number of the next one that is given none.

        next_token: as the store's manifest has it
        Raises StoreError unless shapes, types and values agree with layers, codec and each other.
        """
        sites = tuple(map(Site.at, layers))
        numbers: list[int] = []
        for sequence in sequences:
            numbers.append(first if sequence.number is None else sequence.number)
            first = max(first, numbers[-1] + 1)
        for number, sequence in zip(numbers, sequences, strict=True):
            try:
                _check_arrays(sequence, sites, codec)
                told = {} if sequence.next_tokens is None else vars(sequence.next_tokens)
                _check_next_tokens(told, next_token, len(sequence.position))
            except StoreError as error:
                raise StoreError(f"sequence {number}: {error}") from None

        def size(name: str) -> np.ndarray:
            return np.fromiter((len(getattr(s, name)) for s in sequences), np.int64, len(sequences))

        def joined(name: str) -> np.ndarray:
            return np.concatenate([getattr(sequence, name) for sequence in sequences])

        row_size = size("position")
        row_start = np.cumsum(row_size) - row_size
        batch = cls(
            number=np.array(numbers, np.int64),
            row_size=row_size,
            token_size=size("tokens"),
            source_size=size("source"),
            prompt_size=np.fromiter((s.prompt_size for s in sequences), np.int32, len(sequences)),
            finish=np.fromiter((int(s.finish) for s in sequences), np.uint8, len(sequences)),
            owner=np.repeat(np.arange(len(sequences)), row_size),
            token_id=joined("token_id"),
            next_token_id=joined("next_token_id"),
            position=joined("position"),
            flags=joined("flags"),
            tokens=joined("tokens"),
            source=np.frombuffer(b"".join(s.source for s in sequences), np.uint8),
            norm={site: np.concatenate([s.layers[site].norm for s in sequences]) for site in sites},
            exact_row={
                site: np.concatenate([s.layers[site].exact_index for s in sequences])
                + np.repeat(row_start, [len(s.layers[site].exact_index) for s in sequences])
                for site in sites
            },
            rows=[sequence.layers for sequence in sequences],
            next_tokens={
                name: np.concatenate([getattr(sequence.next_tokens, name) for sequence in sequences])
                for name in next_token_arrays(next_token)
            },
        )
        batch._check_values(codec)
        return batch

    @classmethod
    def of_block(
        cls,
        columns: Mapping[str, np.ndarray],
        rows: Mapping[Site, LayerRows],
        layers: Sequence[Site | int],
        codec: Codec,
        first: int = 0,
        next_token: int | None = None,
    ) -> SequenceBatch:
        """Sequences that lie end to end already.

        columns: by name, the arrays of this class with one entry per sequence, row, token or byte, except `owner`, and
            those of `next_tokens`; without `number` they are counted from `first`
        Raises StoreError as `of` does.
        """
        sites = tuple(map(Site.at, layers))
        sizes = {name: columns[name] for name in ("row_size", "token_size", "source_size")}
        k = len(columns["finish"])
        columns = {"number": np.arange(first, first + k), **columns}
        _check_array("number", columns["number"], _INT64, (k,))
        for name, size in sizes.items():
            _check_array(name, size, _INT64, (k,))
            if size.min(initial=0) < 0:
                raise StoreError(f"{name} is negative for a sequence")
        n, t, b = (int(size.sum()) for size in sizes.values())
        for name in ("token_id", "next_token_id", "position"):
            _check_array(name, columns[name], _INT32, (n,))
        _check_array("flags", columns["flags"], _UINT8, (n,))
        _check_array("tokens", columns["tokens"], _INT32, (t,))
        _check_array("source", columns["source"], _UINT8, (b,))
        _check_array("prompt_size", columns["prompt_size"], _INT32, (k,))
        _check_array("finish", columns["finish"], _UINT8, (k,))
        _check_layers(rows, sites, n, codec)
        told = {name: columns[name] for name in next_token_arrays(next_token)}
        _check_next_tokens(told, next_token, n)
        columns = {name: values for name, values in columns.items() if name not in told}
        texts, ends = columns["source"].tobytes(), np.cumsum(sizes["source_size"]).tolist()
        prompts = zip(columns["prompt_size"].tolist(), sizes["token_size"].tolist(), strict=True)
        finishes, start = set(map(int, Finish)), 0
        for number, end, (prompt, size), finish in zip(
            columns["number"].tolist(), ends, prompts, columns["finish"].tolist(), strict=True
        ):
            try:
                _check_sequence(prompt, size, texts[start:end])
                if finish not in finishes:
                    raise StoreError(f"finish {finish} is not known")
            except StoreError as error:
                raise StoreError(f"sequence {number}: {error}") from None
            start = end
        batch = cls(
            **columns,
            owner=np.repeat(np.arange(k), sizes["row_size"]),
            norm={site: rows[site].norm for site in sites},
            exact_row={site: rows[site].exact_index for site in sites},
            rows=[rows],
            next_tokens=told,
        )
        batch._check_values(codec)
        return batch

    def _check_values(self, codec: Codec) -> None:
        """How the arrays must agree, checked for all sequences at once."""

        def refuse(wrong: np.ndarray, owner: np.ndarray, fault: str) -> None:
            if wrong.any():
                number = int(self.number[owner[np.argmax(wrong)]])
                raise StoreError(f"sequence {number}: {fault}")

        owner, position, size = self.owner, self.position, self.token_size[self.owner]
        start = np.cumsum(self.token_size) - self.token_size
        descends = (np.diff(position, prepend=-1) <= 0) & (np.diff(owner, prepend=-1) == 0)
        refuse(
            (position < 0) | (position >= size) | descends,
            owner,
            "position is not ascending within the tokens",
        )
        place = start[owner] + position
        tokens = np.append(self.tokens, np.int32(NO_TOKEN))
        refuse(self.token_id != tokens[place], owner, "token_id does not hold tokens[position]")
        following = np.where(position == size - 1, NO_TOKEN, tokens[place + 1])
        fault = "next_token_id does not hold tokens[position + 1] (-1 after the last)"
        refuse(self.next_token_id != following, owner, fault)
        if self.next_tokens:
            fault = "next_logprob is no log-probability, or is one where no token follows"
            refuse(wrong_logprobs(self.next_tokens["next_logprob"], self.next_token_id), owner, fault)
        begin = np.cumsum(self.row_size) - self.row_size
        for layer, norm in self.norm.items():
            index = self.exact_row[layer]
            pieces = np.array([[len(rows[layer].norm), len(rows[layer].exact_index)] for rows in self.rows])
            holder, end = np.repeat(np.arange(len(pieces)), pieces[:, 1]), np.cumsum(pieces[:, 0])
            wrong = (index < (end - pieces[:, 0])[holder]) | (index >= end[holder])
            wrong |= (np.diff(index, prepend=-1) <= 0) & (np.diff(holder, prepend=-1) == 0)
            refuse(wrong, holder, f"{layer.label} exact_index is not ascending within its rows")
            if codec.name == "bf16":
                continue
            lost = ~ordinary_rows(norm) & (norm != 0)
            lost[index] = False
            row = np.argmax(lost) - begin[owner[np.argmax(lost)]] if lost.any() else 0
            refuse(lost, owner, f"{layer.label} row {row} has a norm that needs an exact copy")


def wrong_logprobs(logprob: np.ndarray, next_token_id: np.ndarray) -> np.ndarray:
    """bool [n]: where a log-probability, float32 [n], is above 0 by more than rounding, or belongs to no token.

    NaN is one that the model gave, if it computed with NaN.
    """
    return (logprob > LARGEST_LOGPROB) | ((next_token_id == NO_TOKEN) & ~np.isnan(logprob))


def _check_next_tokens(told: Mapping[str, np.ndarray], next_token: int | None, n: int) -> None:
    """Shapes and types, if the store keeps next tokens, of `next_token` likeliest; that there are none, if not."""
    if next_token is None:
        if told:
            raise StoreError("next tokens were given, and the store keeps none")
        return
    if not told:
        raise StoreError("the store keeps next tokens, and none were given")
    shapes = {"next_logprob": (_FLOAT32, (n,)), "top_id": (_INT32, (n, next_token))}
    shapes["top_logprob"] = (_FLOAT32, (n, next_token))
    for name, array in told.items():
        _check_array(name, array, *shapes[name])


def _check_arrays(sequence: SequenceRows, layers: Sequence[Site], codec: Codec) -> None:
    """Shapes, types and the prompt record of one sequence."""
    n, t = len(sequence.position), len(sequence.tokens)
    _check_array("tokens", sequence.tokens, _INT32, (t,))
    _check_array("token_id", sequence.token_id, _INT32, (n,))
    _check_array("next_token_id", sequence.next_token_id, _INT32, (n,))
    _check_array("position", sequence.position, _INT32, (n,))
    _check_array("flags", sequence.flags, _UINT8, (n,))
    _check_sequence(sequence.prompt_size, t, sequence.source)
    _check_layers(sequence.layers, layers, n, codec)


def _check_sequence(prompt_size: int, tokens: int, source: bytes) -> None:
    if not 0 <= prompt_size <= tokens:
        raise StoreError(f"prompt_size {prompt_size} does not fit a sequence of {tokens} tokens")
    try:
        json.loads(source.decode())
    except ValueError as error:
        raise StoreError(f"source is not UTF-8 JSON: {error}") from None


def _check_layers(held: Mapping[Site, LayerRows], layers: Sequence[Site], n: int, codec: Codec) -> None:
    """Shapes and types of n rows in every layer."""
    if held.keys() != set(layers):
        given, wanted = ([site.key for site in sorted(map(Site.at, each))] for each in (held, layers))
        raise StoreError(f"layers {given} were given, the store holds {wanted}")
    for layer in layers:
        rows = held[layer]
        m = len(rows.exact_index)
        _check_array("codes", rows.codes, codec.code_dtype, (n, codec.code_width), layer)
        _check_array("scales", rows.scales, _FLOAT16, (n, codec.scale_width), layer)
        _check_array("norm", rows.norm, _FLOAT32, (n,), layer)
        _check_array("exact_index", rows.exact_index, _INT64, (m,), layer)
        _check_array("exact", rows.exact, _UINT16, (m, codec.d_model), layer)


def _check_array(
    name: str, array: np.ndarray, dtype: np.dtype, shape: tuple[int, ...], layer: Site | None = None
) -> None:
    if array.dtype != dtype or array.shape != shape:
        where = "" if layer is None else f"{layer.label} "
        raise StoreError(
            f"{where}{name} is {array.dtype} {list(array.shape)}, it must be {dtype} {list(shape)}"
        )
