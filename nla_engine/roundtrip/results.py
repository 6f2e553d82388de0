"""The table of a round trip, of ask or of a study: one Parquet file, made from parts that are committed one by one.

During a run, `<out>.parts/` holds run.json (the run's options), numbered Parquet parts, and the writer's lease. Each
part is written to a temporary name and renamed. The last step joins the parts.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nla_engine.errors import NLAError, RequestError, WriteError, already_there
from nla_engine.sites import Site
from nla_engine.store.directory import check_parents
from nla_engine.store.exchange.record_columns import RecordColumns
from nla_engine.store.lease import Lease
from nla_engine.store.manifest import differences
from nla_engine.store.reader import StoreReader
from nla_engine.store.shards import (
    fsync_directory,
    make_directory,
    replacing,
    write_file_atomically,
    writing,
)
from nla_engine.store.swap import remove_directory

METADATA_KEY = b"nla_engine"
#: In the metadata of a table, under made_by: it holds what patch measured, and no scores.
PATCH = "patch"
#: Ending of the directory that holds an unfinished table.
PARTS_SUFFIX = ".parts"
#: In that directory: the run's options. Without this file the parts are leftovers.
RECORD_NAME = "run.json"
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
#: Columns of SCHEMA that need an AR. The table of an AV alone is without them.
SCORES = ("best", "cos", "mse_nrm", "fve_nrm", "fve_meannorm", "cos_shuffled", "retrieval_rank")
WITHOUT_SCORES = pa.schema([field for field in SCHEMA if field.name not in SCORES])
#: The table of answers to questions. rows: all that are in the prompt; row and what follows: of the first one.
ANSWERS = pa.schema(
    [
        SCHEMA.field("row"),
        pa.field("rows", pa.list_(pa.int64())),
        *(SCHEMA.field(name) for name in SCHEMA.names[1 : SCHEMA.names.index("sample")]),
        pa.field("question", pa.string()),
        SCHEMA.field("sample"),
        pa.field("answer", pa.string()),
        SCHEMA.field("status"),
        SCHEMA.field("n_tokens"),
    ]
)
#: Columns that are computed at the end, from mse_nrm and a number of the whole run.
_LAST = ("fve_nrm", "fve_meannorm")


def of_layer(name: str, layer: Site | int) -> str:
    """The column of a score of another layer than the table's, which the AR gives from the same text."""
    return f"{name}_L{layer}"


def further_scores(metadata: Mapping[str, Any]) -> list[str]:
    """The columns of a table that are scores of further layers."""
    layers = map(int, metadata.get("further_layers", {}))
    return [of_layer(name, layer) for layer in layers for name in SCORES]


def with_layers(schema: pa.Schema, layers: Iterable[Site | int]) -> pa.Schema:
    """A schema with the scores of further layers."""
    scores = [SCHEMA.field(name) for name in SCORES if name != "best"]
    return pa.schema([*schema, *(f.with_name(of_layer(f.name, layer)) for layer in layers for f in scores)])


class ResultTable:
    """The result of a run while it is written. `done`: committed rows of the table, one per sample.

    A context manager: this process alone may write the parts until it exits, or until `finish`.
    """

    def __init__(
        self,
        out: Path,
        lease: Lease | None,
        options: dict[str, Any],
        schema: pa.Schema,
        done: int,
        next_part: int,
    ) -> None:
        """lease: of the parts; None for a table that is finished."""
        self.out, self._lease, self._options, self._schema = out, lease, options, schema
        self._parts = _parts_of(out)
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
        """Start or resume a result. options: a resumed run must have the same.

        A result that is overwritten stays until the new one is complete.
        RequestError if something exists and is neither to be resumed nor overwritten, if it is not a result, or if the
        options differ. StoreError if another process writes it.
        """
        parts = _parts_of(out)
        check_table(out, resume=resume, overwrite=overwrite)
        if out.exists() and not overwrite and not parts.exists():
            return cls._finished(out, options, schema)
        with writing(parts):
            make_directory(parts)
        try:
            lease = Lease.of_directory(parts)
        except BaseException:
            with contextlib.suppress(OSError):
                parts.rmdir()  # only if it is empty
            raise
        try:
            return cls._begin(out, lease, options, overwrite, schema)
        except BaseException:
            lease.release()
            with contextlib.suppress(OSError):
                parts.rmdir()
            raise

    @classmethod
    def _finished(cls, out: Path, options: dict[str, Any], schema: pa.Schema) -> ResultTable:
        _check_same(out, read_metadata(out).get("options", {}), options)
        return cls(out, None, options, schema, done=pq.read_metadata(out).num_rows, next_part=-1)

    @classmethod
    def _begin(
        cls, out: Path, lease: Lease, options: dict[str, Any], overwrite: bool, schema: pa.Schema
    ) -> ResultTable:
        """The table, once this process has the lease of its parts."""
        parts = _parts_of(out)
        record = parts / RECORD_NAME
        if out.exists() and not overwrite and not record.exists():
            table = cls._finished(out, options, schema)
            with writing(parts):
                remove_directory(parts, lease)
            return table
        if record.exists() and not overwrite:
            _check_same(parts, _read_json(record).get("options", {}), options)
        else:
            with writing(
                parts
            ):  # the record is removed first and written last: without it the parts are leftovers
                record.unlink(missing_ok=True)
                fsync_directory(parts)
                _remove_parts(parts, ())
            write_file_atomically(record, json.dumps({"options": options}, indent=1).encode())
        files = _part_files(parts)
        with writing(parts):
            _remove_parts(parts, files)
        return cls(out, lease, options, schema, sum(_rows(file) for file in files), len(files))

    @classmethod
    def done_before(cls, out: Path, options: dict[str, Any], *, overwrite: bool) -> int:
        """Rows of the table that a run with these options would find. Errors as for `open`; nothing is written."""
        parts = _parts_of(out)
        if overwrite:
            return 0
        if (record := parts / RECORD_NAME).exists():
            _check_same(parts, _read_json(record).get("options", {}), options)
            return sum(map(_rows, _part_files(parts)))
        if out.exists():
            _check_same(out, read_metadata(out).get("options", {}), options)
            return int(pq.read_metadata(out).num_rows)
        return 0

    def __enter__(self) -> ResultTable:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._lease is None:
            return
        # A failed run without rows leaves nothing, unless it was to replace a table: then --resume needs its record.
        if kind is not None and not (self.done or self.finished or self.out.exists()):
            with contextlib.suppress(NLAError, OSError):
                self._lease.check()
                (self._parts / RECORD_NAME).unlink()
                remove_directory(self._parts, self._lease)
        self._lease.release()

    @property
    def finished(self) -> bool:
        return self._next_part < 0

    def append(self, columns: dict[str, Any]) -> None:
        """Commit a part: every column but those computed at the end, all of one length.

        WriteError if another process has taken the table.
        """
        table = pa.table(columns, schema=but_last(self._schema))
        path = self._parts / f"part-{self._next_part:06d}.parquet"
        lease = self._own()
        lease.check()
        with replacing(path) as temporary:
            pq.write_table(table, temporary)
            lease.check()
        self._next_part += 1
        self.done += len(table)

    def finish(
        self,
        metadata: dict[str, Any],
        last: Callable[[pa.Table], dict[str, list[float | None]]] | None = None,
        store: StoreReader | None = None,
    ) -> None:
        """Join the parts into the one file. metadata: of the run, kept in the schema.

        last: computes the columns of the end from a part of the others. None: there are none.
        store: the rows are of; the fields of its prompt records become columns, unless the table has them by now.
        WriteError if another process has taken the table.
        """
        if self.finished:
            return
        lease, files = self._own(), _part_files(self._parts)
        lease.check()
        described = json.dumps({**metadata, "options": self._options}).encode()
        fields, of_records = list(self._schema), None
        if store is not None:
            numbers = [pq.read_table(path, columns=["sequence"])["sequence"].to_numpy() for path in files]
            of_records = RecordColumns(store, np.concatenate([np.zeros(0, np.int64), *numbers]))
            fields += [field for field in of_records.fields if field.name not in self._schema.names]
        schema = pa.schema(fields, metadata={METADATA_KEY: described})
        with replacing(self.out) as temporary:
            with pq.ParquetWriter(temporary, schema) as writer:
                for path in files:
                    part = pq.read_table(path, schema=but_last(self._schema))
                    columns = dict(zip(part.column_names, part.columns, strict=True))
                    if of_records is not None:
                        made = of_records.arrays(part["sequence"].to_numpy())
                        names = [field.name for field in of_records.fields]
                        columns = dict(zip(names, made, strict=True)) | columns
                    if last is not None:
                        columns |= last(part)
                    writer.write_table(pa.table(columns, schema=schema))
            lease.check()
            if (joined := pq.read_metadata(temporary).num_rows) != self.done:
                raise WriteError(
                    f"{self._parts}: holds {joined} rows, this run wrote {self.done}: another run wrote there as well: "
                    "start again with --overwrite"
                )
        with writing(self._parts):
            (self._parts / RECORD_NAME).unlink()  # without it the parts are leftovers
            remove_directory(self._parts, lease)
        self._next_part = -1

    def _own(self) -> Lease:
        assert self._lease is not None, "the table is finished"
        return self._lease


def check_table(out: Path, texts: Path | None = None, *, resume: bool, overwrite: bool) -> None:
    """RequestError if `out` exists and is neither to be resumed nor replaced, or cannot be written where it would lie.

    texts: a file that the run reads, which the table may not replace
    Called before any work, and again by `ResultTable.open`.
    """
    if texts is not None and out.exists() and texts.exists() and out.samefile(texts):
        raise RequestError(f"{out}: is the file of the texts: choose another name for the result")
    parts = _parts_of(out)
    if not (resume or overwrite) and (out.exists() or parts.exists()):
        found = out if out.exists() else parts
        raise RequestError(already_there(found))
    if out.is_dir():
        raise RequestError(f"{out}: is a directory; choose another name for the table")
    check_parents(out)
    if overwrite and out.exists():
        read_metadata(out)  # only a table that this program wrote is ever replaced


def committed(out: Path) -> int:
    """How many rows of an unfinished table are committed; 0 if there is none."""
    parts = _parts_of(out)
    return sum(map(_rows, _part_files(parts))) if (parts / RECORD_NAME).is_file() else 0


def read_metadata(path: Path) -> dict[str, Any]:
    """The run's metadata in a result. RequestError if the file is not a result."""
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
    """Among how many vectors a round trip ranked. Older tables, which counted equal vectors separately, have only the
    number of rows."""
    return int(metadata.get("control_vectors", metadata["control_rows"]))


def but_last(schema: pa.Schema) -> pa.Schema:
    """Without the columns that are computed at the end."""
    return pa.schema([field for field in schema if field.name.partition("_L")[0] not in _LAST])


def _parts_of(out: Path) -> Path:
    return out.with_name(out.name + PARTS_SUFFIX)


def _remove_parts(parts: Path, kept: Sequence[Path]) -> None:
    """Remove every part, whole or partly written, that is not in `kept`."""
    for path in parts.iterdir():
        if path.name.lstrip(".").startswith("part-") and path not in kept:
            path.unlink()


def _part_files(parts: Path) -> list[Path]:
    """The parts in order, up to the first missing number."""
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
    differ = differences({key: before.get(key) for key in now}, now)
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
    """Columns of a result as numpy arrays, in batches of up to 65,536 rows."""
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(65536, columns=columns):
            yield {name: batch.column(name).to_numpy(zero_copy_only=False) for name in columns}
