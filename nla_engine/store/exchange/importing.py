"""Vectors of other tools become a store: Parquet with an `activation_vector`, safetensors shards, npy.

What the file says of sequences, positions and tokens stands in the store's own columns; its other columns become the
records of the sequences, so `--where "record.doc_id == 'x'"` finds them.
What `nla_engine.store.exchange.export` writes can be read here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nla_engine.codec.rows import SINK_FACTOR, Codec, describe_errors, ordinary_rows, relative_errors
from nla_engine.errors import RequestError, StoreError
from nla_engine.provenance import describe_run
from nla_engine.sites import EMBEDDINGS, PARTS, RESID_POST, Site
from nla_engine.store.exchange.columns import checked
from nla_engine.store.exchange.export import INDEX_NAME, SIDECAR_SUFFIX, VECTOR_COLUMN
from nla_engine.store.exchange.record_columns import JSON_TEXT
from nla_engine.store.exchange.rows_of_files import SITE, Batch, FileRows, whole_sequences
from nla_engine.store.exchange.token_texts import token_texts
from nla_engine.store.exchange.vectors import BATCH_ROWS, read_vectors, unreadable
from nla_engine.store.format import IMPORTED, RowFlag, flagged
from nla_engine.store.records import LayerRows
from nla_engine.store.writer import StoreWriter

if TYPE_CHECKING:
    import pyarrow as pa

#: The largest bfloat16; float32 has somewhat larger ones.
_LARGEST = (2 - 2.0**-7) * 2.0**127
#: Types of which JSON can hold every value.
_PLAIN = {str, int, bool, type(None)}


@dataclass(frozen=True)
class Imported:
    """What `import_rows` did. layer: a number, or the text of a site that is no block's output."""

    rows: int
    d_model: int
    layer: int | str
    codec: str
    codec_error: dict[str, float | int]
    nonfinite_rows: int


def import_rows(
    source: Path,
    out: Path,
    *,
    layer: int | None = None,
    site: str | None = None,
    codec: str = "bf16",
    overwrite: bool = False,
) -> Imported:
    """Write the vectors of a file, or of a directory of shards, as a new store.

    layer, site: what they are of; None for what the file or its sidecar names, else for the block's output
    Raises StoreError (nothing to read, damaged, `out` exists), RequestError (no layer, unknown codec), WriteError.
    """
    files = source_files(source)
    sidecar = _sidecar(source)
    batches = chain.from_iterable(_reader(file)(file) for file in files)
    first = next((batch for batch in batches if len(batch.records)), None)
    if first is None:
        raise StoreError(f"{source}: holds no rows")
    number = _site(source, layer, site, first, sidecar)
    chosen = Codec.named(codec, first.vectors.shape[1])
    norm = np.linalg.norm(first.vectors.astype(np.float64), axis=1)
    ordinary = ordinary_rows(norm)
    sink_norm = float(np.float32(SINK_FACTOR * np.median(norm[ordinary]))) if ordinary.any() else np.inf
    error = relative_errors(chosen, first.vectors[ordinary & (norm <= sink_norm)])
    told = FileRows(first.records[0], number, source)
    read = _alike(chain([first], _read_ahead(batches)), chosen.d_model, told.numbered, source)

    def blocks() -> Iterator[tuple[dict[str, np.ndarray], LayerRows]]:
        for batch in whole_sequences(read) if told.numbered else read:
            rows = LayerRows.encode(chosen, batch.vectors, sink_norm)
            yield told.columns(batch, rows.norm, sink_norm), rows

    made = blocks()
    begun = list(islice(made, 2))  # what is wrong with a small file is told before anything is written
    writer = StoreWriter.create(
        out,
        layers=[number],
        codec=chosen,
        sink_norm={number: sink_norm},
        vocabulary=token_texts(files),
        provenance={**describe_run(), "imported_from": str(source), "sidecar": sidecar},
        options={IMPORTED: str(source), "layer": [number.key], "codec": codec},
        next_token=told.next_token,
        overwrite=overwrite,
    )
    nonfinite = 0
    with writer:
        if len(error):
            writer.record_codec_error(number, describe_errors(error))
        for columns, rows in chain(begun, made):
            writer.append_block(columns, {number: rows})
            nonfinite += int(np.count_nonzero(flagged(columns["flags"], RowFlag.NONFINITE)))
    described = describe_errors(error) if len(error) else {}
    return Imported(writer.rows, chosen.d_model, number.key, codec, described, nonfinite)


def _site(source: Path, given: int | None, part: str | None, first: Batch, sidecar: dict[str, Any]) -> Site:
    """What the vectors are of. A file that names a layer and no site holds the output of its block."""
    if part is not None and part not in PARTS:
        raise RequestError(f"--site is {part!r}: it must be one of {', '.join(PARTS)}")
    layer = _layer(source, EMBEDDINGS in (part, first.records[0].get(SITE)), given, first, sidecar)
    named = first.records[0].get("activation_layer") is not None
    told = first.records[0].get(SITE, RESID_POST if named else None)
    if told is not None and told not in PARTS:
        raise StoreError(f"{source}: {SITE} is {told!r}: it must be one of {', '.join(PARTS)}")
    if part is not None and told not in (None, part):
        raise RequestError(f"{source}: its vectors are {told}, not {part}: leave --site out")
    return Site.at(layer, part or told or RESID_POST)


def _layer(source: Path, embeddings: bool, given: int | None, first: Batch, sidecar: dict[str, Any]) -> int:
    extraction = sidecar.get("extraction")
    told = first.records[0].get("activation_layer")
    if told is None and isinstance(extraction, dict):
        told = extraction.get("layer_index")
    width = extraction.get("d_model") if isinstance(extraction, dict) else None
    if width is not None and width != first.vectors.shape[1]:
        raise StoreError(
            f"{source}: its sidecar says d_model {width}, its vectors have {first.vectors.shape[1]}: "
            "they do not belong together"
        )
    number = (0 if embeddings and given is None else given) if told is None else told
    if number is None:
        raise RequestError(f"{source}: does not say which layer its vectors are of: give --layer")
    if given is not None and given != number:
        raise RequestError(f"{source}: its vectors are of layer {number}, not {given}: leave --layer out")
    if not isinstance(number, int) or isinstance(number, bool):
        raise StoreError(f"{source}: layer {number!r} is not a number")
    return number


def _sidecar(source: Path) -> dict[str, Any]:
    """The contents of `SOURCE.nla_meta.yaml`, {} if there is none."""
    import yaml

    path = source.with_name(source.name + SIDECAR_SUFFIX)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise unreadable(path, "YAML", error) from None
    if not isinstance(data, dict):
        raise StoreError(f"{path}: not a mapping of keys to values")
    return json.loads(json.dumps(data, default=str))


# ---- files ----


def _alike(batches: Iterator[Batch], width: int, numbered: bool, source: Path) -> Iterator[Batch]:
    """The same batches. StoreError for one of another width, or one that numbers its sequences where others do not."""
    for batch in batches:
        if batch.vectors.shape[1] != width:
            raise StoreError(
                f"{source}: rows are {width} wide, and later ones {batch.vectors.shape[1]}: import files of one width"
            )
        if batch.records and ("sequence" in batch.records[0]) != numbered:
            raise StoreError(
                f"{source}: some of its files have a column 'sequence', others do not: import them apart"
            )
        yield batch


def _read_ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches; while the caller uses one, a thread reads the next."""
    with ThreadPoolExecutor(1, thread_name_prefix="import-reader") as pool:
        following = pool.submit(next, batches, None)
        while (batch := following.result()) is not None:
            following = pool.submit(next, batches, None)
            yield batch


def source_files(source: Path) -> list[Path]:
    """The files of a source in order: itself, those that its index names, or the Parquet files below it."""
    if not source.exists():
        raise StoreError(f"{source}: there is no such file or directory")
    if source.is_file():
        return [source]
    index = source / INDEX_NAME
    if index.exists():
        try:
            names = [str(shard["file"]) for shard in json.loads(index.read_bytes())["shards"]]
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{index}: damaged: {type(error).__name__} {error}") from None
        if outside := [name for name in names if Path(name).name != name]:
            raise StoreError(f"{index}: names '{outside[0]}', which is not a file beside it")
        return [source / name for name in names]
    files = sorted(source.rglob("*.parquet"))
    if not files:
        raise StoreError(f"{source}: holds neither {INDEX_NAME} nor Parquet files: nothing to import")
    return files


def _reader(file: Path) -> Callable[[Path], Iterator[Batch]]:
    readers = {".parquet": _read_parquet, ".safetensors": _read_safetensors, ".npy": _read_npy}
    if file.suffix not in readers:
        raise StoreError(f"{file}: not one of {', '.join(readers)}: nothing else can be imported")
    return readers[file.suffix]


def _read_parquet(file: Path) -> Iterator[Batch]:
    read = 0
    for batch in read_vectors(file, VECTOR_COLUMN, others=True):
        told = batch.metadata
        more = _told(told.get(b"layer", b"").decode() if b"nla_engine" in told else "")
        rows = _rows(batch.others, file)
        for name in _json_columns(batch.others):
            for row in rows:
                row[name] = row[name] if row[name] is None else _parsed(row[name], file, name)
        records = enumerate(rows, read)
        read += len(batch.vectors)
        yield Batch(
            _float32(batch.vectors, file),
            [checked(_plain(more | record), file, row) for row, record in records],
        )


def _json_columns(batch: pa.RecordBatch) -> list[str]:
    """The columns whose text is JSON, as `record_columns` writes it."""
    return [field.name for field in batch.schema if JSON_TEXT.items() <= (field.metadata or {}).items()]


def _parsed(text: str, file: Path, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise StoreError(f"{file}: column '{name}' says it is JSON, and is not: drop the column") from None


def _rows(batch: pa.RecordBatch, file: Path) -> list[dict[str, Any]]:
    """The rows as Python values. StoreError names a column with a value that Python has no type for."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            try:
                column.to_pylist()
            except (ValueError, OverflowError) as error:
                reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
                raise StoreError(f"{file}: column '{name}' cannot be read ({reason}): drop it") from None
        raise


def _read_safetensors(file: Path) -> Iterator[Batch]:
    """The tensor `activation` [n, d], and every other tensor with one value per row."""
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as tensors:
            names = list(tensors.keys())
            if "activation" not in names:
                raise StoreError(f"{file}: has no tensor 'activation': it has {', '.join(names)}")
            vectors = tensors.get_slice("activation")
            shape = vectors.get_shape()
            if len(shape) != 2 or not shape[1]:
                raise StoreError(f"{file}: 'activation' has shape {shape}, not [rows, d_model]")
            columns = {name: tensors.get_tensor(name) for name in names if name != "activation"}
            columns = {
                name: values.tolist() for name, values in columns.items() if values.shape == (shape[0],)
            }
            more = _told((tensors.metadata() or {}).get("layer", ""))
            for start in range(0, shape[0], BATCH_ROWS):
                held = vectors[start : start + BATCH_ROWS]
                wide = torch.float64 if held.dtype == torch.float64 else torch.float32
                part = _float32(held.to(wide).numpy(), file)
                rows = range(start, start + len(part))
                records = [_plain({k: v[i] for k, v in columns.items()} | more) for i in rows]
                yield Batch(part, [checked(one, file, i) for i, one in zip(rows, records, strict=True)])
    except (SafetensorError, OSError) as error:
        raise unreadable(file, "safetensors", error) from None


def _read_npy(file: Path) -> Iterator[Batch]:
    try:
        values = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError) as error:
        raise unreadable(file, "npy", error) from None
    if values.ndim != 2 or values.dtype.kind != "f" or not values.shape[1]:
        raise StoreError(f"{file}: {values.dtype} {list(values.shape)}, not floating-point [rows, d_model]")
    for start in range(0, len(values), BATCH_ROWS):
        part = _float32(np.asarray(values[start : start + BATCH_ROWS]), file)
        yield Batch(part, [{"row": start + i} for i in range(len(part))])


def _float32(values: np.ndarray, file: Path) -> np.ndarray:
    """A copy of values [n, d] in float32. Raises StoreError if a finite value is too large for some codec."""
    inside = not values.size or max(values.max(), -values.min()) <= _LARGEST  # also false for NaN
    if not inside and (np.isfinite(values) & (np.abs(values) > _LARGEST)).any():
        raise StoreError(
            f"{file}: holds a number beyond {_LARGEST:.4g}, the largest of bfloat16: scale the vectors"
        )
    return values.astype(np.float32)


def _told(text: str) -> dict[str, Any]:
    """The site that the file's metadata names, as fields for each record; {} if it names none."""
    try:
        site = Site.parse(text)
    except ValueError:
        return {}
    return {"activation_layer": site.layer} | ({} if site.part == RESID_POST else {SITE: site.part})


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    """A record as strict JSON: bytes left out, NaN and Inf as null, dates as text."""
    if all(type(value) in _PLAIN for value in record.values()):
        return record
    kept = {key: value for key, value in record.items() if not isinstance(value, bytes)}
    return json.loads(json.dumps(kept, default=str), parse_constant=lambda name: None)
