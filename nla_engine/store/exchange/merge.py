"""Stores with the same run parameters become one. Rows, tokens and prompt records stay as stored; nothing is decoded.

Stores of different prompts: the numbers of the next go on after the highest of the first. The parts of one run
(`capture --shard`), in any order: numbers stay, and the result is the store that one job would have made.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nla_engine.errors import DamageError, StoreError
from nla_engine.sites import Site
from nla_engine.store.exchange.link import Cut, append_linked, can_link, cut_of
from nla_engine.store.exchange.parts import SHARD, part_of, parts_in_order
from nla_engine.store.format import IMPORTED, next_token_arrays
from nla_engine.store.manifest import differences
from nla_engine.store.objects import place
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
    paths: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> CaptureStore:
    """Write the committed sequences of several stores as a new one, complete if all of them are.

    Where the file system has hard links, most rows are not copied: the new store shares the files (`exchange.link`).
    Their checksums are not read then. progress(sequences done, sequences in all). If the stores have different sink
    norms, the result has the largest: every row above it is kept exactly, and some rows below it as well.
    Raises StoreError if fewer than two stores are given, their parameters differ, parts of a run are missing, given
    twice or unfinished, or a byte that is copied is damaged.
    """
    target = _absolute(out)
    if any(target == _absolute(path) for path in paths):
        raise StoreError(f"{out}: is one of the stores to merge: choose another name")
    stores = [CaptureStore.open(path) for path in paths]
    if len(stores) < 2 and not any(map(part_of, stores)):
        raise StoreError("give two or more stores to merge")
    first, free = stores[0], () if any(map(part_of, stores)) else FREE_OPTIONS
    for store in stores[1:]:
        if store.attributes["store_id"] in [
            other.attributes["store_id"] for other in stores if other is not store
        ]:
            raise StoreError(f"{store.path}: is given twice, or as a copy: name each store once")
        if changed := differences(_parameters(first, free), _parameters(store, free)):
            raise StoreError(
                f"{store.path}: other parameters than those of {first.path}: {'; '.join(changed)}: "
                "only stores of the same parameters can be merged"
            )
    parts = parts_in_order(stores)
    stores = parts or stores
    first = stores[0]
    writer = StoreWriter.create(
        out,
        layers=first.sites,
        codec=first.codec,
        sink_norm={layer: max(store.sink_norm[layer] for store in stores) for layer in first.sites},
        vocabulary=[first.vocabulary.raw(token) for token in range(len(first.vocabulary))],
        provenance=_provenance(stores, bool(parts)),
        options=_common_options(first, ()) if parts else _merged_options(stores),
        next_token=first.next_token,
        overwrite=overwrite,
        shard_rows=first.attributes["shard_rows"],
    )
    done, total = 0, sum(store.sequences for store in stores)
    offsets = [0] * len(stores)
    if not parts:
        offsets = [0, *np.cumsum([int(store.numbers.max(initial=-1)) + 1 for store in stores[:-1]]).tolist()]
    with writer:
        for layer in first.sites:
            errors = [store.codec_error.get(layer) for store in stores]  # of parts, all of the same sample
            if error := errors[0] if parts else _joined_error(errors):
                writer.record_codec_error(layer, error)
        cuts = [_cut(store, writer) for store in stores]
        for store, offset, cut in zip(stores, offsets, cuts, strict=True):
            if cut.rows:
                append_linked(store, writer, cut, offset)
                done += cut.sequences
                progress(done, total)
        for store, offset, cut in zip(stores, offsets, cuts, strict=True):
            for columns, rows in _blocks(store, offset, cut.sequences):
                try:
                    writer.append_block(columns, rows)
                except StoreError as error:
                    raise DamageError(
                        f"{store.path}: damaged (sequences are counted as in {out}): {error}: run `nla-engine verify`"
                    ) from None
                done += len(columns["finish"])
                progress(done, total)
        writer.close(complete=all(store.complete for store in stores))
    return CaptureStore.open(out)


def _absolute(path: str | os.PathLike[str]) -> Path | str:
    found = place(path)
    return found.resolve() if isinstance(found, Path) else str(found)


def _cut(store: CaptureStore, writer: StoreWriter) -> Cut:
    """Which rows of a store need not be copied."""
    about = store.attributes
    if not can_link(store.path, writer.path) or about["narrow_shard_rows"] != writer.narrow_shard_rows:
        return Cut()
    return cut_of(store, writer.narrow_shard_rows)


def _provenance(stores: Sequence[CaptureStore], parts: bool) -> dict[str, Any]:
    first = dict(stores[0].provenance)
    asked = first.pop("sequences_asked", None)
    if parts:
        if asked is not None:
            first["sequences_asked"] = sum(store.sequences for store in stores)
        first["options"] = {**first.get("options", {}), SHARD: None}
    return {**first, "merged_from": [_origin(store, brief=parts) for store in stores]}


def _merged_options(stores: Sequence[CaptureStore]) -> dict[str, Any]:
    return {
        **_common_options(stores[0], FREE_OPTIONS),
        "merged": [store.attributes["store_id"] for store in stores],
        **({IMPORTED: True} if any(IMPORTED in store.options for store in stores) else {}),
    }


def _parameters(store: CaptureStore, free: tuple[str, ...]) -> dict[str, Any]:
    """What must agree, as JSON values. free: options that need not."""
    vocabulary = store.vocabulary
    return {
        **_common_options(store, free),
        "layers": [site.key for site in store.sites],
        "codec": store.codec.to_dict(),
        "shard_rows": store.attributes["shard_rows"],
        "next_token": store.next_token,
        "vocabulary": {"size": len(vocabulary), "text": vocabulary.fingerprint()},
    }


def _common_options(store: CaptureStore, free: tuple[str, ...]) -> dict[str, Any]:
    free = (*free, "merged", IMPORTED, SHARD)
    return {key: value for key, value in store.options.items() if key not in free}


def _origin(store: CaptureStore, brief: bool) -> dict[str, Any]:
    """Where a part of a merged store comes from. brief: without what all parts of a run have in common."""
    about, made = store.attributes, store.provenance
    kept = ("store_id", "codec_error", "sink_norm", "commit", "dropped", "provenance", "options")
    origin = {"path": str(store.path), **{key: about[key] for key in kept}}
    if brief:
        origin["provenance"] = {key: made[key] for key in ("started", "device") if key in made}
    return origin


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
    store: CaptureStore, first_number: int, begin: int = 0
) -> Iterator[tuple[dict[str, np.ndarray], dict[Site, LayerRows]]]:
    """The sequences stored from place `begin` on, in blocks of whole sequences, for `StoreWriter.append_block`.

    first_number: of the sequence that is number 0 in the store
    """
    table, rows = store.arrays("sequences"), store.arrays("rows")
    layers = {layer: store.layer(layer) for layer in store.sites}
    for first in range(begin, store.sequences, BLOCK_SEQUENCES):
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
