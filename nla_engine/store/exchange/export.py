"""Rows of a store as files that other tools read: Parquet, safetensors or npy; one file, or shards with an index.

    parquet      every row column, the next tokens if they were stored, the fields of the prompt records as record.KEY,
                 and the vector
    nla          the Parquet of NLA training data, with its YAML sidecar beside it
    datasets     shards of Parquet as Hugging Face `datasets` finds them: OUT/data/train-00000-of-00004.parquet
    safetensors  the vectors, the numeric columns, and the fields of the prompt records that are numbers
    npy          the vectors alone

Files are written in batches, so memory stays bounded, to a temporary name that is renamed last.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nla_engine.errors import RequestError, StoreError
from nla_engine.models.documents import WINDOW
from nla_engine.sites import RESID_POST, Site
from nla_engine.store.directory import check_parents
from nla_engine.store.exchange.next_tokens import next_token_fields, next_token_values
from nla_engine.store.exchange.record_columns import RecordColumns
from nla_engine.store.exchange.token_texts import text_column
from nla_engine.store.format import IMPORTED, NO_TOKEN, RowFlag, flagged, next_token_arrays
from nla_engine.store.lease import Lease
from nla_engine.store.sequences import StoredSequence
from nla_engine.store.shards import make_directory, replacing, writing
from nla_engine.store.views.capture_store import CaptureStore, LayerReader

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIXES = {
    "parquet": ".parquet",
    "nla": ".parquet",
    "datasets": ".parquet",
    "safetensors": ".safetensors",
    "npy": ".npy",
}
FORMATS = tuple(SUFFIXES)
#: Endings that a directory of shards does not have: other programs would take it for a file.
FILE_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", *SUFFIXES.values())
#: Names that `nla_engine.store.exchange.importing` looks for.
INDEX_NAME = "index.json"
SIDECAR_SUFFIX = ".nla_meta.yaml"
VECTOR_COLUMN = "activation_vector"
#: Version of the sidecars that the reader of NLA training data knows.
NLA_SCHEMA_VERSION = 1
BATCH_BYTES = 32 << 20
#: Default bytes of vectors per file of the datasets format: what the Hub advises for a shard.
DATASETS_SHARD_BYTES = 500 << 20
#: Types of tensors, as safetensors calls them.
_SAFE_TYPES = {"int32": "I32", "int64": "I64", "float32": "F32", "float64": "F64", "bool": "BOOL"}
INTEGER_COLUMNS = ("sequence", "position", "token_id", "next_token_id")


@dataclass(frozen=True)
class _Selection:
    """Rows (int64, ascending) of one layer. records: the fields of their prompt records; None for npy and nla."""

    store: CaptureStore
    site: Site
    layer: LayerReader
    rows: np.ndarray
    records: RecordColumns | None

    def batches(self) -> Iterator[np.ndarray]:
        """The row numbers, in batches of BATCH_BYTES of vectors."""
        size = max(1, BATCH_BYTES // (4 * self.store.d_model))
        for start in range(0, len(self.rows), size):
            yield self.rows[start : start + size]

    def metadata(self) -> dict[str, str]:
        """What the numbers mean, for the metadata of the file."""
        attributes = self.store.attributes
        return {
            "nla_engine": json.dumps({key: value for key, value in attributes.items() if key != "options"}),
            "layer": str(self.site),
        }


def export(
    store: CaptureStore,
    to: str,
    out: str | os.PathLike[str],
    layer: int | None = None,
    site: str | None = None,
    where: str | None = None,
    overwrite: bool = False,
    shard_rows: int | None = None,
    announce: Callable[[str], None] = lambda text: None,
) -> int:
    """Write vectors (float32) and, except for npy, their row columns; returns the number of rows.

    to: one of FORMATS; layer: None for the store's only one; site: None for the block's output
    where: None for every row
    shard_rows: rows per file; `out` is then a directory. None: one file (datasets: files of about 500 MB)
    Raises RequestError (unknown format, bad shard_rows), StoreError (nothing selected; `out` exists or lies in a store;
    several layers and none named), WriteError.
    """
    if to not in FORMATS:
        raise RequestError(f"export format '{to}' is unknown: choose one of {', '.join(FORMATS)}")
    if shard_rows is not None and (shard_rows < 1 or to == "nla"):
        raise RequestError(
            "shard_rows must be 1 or more"
            if shard_rows < 1
            else "format nla is one file: leave --shard-rows out"
        )
    path = Path(out)
    if path.is_dir() or (path.exists() and not overwrite):
        mend = "a directory, which is never replaced: remove it, or choose another name"
        raise StoreError(f"{path} exists: " + (mend if path.is_dir() else "pass --overwrite"))
    check_parents(path)
    chosen = store.chosen_layer(layer, site)
    if to == "nla" and chosen.part != RESID_POST:
        raise RequestError(
            f"format nla has no word for {chosen.part}, it holds outputs of blocks: choose another one"
        )
    rows = np.arange(store.rows) if where is None else store.where(where)
    if len(rows) == 0:
        raise StoreError(
            f"{store.path}: " + ("holds no rows" if where is None else f"no row fits {where!r}: widen it")
        )
    if to == "datasets" and shard_rows is None:
        shard_rows = max(DATASETS_SHARD_BYTES // (4 * store.d_model), 1)
    if shard_rows is not None and path.suffix in FILE_SUFFIXES:
        raise StoreError(f"{path}: ends in {path.suffix}, and shards lie in a directory: choose another name")
    records = None if to in ("npy", "nla") else RecordColumns(store, store.column("sequence")[rows])
    selection = _Selection(store, chosen, store.layer(chosen), rows, records)
    if records is not None and to == "safetensors":
        left = [field.name for field in records.fields if field not in _numeric(records)]
        if left:
            announce(f"left out, as {to} holds complete columns of numbers alone: {', '.join(left)}")
    if shard_rows is None and path.suffix != SUFFIXES[to]:
        raise StoreError(f"{path}: a file of format {to} ends in {SUFFIXES[to]}: readers need this ending")
    write = _WRITERS[to]
    with writing(path):
        make_directory(path.parent)
    with Lease.beside(path):
        with replacing(path) as temporary:
            if shard_rows is not None:
                _write_shards(selection, to, temporary, shard_rows)
            else:
                write(selection, temporary)
        if to == "nla":
            with replacing(path.with_name(path.name + SIDECAR_SUFFIX)) as temporary:
                temporary.write_text(_nla_sidecar(selection), encoding="utf-8")
    return len(rows)


def _write_shards(selection: _Selection, to: str, directory: Path, shard_rows: int) -> None:
    """Numbered files of `shard_rows` rows. An index names them in order, except for datasets, which needs none."""
    starts = range(0, len(selection.rows), shard_rows)
    folder, stem = (directory / "data", "train") if to == "datasets" else (directory, "rows")
    folder.mkdir(parents=True)
    shards = []
    for number, start in enumerate(starts):
        part = replace(selection, rows=selection.rows[start : start + shard_rows])
        name = f"{stem}-{number:05d}-of-{len(starts):05d}{SUFFIXES[to]}"
        _WRITERS[to](part, folder / name)
        shards.append({"file": name, "start": start, "rows": len(part.rows)})
    if to != "datasets":
        index = {
            "format": to,
            "rows": len(selection.rows),
            "shards": shards,
            "metadata": selection.metadata(),
        }
        (directory / INDEX_NAME).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _write_parquet(selection: _Selection, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    width = selection.store.d_model
    flags = [(str(flag.name).lower(), pa.bool_()) for flag in RowFlag]
    fields = [("row", pa.int64()), ("sequence", pa.int64()), ("position", pa.int32())]
    fields += [("token_id", pa.int32()), ("next_token_id", pa.int32())]
    fields += [("token", pa.string()), ("next_token", pa.string()), *flags, ("norm", pa.float32())]
    assert selection.records is not None
    fields += selection.records.fields
    fields += next_token_fields(selection.store)
    fields += [(VECTOR_COLUMN, pa.list_(pa.float32(), width))]
    schema = pa.schema(fields, metadata=selection.metadata())
    with pq.ParquetWriter(path, schema) as writer:
        for rows in selection.batches():
            writer.write_table(_parquet_batch(selection, rows, schema))


def _write_nla(selection: _Selection, path: Path) -> None:
    """One row per vector: how many tokens were read, and their text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    store = selection.store
    schema = pa.schema(
        [
            ("n_raw_tokens", pa.int64()),
            ("detokenized_text_truncated", pa.string()),
            (VECTOR_COLUMN, pa.list_(pa.float32(), store.d_model)),
            ("activation_layer", pa.int64()),
            ("doc_id", pa.string()),
        ]
    )
    with pq.ParquetWriter(path, schema) as writer:
        for rows in selection.batches():
            read = store.column("position")[rows] + 1
            numbers = store.column("sequence")[rows].tolist()
            sequences = {each.number: each for each in store.some_sequences(list(dict.fromkeys(numbers)))}
            documents = [sequences[number] for number in numbers]
            texts = [_text_read(store, *pair) for pair in zip(documents, read.tolist(), strict=True)]
            columns = [
                pa.array(read, pa.int64()),
                pa.array(texts, pa.string()),
                pa.FixedSizeListArray.from_arrays(pa.array(selection.layer[rows].reshape(-1)), store.d_model),
                pa.array([selection.site.layer] * len(rows), pa.int64()),
                pa.array([_document(store, sequence) for sequence in documents], pa.string()),
            ]
            writer.write_table(pa.table(columns, schema=schema))


def _text_read(store: CaptureStore, sequence: StoredSequence, tokens: int) -> str | None:
    """What the model had read: the text of the tokens. Of an imported store the record's text, or null."""
    if IMPORTED in store.options and "detokenized_text_truncated" in sequence.source:
        told = sequence.source["detokenized_text_truncated"]
        return None if told is None else str(told)
    if (sequence.tokens[:tokens] == NO_TOKEN).any():
        return None
    return sequence.vocabulary.join(sequence.tokens[:tokens])


def _document(store: CaptureStore, sequence: StoredSequence) -> str:
    """The record's own doc_id or id, else a number: of the sequence, or one for all windows of a document."""
    record = sequence.source if isinstance(sequence.source, dict) else {}
    told = [record.get(name) for name in ("doc_id", "id")]
    if _has_windows(store):
        window = record[WINDOW]
        # Merged stores count their documents each for itself: there it is the number of the first window.
        told.append(sequence.number - window["window"] if "merged" in store.options else window["document"])
    return str(next((name for name in told if name is not None), sequence.number))


def _has_windows(store: CaptureStore) -> bool:
    """Whether its sequences are windows of documents, as capture splits them."""
    return store.options.get("long") == "windows"


def _corpus_size(store: CaptureStore) -> int:
    """How many documents its sequences are of."""
    if not _has_windows(store):
        return store.sequences
    return sum(sequence.source[WINDOW]["window"] == 0 for sequence in store.iter_sequences())


def _nla_sidecar(selection: _Selection) -> str:
    """What the reader of NLA training data needs. Under `extraction` it accepts these keys and no others."""
    import yaml

    store, number = selection.store, selection.site.layer
    owners, sizes = np.unique(store.column("sequence")[selection.rows], return_counts=True)
    documents: Counter[str] = Counter()
    for owner, size in zip(store.some_sequences(owners), sizes.tolist(), strict=True):
        documents[_document(store, owner)] += size
    rows = hashlib.sha256(selection.rows.astype("<i8").tobytes()).hexdigest()[:8]
    extraction = {
        "base_model": str(store.provenance.get("model", "unknown")),
        "d_model": store.d_model,
        "layer_index": number,
        "norm": "none",
        "corpus": str(store.options.get("prompts", "unknown")),
        "corpus_slice": {"start": 0, "length": _corpus_size(store)},
        "positions_per_doc": max(documents.values()),
    }
    if (
        IMPORTED in store.options
    ):  # a row is a sequence here; what the imported file's sidecar says is still true
        told = (store.provenance.get("sidecar") or {}).get("extraction")
        told = told if isinstance(told, dict) else {}
        extraction["corpus_slice"] = {"start": 0, "length": len(documents)}
        extraction |= {key: told[key] for key in ("base_model", "corpus", "corpus_slice") if told.get(key)}
    return str(
        yaml.safe_dump(
            {
                "kind": "nla_dataset",
                "schema_version": NLA_SCHEMA_VERSION,
                "dataset_id": f"{store.attributes['store_id']}_L{number}_{rows}",
                "stage": "base",
                "row_count": len(selection.rows),
                "created_by": "nla_engine export",
                "created_at": store.commit.time,
                "extraction": extraction,
                "codec": store.codec.name,
            },
            sort_keys=False,
        )
    )


def _parquet_batch(selection: _Selection, rows: np.ndarray, schema: pa.Schema) -> pa.Table:
    import pyarrow as pa

    store = selection.store
    encoded = selection.layer.encoded_at(rows)
    vectors = encoded.decode(store.codec)
    columns = {"row": rows, "norm": encoded.norm}
    columns |= {name: store.column(name)[rows] for name in INTEGER_COLUMNS}
    texts = {name: text_column(store, columns[f"{name}_id"]) for name in ("token", "next_token")}
    flags = store.column("flags")[rows]
    truths = {str(flag.name).lower(): flagged(flags, flag) for flag in RowFlag}
    flat = pa.array(vectors.reshape(-1))
    vector_column = {"activation_vector": pa.FixedSizeListArray.from_arrays(flat, store.d_model)}
    assert selection.records is not None
    about = zip(selection.records.fields, selection.records.arrays(columns["sequence"]), strict=True)
    arrays = columns | texts | truths | vector_column | {field.name: values for field, values in about}
    arrays |= next_token_values(store, rows)
    made = (arrays[field.name] for field in schema)
    return pa.table(
        [v if isinstance(v, pa.Array) else pa.array(v, f.type) for v, f in zip(made, schema, strict=True)],
        schema=schema,
    )


def _numeric(records: RecordColumns) -> list[pa.Field]:
    """The columns that a tensor can hold: fractions, NaN where a record has none, and what else each record has."""
    return [
        field
        for field in records.fields
        if str(field.type) == "double" or (str(field.type) in ("int64", "bool") and records.is_whole(field))
    ]


def _record_tensors(selection: _Selection) -> dict[str, np.ndarray]:
    """int64, float64 or bool [n] by name."""
    assert selection.records is not None
    numeric = _numeric(selection.records)
    made = selection.records.arrays(selection.store.column("sequence")[selection.rows])
    return {
        field.name: values.to_numpy(zero_copy_only=False)
        for field, values in zip(selection.records.fields, made, strict=True)
        if field in numeric
    }


def _write_safetensors(selection: _Selection, path: Path) -> None:
    """Header length (8 bytes), JSON header, raw tensors. The library's own writer needs everything in memory."""
    rows, store = selection.rows, selection.store
    tensors = {"row": rows} | {name: store.column(name)[rows] for name in INTEGER_COLUMNS}
    tensors |= {name: store.column(name)[rows] for name in next_token_arrays(store.next_token)}
    tensors |= _record_tensors(selection)
    header: dict[str, object] = {"__metadata__": selection.metadata()}
    shape = [len(rows), store.d_model]
    end = 4 * len(rows) * store.d_model
    header["activation"] = {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}
    for name, values in sorted(tensors.items(), key=lambda item: -item[1].itemsize):
        dtype = _SAFE_TYPES[values.dtype.name]
        header[name] = {
            "dtype": dtype,
            "shape": list(values.shape),
            "data_offsets": [end, end + values.nbytes],
        }
        end += values.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for batch in selection.batches():
            file.write(selection.layer[batch].data)
        for name in list(header)[2:]:
            file.write(np.ascontiguousarray(tensors[name]).data)


def _write_npy(selection: _Selection, path: Path) -> None:
    # A plain stream, not a memory map: a full disk then raises an error, while a map would kill the process.
    shape = (len(selection.rows), selection.store.d_model)
    with path.open("wb") as file:
        description = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, description)
        for batch in selection.batches():
            file.write(selection.layer[batch].data)


_WRITERS: dict[str, Callable[[_Selection, Path], None]] = {
    "parquet": _write_parquet,
    "nla": _write_nla,
    "datasets": _write_parquet,
    "safetensors": _write_safetensors,
    "npy": _write_npy,
}
