"""Next tokens as columns of a file: those that `export` writes, and `import` reads again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nla_engine.errors import StoreError
from nla_engine.store.exchange.columns import LARGEST_TOKEN
from nla_engine.store.format import next_token_arrays
from nla_engine.store.records import LARGEST_LOGPROB
from nla_engine.store.views.capture_store import CaptureStore

if TYPE_CHECKING:
    import pyarrow as pa


def next_token_fields(store: CaptureStore) -> list[tuple[str, pa.DataType]]:
    """Names and types of the columns of a Parquet file; none if the store keeps no next tokens."""
    import pyarrow as pa

    if store.next_token is None:
        return []
    top = [("top_id", pa.int32()), ("top_token", pa.string()), ("top_logprob", pa.float32())]
    lists = [(name, pa.list_(kind)) for name, kind in top if store.next_token]
    return [("next_logprob", pa.float32()), *lists]


def next_token_values(store: CaptureStore, rows: np.ndarray) -> dict[str, Any]:
    """The values of these columns for rows int64 [n], by name. Null where no token follows."""
    import pyarrow as pa

    told = {name: store.column(name)[rows] for name in next_token_arrays(store.next_token)}
    values: dict[str, Any] = {name: list(array) for name, array in told.items()}
    if told:
        values["next_logprob"] = pa.array(told["next_logprob"], from_pandas=True)
    if "top_id" in told:
        values["top_token"] = [store.token_text(ids) for ids in told["top_id"]]
    return values


def next_tokens_told(first: dict[str, Any]) -> int:
    """How many of the likeliest tokens a file has for each row, by its first row."""
    ids, logprobs = first.get("top_id"), first.get("top_logprob")
    return len(ids) if isinstance(ids, list) and isinstance(logprobs, list) else 0


def next_token_columns(
    records: list[dict[str, Any]], top: int, source: Path, first: int
) -> dict[str, np.ndarray]:
    """The arrays of `NextTokens` by name. first: number of the first row, for errors.

    StoreError for a value that is no log-probability, no id, or a list of another length.
    """
    logprob = np.full(len(records), np.nan, np.float32)
    top_id = np.zeros((len(records), top), np.int32)
    top_logprob = np.zeros((len(records), top), np.float32)
    for row, record in enumerate(records):
        value = record.get("next_logprob")
        if value is not None:
            if not _is_logprob(value):
                raise _fault(
                    source, "next_logprob", value, first + row, "a logarithm of a probability, or null"
                )
            logprob[row] = value
        if not top:
            continue
        for name, into, fits in (
            ("top_id", top_id, _is_id),
            ("top_logprob", top_logprob, lambda each: each is None or _is_logprob(each)),
        ):
            values = record.get(name)
            if not isinstance(values, list) or len(values) != top or not all(map(fits, values)):
                must = f"a list of {top} {'ids of tokens' if name == 'top_id' else 'logarithms of probabilities'}"
                raise _fault(source, name, values, first + row, must)
            into[row] = [np.nan if each is None else each for each in values]
    made = {"next_logprob": logprob, "top_id": top_id, "top_logprob": top_logprob}
    return {name: made[name] for name in next_token_arrays(top)}


def _is_logprob(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and not value > LARGEST_LOGPROB


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST_TOKEN


def _fault(source: Path, name: str, value: Any, row: int, must: str) -> StoreError:
    return StoreError(
        f"{source}: column '{name}' is {repr(value)[:40]} in row {row}: it must be {must}; mend it, or drop the column"
    )
