"""The texts of tokens that Parquet files hold beside their ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nla_engine.errors import StoreError
from nla_engine.store.exchange.columns import LARGEST_TOKEN
from nla_engine.store.reader import StoreReader
from nla_engine.store.views.fields import token_labels

if TYPE_CHECKING:
    import pyarrow as pa

#: Column of ids -> column of their texts.
_PAIRS = {"token_id": "token", "next_token_id": "next_token"}


def text_column(store: StoreReader, ids: np.ndarray) -> pa.Array:
    """The text of each token, int32 [n]."""
    import pyarrow as pa

    labels = token_labels(store, ids)
    return pa.array(labels.values, pa.string()).take(pa.array(labels.index))


def token_texts(files: Sequence[Path]) -> list[bytes]:
    """The text of each id from 0 on, empty where no file tells it. StoreError if an id has two texts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    found: dict[int, str] = {}
    for file in files:
        if file.suffix != ".parquet":
            continue
        with pq.ParquetFile(file) as table:
            names = table.schema_arrow.names
            pairs = [
                pair
                for pair in _PAIRS.items()
                if set(pair) <= set(names)
                and pa.types.is_integer(table.schema_arrow.field(pair[0]).type)
                and pa.types.is_string(table.schema_arrow.field(pair[1]).type)
            ]
            for id_name, text_name in pairs:
                for batch in table.iter_batches(columns=[id_name, text_name]):
                    columns = pa.table([batch.column(id_name), batch.column(text_name)], names=["id", "text"])
                    for told in columns.group_by(["id", "text"]).aggregate([]).to_pylist():
                        _add(found, told["id"], told["text"], f"{file}: column '{text_name}'")
    out = [b""] * (max(found, default=0) + 1)
    for id_, text in found.items():
        out[id_] = text.encode()
    return out


def _add(found: dict[int, str], id_: int | None, text: str | None, column: str) -> None:
    if id_ is None or text is None or not 0 <= id_ <= LARGEST_TOKEN:
        return
    if found.setdefault(id_, text) != text:
        raise StoreError(
            f"{column} has {found[id_]!r} and {text!r} for the id {id_}: mend it, or drop the column"
        )
