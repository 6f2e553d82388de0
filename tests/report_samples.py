"""Runs made by hand for the tests of the report page: a store, and the table of a round trip that never took place."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nla_engine.codec.rows import Codec
from nla_engine.provenance import describe_run
from nla_engine.roundtrip.results import ResultTable
from nla_engine.store import CaptureStore, Finish, LayerRows, SequenceRows, StoreWriter, row_flags

LAYER, WIDTH, VARIANCE, SINK_NORM = 3, 8, 0.8, 400.0


@dataclass(frozen=True)
class Said:
    """One explanation. cos: None for a vector without a direction."""

    text: str
    cos: float | None = 0.9
    status: str = "ok"
    cos_shuffled: float | None = 0.1
    rank: int | None = 1


@dataclass(frozen=True)
class Text:
    """A sequence. rows: place of a token -> its explanations; norms: place -> L2 norm (100 where none is given).

    number: of the sequence; None: the next
    """

    tokens: Sequence[str | bytes]
    rows: dict[int, Sequence[Said]]
    prompt: int = 0
    record: dict[str, Any] = field(default_factory=dict)
    finish: Finish = Finish.EOS
    norms: dict[int, float] = field(default_factory=dict)
    number: int | None = None


def make_run(
    directory: Path, sequences: Sequence[Text], complete: bool = True, **metadata: Any
) -> tuple[CaptureStore, Path]:
    """A store of just the explained rows, and the table. metadata: the table's entries to replace (in `run`: add)."""
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(t for s in sequences for t in s.tokens))}
    raw = [token if isinstance(token, bytes) else token.encode() for token in vocabulary]
    codec = Codec.named("bf16", WIDTH)
    directory.mkdir(exist_ok=True)
    writer = StoreWriter.create(
        directory / "run.zarr",
        layers=[LAYER],
        codec=codec,
        sink_norm={LAYER: SINK_NORM},
        vocabulary=raw,
        provenance={"model": "sample/model", "sampling": "greedy"},
        options={},
        commit_seconds=1e9,
    )
    for text in sequences:
        writer.append(_sequence(text, vocabulary, codec))
    writer.close(complete)
    store = CaptureStore.open(directory / "run.zarr")
    table = directory / "explained.parquet"
    _write_table(table, store, sequences, metadata)
    return store, table


def _sequence(text: Text, vocabulary: dict[str | bytes, int], codec: Codec) -> SequenceRows:
    tokens = np.array([vocabulary[token] for token in text.tokens], np.int32)
    position = np.array(sorted(text.rows), np.int32)
    norms = np.array([text.norms.get(int(place), 100.0) for place in position])
    x = np.zeros((len(position), WIDTH), np.float32)
    x[np.arange(len(x)), position % WIDTH] = norms
    return SequenceRows(
        token_id=tokens[position],
        next_token_id=np.append(tokens, np.int32(-1))[position + 1],
        position=position,
        flags=row_flags(position, text.prompt, len(tokens), norms > SINK_NORM, ~np.isfinite(norms)),
        layers={LAYER: LayerRows.encode(codec, x, SINK_NORM)},
        tokens=tokens,
        prompt_size=text.prompt,
        finish=text.finish,
        source=json.dumps(text.record).encode(),
        number=text.number,
    )


def _write_table(path: Path, store: CaptureStore, sequences: Sequence[Text], changes: dict[str, Any]) -> None:
    said = [list(s.rows[place]) for s in sequences for place in sorted(s.rows)]
    counts = [len(entries) for entries in said]
    row = np.repeat(np.arange(store.rows), counts)
    flat = [entry for entries in said for entry in entries]
    best = [
        i == max(range(len(entries)), key=lambda k: entries[k].cos or -2)
        for entries in said
        for i in range(len(entries))
    ]
    run = {
        "where": None,
        "limit": None,
        "samples": max(counts),
        "temperature": 0.0,
        "seed": 0,
        "max_new_tokens": 64,
        "variance": None,
        **changes.pop("run", {}),
    }
    metadata = {
        **describe_run(),
        "run": run,
        "av": "sample/av",
        "ar": "sample/ar",
        "injection_scale": None,
        "layer": LAYER,
        "variance": VARIANCE,
        "variance_rows": store.rows,
        "control_rows": min(1024, store.rows),
        "control_vectors": min(1024, store.rows),
    }
    table = ResultTable.open(
        path,
        options={"store": store.attributes["store_id"]},
        resume=False,
        overwrite=False,
    )
    flags = store.column("flags")[row]
    nothing = [None] * len(row)
    table.append(
        {
            "row": row,
            "sequence": store.column("sequence")[row],
            "position": store.column("position")[row],
            "token": store.token_text(store.column("token_id")[row]),
            "next_token": store.token_text(store.column("next_token_id")[row]),
            "generated": flags & 1 != 0,
            "early": flags & 8 != 0,
            "norm": store.layer(LAYER).norm()[row],
            "sample": np.concatenate([np.arange(count) for count in counts]),
            "best": best,
            "explanation": [entry.text for entry in flat],
            "status": [entry.status for entry in flat],
            "n_tokens": [len(entry.text.split()) for entry in flat],
            "cos": [entry.cos for entry in flat],
            "mse_nrm": nothing,
            "cos_shuffled": [entry.cos_shuffled for entry in flat],
            "retrieval_rank": [entry.rank for entry in flat],
        }
    )
    table.finish(
        {**metadata, **changes},
        lambda part: {name: [None] * len(part) for name in ("fve_nrm", "fve_meannorm")},
    )


def cos_of(fve: float) -> float:
    """The cos at which FVE is `fve`."""
    return 1 - (1 - fve) * VARIANCE / 2


def large_run(directory: Path, rows: int, tokens: int = 50, words: int = 100) -> tuple[CaptureStore, Path]:
    """`rows` rows in sequences of `tokens`, half of them prompt rows, each explained in `words` words."""
    rng = np.random.default_rng(0)
    dictionary = [
        "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), size)) for size in rng.integers(2, 11, 4000)
    ]
    frequency = 1 / np.arange(1, len(dictionary) + 1)  # as in natural language
    frequency /= frequency.sum()
    names = [f" {word}" for word in dictionary[:500]]
    sequences = []
    for number in range(rows // tokens):
        fve = np.clip(rng.normal(0.7, 0.2, tokens), -1, 1)
        picked = rng.choice(len(dictionary), (tokens, words), p=frequency)
        said = {
            place: [
                Said(
                    " ".join(dictionary[i] for i in picked[place]),
                    cos=cos_of(float(fve[place])),
                    cos_shuffled=float(rng.normal(0.2, 0.1)),
                    rank=int(rng.geometric(0.5)),
                )
            ]
            for place in range(tokens)
        }
        norms = dict(enumerate(rng.lognormal(5, 0.3, tokens)))
        text = [names[i] for i in rng.integers(0, len(names), tokens)]
        sequences.append(Text(text, said, tokens // 2, {"n": number, "even": number % 2 == 0}, norms=norms))
    return make_run(directory, sequences)
