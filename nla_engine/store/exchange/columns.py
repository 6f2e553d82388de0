"""Columns beside imported vectors that say where a row comes from. Each is optional and holds whole numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nla_engine.errors import StoreError

#: The largest id of a token.
LARGEST_TOKEN = (1 << 24) - 1
#: Column -> its least and greatest value.
_NUMBERS = {
    "n_raw_tokens": (1, 1 << 24),
    "position": (0, (1 << 24) - 1),
    "activation_layer": (0, 1 << 24),
    "sequence": (0, (1 << 62) - 1),
    "token_id": (0, LARGEST_TOKEN),
    "next_token_id": (-1, LARGEST_TOKEN),
}


def checked(record: dict[str, Any], file: Path, row: int) -> dict[str, Any]:
    """The record itself. Raises StoreError that names file, row (counted from 0) and column for any other value."""
    for name, (least, most) in _NUMBERS.items():
        if name not in record:
            continue
        value = record[name]
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            shown = "null" if value is None else repr(value)[:40]
            raise StoreError(
                f"{file}: column '{name}' is {shown} in row {row}: it must be a whole number from {least} to {most} "
                "in every row; fill it, or drop the column"
            )
    return record
