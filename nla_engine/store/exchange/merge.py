"""Stores with the same run parameters become one: the sequences of the first, then those of the next.

The numbers of the next go on after the highest of the first. Rows, tokens and prompt records are copied as stored;
nothing is decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nla_engine.errors import DamageError, StoreError
from nla_engine.sites import Site
from nla_engine.store.format import IMPORTED, next_token_arrays
from nla_engine.store.manifest import differences
from nla_engine.store.records import LayerRows
from nla_engine.store.sequences import TABLE_COLUMNS
from nla_engine.store.views.capture_store import CaptureStore
from nla_engine.store.writer import StoreWriter

#: Options in which the stores may differ: a merge puts different prompts together.
FREE_OPTIONS = ("prompts",)
#: Rows, and sequences, read at once.
BLOCK_ROWS = BLOCK_SEQUENCES = 4096
ROW_COLUMNS = ("token_id", "next_token_id", "position", "flags")


def merge(
    paths: Sequence[Path],
    out: Path,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> CaptureStore:
    """Write the committed sequences of several stores as a new one, complete if all of them are.

    progress(sequences done, sequences in all). If the stores have different sink norms, the result has the
    largest: every row above it is kept exactly, and some rows below it as well.
    Raises StoreError if fewer than two stores are given, their parameters differ, or a committed byte is damaged.
    """
    if len(paths) < 2:
        raise StoreError("give two or more stores to merge")
    if any(Path(out).resolve() == Path(path).resolve() for path in paths):
        raise StoreError(f"{out}: is one of the stores to merge: choose another name")
    stores = [CaptureStore.open(path) for path in paths]
    first = stores[0]
    for store in stores[1:]:
        if store.attributes["store_id"] in [
            other.attributes["store_id"] for other in stores if other is not store
        ]:
            raise StoreError(f"{store.path}: is given twice, or as a copy: name each store once")
        if changed := differences(_parameters(first), _parameters(store)):
            raise StoreError(
                f"{store.path}: its run differs from that of {first.path}: {'; '.join(changed)}: "
                "only stores of the same parameters can be merged"
            )
    writer = StoreWriter.create(
        out,
        layers=first.sites,
        codec=first.codec,
        sink_norm={layer: max(store.sink_norm[layer] for store in stores) for layer in first.sites},
        vocabulary=[first.vocabulary.raw(token) for token in range(len(first.vocabulary))],
        provenance={
            **{key: value for key, value in first.provenance.items() if key != "sequences_asked"},
            "merged_from": [_origin(store) for store in stores],
        },
        options={
            **_common_options(first),
            "merged": [store.attributes["store_id"] for store in stores],
            **({IMPORTED: True} if any(IMPORTED in store.options for store in stores) else {}),
        },
        next_token=first.next_token,
        overwrite=overwrite,
        shard_rows=first.attributes["shard_rows"],
    )
    done, total, first_number = 0, sum(store.sequences for store in stores), 0
    with writer:
        for layer in first.sites:
            if error := _joined_error([store.codec_error.get(layer) for store in stores]):
                writer.record_codec_error(layer, error)
        for store in stores:
            for columns, rows in _blocks(store, first_number):
                try:
                    writer.append_block(columns, rows)
                except StoreError as error:
                    raise DamageError(
                        f"{store.path}: damaged (sequences are counted as in {out}): {error}: run `nla-engine verify`"
                    ) from None
                done += len(columns["finish"])
                progress(done, total)
            first_number += int(store.numbers.max(initial=-1)) + 1
        writer.close(complete=all(store.complete for store in stores))
    return CaptureStore.open(out)


def _parameters(store: CaptureStore) -> dict[str, Any]:
    """What must agree, as JSON values."""
    vocabulary = store.vocabulary
    return {
        **_common_options(store),
        "layers": [site.key for site in store.sites],
        "codec": store.codec.to_dict(),
        "shard_rows": store.attributes["shard_rows"],
        "next_token": store.next_token,
        "vocabulary": {"size": len(vocabulary), "text": vocabulary.fingerprint()},
    }


def _common_options(store: CaptureStore) -> dict[str, Any]:
    free = (*FREE_OPTIONS, "merged", IMPORTED)
    return {key: value for key, value in store.options.items() if key not in free}


def _origin(store: CaptureStore) -> dict[str, Any]:
    about = store.attributes
    kept = ("store_id", "codec_error", "sink_norm", "commit", "dropped", "provenance", "options")
    return {"path": str(store.path), **{key: about[key] for key in kept}}


def _joined_error(errors: Sequence[Any]) -> dict[str, Any] | None:
    """Errors of several samples as one: mean weighted by rows, maximum of the others. None unless all were measured."""
    if not all(errors):
        return None
    rows = [error["rows"] for error in errors]
    worst = {
        name: max(e[name] for e in errors) for name in ("p99", "worst") if all(name in e for e in errors)
    }
    return {"mean": float(np.average([e["mean"] for e in errors], weights=rows)), **worst, "rows": sum(rows)}


def _blocks(
    store: CaptureStore, first_number: int
) -> Iterator[tuple[dict[str, np.ndarray], dict[Site, LayerRows]]]:
    """Every sequence as stored, in blocks of whole sequences, for `StoreWriter.append_block`.

    first_number: of the sequence that is number 0 in the store
    """
    table, rows = store.arrays("sequences"), store.arrays("rows")
    layers = {layer: store.layer(layer) for layer in store.sites}
    for first in range(0, store.sequences, BLOCK_SEQUENCES):
        last = min(first + BLOCK_SEQUENCES, store.sequences)
        known = {name: table[name].read(first, last) for name in TABLE_COLUMNS}
        known["number"] = table["number"].read(first, last) if "number" in table else np.arange(first, last)
        for part in _cuts(known["row_size"]):
            here = {name: values[part] for name, values in known.items()}
            spans = {
                name: (
                    int(here[f"{name}_start"][0]),
                    int(here[f"{name}_start"][-1] + here[f"{name}_size"][-1]),
                )
                for name in ("row", "token", "source")
            }
            columns = {name: here[name] for name in ("row_size", "token_size", "source_size")}
            columns |= {name: here[name] for name in ("prompt_size", "finish")}
            columns["number"] = here["number"] + first_number
            names = (*ROW_COLUMNS, *next_token_arrays(store.next_token))
            columns |= {name: rows[name].read(*spans["row"]) for name in names}
            columns["tokens"] = table["tokens"].read(*spans["token"])
            columns["source"] = table["source"].read(*spans["source"])
            yield columns, {number: layer.encoded(*spans["row"]) for number, layer in layers.items()}


def _cuts(sizes: np.ndarray) -> Iterator[slice]:
    """Runs of sequences with together at most BLOCK_ROWS rows, or of one longer sequence."""
    ends = np.cumsum(sizes)
    start = 0
    while start < len(sizes):
        before = ends[start] - sizes[start]
        stop = max(int(np.searchsorted(ends, before + BLOCK_ROWS, "right")), start + 1)
        yield slice(start, stop)
        start = stop
