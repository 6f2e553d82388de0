"""The table that a round trip (or a study) writes: one Parquet file, made from parts that are committed one by one.

While a run goes on, `<out>.parts/` holds run.json (what the run is) and numbered Parquet parts, each written to a
temporary name and renamed. The last step joins them. Knows nothing of how a score is computed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nla_engine.errors import RequestError
from nla_engine.store.directory import check_outside_stores
from nla_engine.store.shards import make_directory, replacing, write_file_atomically, writing

METADATA_KEY = b"nla_engine"
#: What the name of a table that is not finished ends in: a directory.
PARTS_SUFFIX = ".parts"
SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64()),
        pa.field("sequence", pa.int64()),
        pa.field("position", pa.int32()),
        pa.field("token", pa.string()),
        pa.field("next_token", pa.string()),
        pa.field("generated", pa.bool_()),
        pa.field("early", pa.bool_()),
        pa.field("norm", pa.float32()),
        pa.field("sample", pa.int32()),
        pa.field("best", pa.bool_()),
        pa.field("explanation", pa.string()),
        pa.field("status", pa.string()),
        pa.field("n_tokens", pa.int32()),
        pa.field("cos", pa.float64()),
        pa.field("mse_nrm", pa.float64()),
        pa.field("fve_nrm", pa.float64()),
        pa.field("fve_meannorm", pa.float64()),
        pa.field("cos_shuffled", pa.float64()),
        pa.field("retrieval_rank", pa.int32()),
    ]
)
#: Columns that are known at the end alone, from mse_nrm and a number that belongs to the whole run.
_LAST = ("fve_nrm", "fve_meannorm")


class ResultTable:
    """The result of one run on its way. `done`: rows of the table (samples counted) that are committed."""

    def __init__(
        self, out: Path, parts: Path, options: dict[str, Any], schema: pa.Schema, done: int, next_part: int
    ) -> None:
        self.out, self._parts, self._options, self._schema = out, parts, options, schema
        self.done, self._next_part = done, next_part

    @classmethod
    def open(
        cls,
        out: Path,
        *,
        options: dict[str, Any],
        resume: bool,
        overwrite: bool,
        schema: pa.Schema = SCHEMA,
    ) -> ResultTable:
        """Start, or go on with, a result. options: what a resumed run must have in common with the one it goes on with.

        A result that is to be overwritten stays until the new one is whole.
        RequestError if something is there and neither is asked for, if it is no result, or if the options differ.
        """
        parts = out.with_name(out.name + PARTS_SUFFIX)
        if not (resume or overwrite) and (out.exists() or parts.exists()):
            found = out if out.exists() else parts
            raise RequestError(
                f"{found}: exists; pass --resume to go on with it or --overwrite to replace it"
            )
        if out.is_dir():
            raise RequestError(f"{out}: is a directory; choose another name for the table")
        check_outside_stores(out)
        if overwrite and out.exists():
            read_metadata(out)  # nothing but a table of ours is ever replaced
        record = parts / "run.json"
        with writing(parts):
            if overwrite:
                shutil.rmtree(parts, ignore_errors=True)
            elif out.exists() and not record.exists():
                _check_same(out, read_metadata(out).get("options", {}), options)
                shutil.rmtree(parts, ignore_errors=True)
                rows = pq.read_metadata(out).num_rows
                return cls(out, parts, options, schema, done=rows, next_part=-1)
            make_directory(out.parent)
            if record.exists():
                _check_same(parts, _read_json(record).get("options", {}), options)
            else:
                shutil.rmtree(parts, ignore_errors=True)  # parts without a record are nobody's
                write_file_atomically(record, json.dumps({"options": options}, indent=1).encode())
            files = _part_files(parts)
            return cls(out, parts, options, schema, sum(_rows(file) for file in files), len(files))

    @property
    def finished(self) -> bool:
        return self._next_part < 0

    def append(self, columns: dict[str, Any]) -> None:
        """Commit a part: columns of the schema that do not come at the end, all of one length."""
        table = pa.table(columns, schema=_but_last(self._schema))
        path = self._parts / f"part-{self._next_part:06d}.parquet"
        with replacing(path) as temporary:
            pq.write_table(table, temporary)
        self._next_part += 1
        self.done += len(table)

    def finish(
        self, metadata: dict[str, Any], last: Callable[[np.ndarray], dict[str, list[float | None]]]
    ) -> None:
        """Join the parts into the one file. metadata: of the run, kept in the schema.

        last: gives the columns that come at the end from mse_nrm, float64 [n] with NaN for null.
        """
        if self.finished:
            return
        described = json.dumps({**metadata, "options": self._options}).encode()
        schema = self._schema.with_metadata({METADATA_KEY: described})
        with replacing(self.out) as temporary, pq.ParquetWriter(temporary, schema) as writer:
            for path in _part_files(self._parts):
                part = pq.read_table(path, schema=_but_last(self._schema))
                columns = dict(zip(part.column_names, part.columns, strict=True))
                columns |= last(part["mse_nrm"].to_numpy())
                writer.write_table(pa.table(columns, schema=schema))
        with writing(self._parts):
            (self._parts / "run.json").unlink()  # without it the parts are nobody's
            shutil.rmtree(self._parts)
        self._next_part = -1


def read_metadata(path: Path) -> dict[str, Any]:
    """The run's metadata of a result. RequestError if the file is not one."""
    try:
        found = (pq.read_schema(path).metadata or {}).get(METADATA_KEY)
    except (OSError, pa.ArrowException) as error:
        raise RequestError(
            f"{path}: cannot be read as Parquet ({error}): it is not the table of a round trip"
        ) from error
    if found is None:
        raise RequestError(
            f"{path}: is not the table of a round trip: it has no {METADATA_KEY.decode()} metadata"
        )
    data: dict[str, Any] = json.loads(found)
    return data


def ranked_among(metadata: Mapping[str, Any]) -> int:
    """How many vectors the ranks of a round trip are among. A table from before vectors that coincide were counted
    once names its rows alone."""
    return int(metadata.get("control_vectors", metadata["control_rows"]))


def _but_last(schema: pa.Schema) -> pa.Schema:
    return pa.schema([field for field in schema if field.name not in _LAST])


def _part_files(parts: Path) -> list[Path]:
    """The parts in order, up to the first number that is missing."""
    found: list[Path] = []
    while (path := parts / f"part-{len(found):06d}.parquet").exists():
        found.append(path)
    return found


def _rows(path: Path) -> int:
    try:
        return int(pq.read_metadata(path).num_rows)
    except (OSError, pa.ArrowException) as error:
        raise RequestError(
            f"{path}: a committed part is damaged ({error}); start again with --overwrite"
        ) from error


def _check_same(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    differ = [f"{key} was {before.get(key)!r}, is {now[key]!r}" for key in now if before.get(key) != now[key]]
    if differ:
        raise RequestError(
            f"{path}: was made with other options ({'; '.join(differ)}); --overwrite starts again"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RequestError(f"{path}: cannot be read ({error}); start again with --overwrite") from error
    return data if isinstance(data, dict) else {}


def nullable(values: np.ndarray, kind: Callable[[Any], Any] = float) -> list[Any]:
    """A column of `kind` (float or int), with null for NaN."""
    return [None if np.isnan(value) else kind(value) for value in values]


def batches(path: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Columns of a result as numpy arrays, some thousand rows at a time."""
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(65536, columns=columns):
            yield {name: batch.column(name).to_numpy(zero_copy_only=False) for name in columns}
