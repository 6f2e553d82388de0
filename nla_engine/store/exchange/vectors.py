"""A Parquet column of vectors, read in batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nla_engine.errors import NLAError, ReadError, StoreError, is_failure

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 1024


@dataclass(frozen=True)
class VectorBatch:
    """Some rows of a file.

    vectors: floating-point [n, d], in the type of the file; others: the other columns, if they were asked for
    total: rows of the file; metadata: of its schema
    """

    vectors: np.ndarray
    others: pa.RecordBatch
    total: int
    metadata: dict[bytes, bytes]


def read_vectors(file: Path, column: str, *, others: bool) -> Iterator[VectorBatch]:
    """The vectors of a Parquet file, BATCH_ROWS at a time. others: whether to read the other columns as well.

    Raises StoreError for a file that is no Parquet or has no such column of vectors of one length, ReadError when the
    disk fails.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            schema = table.schema_arrow
            if schema.names.count(column) != 1:
                found = "several columns" if column in schema.names else "no column"
                raise StoreError(f"{file}: has {found} '{column}': its columns are {', '.join(schema.names)}")
            kind = schema.field(column).type
            lists = (
                pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
            )
            if not lists or not pa.types.is_floating(kind.value_type):
                raise StoreError(f"{file}: '{column}' is {kind}, not a list of floating-point numbers")
            for batch in table.iter_batches(BATCH_ROWS, columns=None if others else [column]):
                held = batch.column(column)
                flat = held.flatten()
                width = len(flat) // max(len(held), 1)
                lengths = pc.list_value_length(held)
                if (
                    held.null_count
                    or flat.null_count
                    or not width
                    or set(pc.unique(lengths).to_pylist()) != {width}
                ):
                    raise StoreError(f"{file}: '{column}' is not of one length, or empty, in some row")
                vectors = flat.to_numpy(zero_copy_only=False).reshape(-1, width)
                yield VectorBatch(
                    vectors, batch.drop_columns(column), table.metadata.num_rows, schema.metadata or {}
                )
    except (pa.ArrowException, OSError) as error:
        raise unreadable(file, "Parquet", error) from None


def unreadable(file: Path, kind: str, error: Exception) -> NLAError:
    """The error of a file that a library cannot read."""
    reason = " ".join(str(error).split())
    return (ReadError if is_failure(error) else StoreError)(f"{file}: cannot be read as {kind}: {reason}")
