"""What layer[...] means: the same as for a numpy array [rows, channels], or an IndexError."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

#: Rows to read: a slice, or their numbers, int64 [m], none negative.
Rows = slice | np.ndarray
#: The place of the result's rows among those that were read: a number, a slice, or int64 of any shape.
Place = int | slice | np.ndarray


def split_index(index: Any, rows: int) -> tuple[Rows, Place, tuple[Any, ...]]:
    """An index of a layer of so many rows: which rows to read, their place in the result, the index of channels.

    With `block` the rows that were read, [m, d], layer[index] is block[(place, *channels)]. Raises IndexError.
    """
    parts = index if isinstance(index, tuple) else (index,)
    if any(part is None for part in parts):
        raise IndexError("a layer takes no new axis: index np.asarray(layer)")
    if any(isinstance(part, bool | np.bool_) for part in parts):
        raise IndexError("True and False are no indices of a layer: give a mask of its rows")
    dots = [place for place, part in enumerate(parts) if part is Ellipsis]
    if len(dots) > 1:
        raise IndexError("an index holds '...' only once")
    if len(parts) - len(dots) > 2:
        raise IndexError(f"too many indices: a layer has 2 axes, rows and channels, not {len(parts)}")
    if dots:
        missing = (slice(None),) * (3 - len(parts))
        parts = (*parts[: dots[0]], *missing, *parts[dots[0] + 1 :])
    chosen, place = _rows(parts[0] if parts else slice(None), rows)
    return chosen, place, parts[1:]


def _rows(part: Any, rows: int) -> tuple[Rows, Place]:
    """The index of the first axis: rows to read, and the place of the result's among them."""
    if isinstance(part, slice):
        return part, slice(None)
    array = np.asarray(part)
    if array.ndim == 0:
        try:
            number = operator.index(part)
        except TypeError:
            raise IndexError(
                f"rows are chosen by integers, slices, masks and arrays of integers, not by {part!r}"
            ) from None
        return _inside(np.array([number]), rows), 0
    if array.dtype == bool:
        if array.shape != (rows,):
            raise IndexError(f"a mask of shape {array.shape} does not fit a layer of {rows} rows")
        array = np.flatnonzero(array)
    elif array.size == 0 and not isinstance(part, np.ndarray):
        array = array.astype(np.int64)
    elif array.dtype.kind not in "iu":
        raise IndexError(f"rows must be integers or booleans, not {array.dtype}")
    numbers = _inside(array.reshape(-1), rows)
    return numbers, np.arange(array.size).reshape(array.shape)


def _inside(numbers: np.ndarray, rows: int) -> np.ndarray:
    """The same rows counted from 0. IndexError if the layer does not have one of them."""
    for number in (int(numbers.min()), int(numbers.max())) if numbers.size else ():
        if not -rows <= number < rows:
            raise IndexError(f"row {number} is not among the {rows:,} of the layer")
    numbers = numbers.astype(np.int64)
    return np.where(numbers < 0, numbers + rows, numbers)
