"""Tables of one run with known scores, for the tests of comparisons: planted cos, patches, controls and claims."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from report_samples import Said, Text, make_run

KEY = b"nla_engine"


def planted_run(directory: Path, rng: np.random.Generator, sequences: int = 20, rows: int = 3) -> Path:
    """A table of `sequences` of `rows` rows with random cos; its store lies beside it."""
    said = [
        {place: [Said(f"text {s} {place}", float(rng.uniform(0.5, 0.9)))] for place in range(rows)}
        for s in range(sequences)
    ]
    texts = [Text(["a", "b", "c", "d", "e", "f"], each, 1, {"n": s}) for s, each in enumerate(said)]
    return make_run(directory, texts)[1]


def changed(path: Path, out: Path, keep: Any = None, metadata: Any = None, **columns: Any) -> Path:
    """A copy of a table with other columns, lines (indices, in any order) or metadata."""
    table = pq.read_table(path)
    made = json.loads(table.schema.metadata[KEY]) | (metadata or {})
    for name, values in columns.items():
        kind = table.schema.field(name).type if name in table.column_names else None
        column = pa.array(list(values), kind)
        at = table.column_names.index(name) if kind is not None else None
        table = table.append_column(name, column) if at is None else table.set_column(at, name, column)
    if keep is not None:
        table = table.take(pa.array(keep))
    pq.write_table(table.replace_schema_metadata({KEY: json.dumps(made)}), out)
    return out


def column(path: Path, name: str) -> np.ndarray:
    return pq.read_table(path)[name].to_numpy(zero_copy_only=False)


def patched(path: Path, out: Path, kl: np.ndarray, mean: np.ndarray, shuffled: np.ndarray) -> Path:
    """A table of patch with these KL."""
    ones = np.ones(len(kl))
    return changed(
        path,
        out,
        metadata={"made_by": "patch", "run": {"norm": "row", "horizon": 0}, "weights": "w", "model": "m"},
        kl=kl,
        kl_mean=mean,
        kl_shuffled=shuffled,
        loss_recovered=1 - kl / mean,
        top1_same=ones > 0,
        top1_same_shuffled=ones < 0,
        logprob_change=-kl,
        logprob_change_shuffled=-shuffled,
    )


def controls(path: Path, out: Path, **cos: np.ndarray) -> Path:
    """A table of controls: the lines of the table, and of each control with these cos."""
    table = pq.read_table(path)
    size = len(table)
    index = np.tile(np.arange(size), 1 + len(cos))
    return changed(
        changed(path, out, keep=index),
        out,
        control=np.repeat(["explained", *cos], size),
        of_row=np.tile(column(path, "row"), 1 + len(cos)),
        cos=np.concatenate([column(path, "cos"), *cos.values()]),
        sample=np.repeat(np.arange(1 + len(cos)), size),
    )


def patched_controls(path: Path, out: Path, mean: np.ndarray, **kl: np.ndarray) -> Path:
    """A table of patch on controls: KL of the explanations (`explained`) and of each control, line by line."""
    others = {name: column(path, "cos") for name in kl if name != "explained"}
    values = np.concatenate([kl["explained"], *(kl[name] for name in others)])
    wide = np.tile(mean, len(kl))
    return patched(controls(path, out, **others), out, values, wide, wide + 1)


def claims(path: Path, out: Path, each: int, holds: np.ndarray, control: np.ndarray) -> Path:
    """A table of claims with `each` claims per line, bool [lines, each], and one fact that is named."""
    table = pq.read_table(path).drop_columns(["explanation", "norm", "status", "n_tokens"])
    size = len(table)
    index = np.repeat(np.arange(size), each + 1)
    side = np.tile(["claim"] * each + ["fact"], size)
    padded = [np.concatenate([flags, np.ones((size, 1), bool)], 1).ravel() for flags in (holds, control)]
    pq.write_table(table, out)
    return changed(
        changed(out, out, keep=index),
        out,
        side=side,
        kind=np.full(len(index), "number"),
        holds=padded[0],
        holds_control=padded[1],
    )
