"""What a stopped run leaves unfinished, if it is asked for: a store of its own, beside that of the run.

The run's own store never has such sequences, so that a resumed run generates them again, each number once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from nla_engine.errors import RequestError, first_line
from nla_engine.store import SequenceRows, StoreWriter

#: Key of what `--resume` compares, so that no run takes such a store for its own.
PARTIAL = "partial"


def partial_name(out: str) -> str:
    """run.partial.zarr for run.zarr. RequestError for a whole bucket, which has nothing beside it."""
    directory, name = os.path.split(out.rstrip("/"))
    if "://" in out and directory.endswith(":"):
        raise RequestError(f"--keep-partial: beside {out} there is no place: give a name in the bucket")
    stem, ending = os.path.splitext(name)
    return os.path.join(directory, f"{stem}.partial{ending}")


def write_partial(
    writer: StoreWriter,
    name: str,
    unfinished: Iterable[SequenceRows],
    *,
    vocabulary: Sequence[bytes],
    provenance: Mapping[str, Any],
    options: Mapping[str, Any],
    next_token: int | None,
) -> tuple[int, int]:
    """Write unfinished sequences, each with rows, to a store of this name, in place of one that an earlier run left.
    Returns how many these are, and their rows: with none nothing is written. Raises StoreError or WriteError.

    writer: of the run's store; the others: as `StoreWriter.create` takes them
    """
    made = iter(unfinished)
    first = next(made, None)
    if first is None:
        return 0, 0
    with StoreWriter.create(
        name,
        layers=writer.layers,
        codec=writer.codec,
        sink_norm=writer.sink_norm,
        vocabulary=vocabulary,
        provenance=provenance,
        options={**options, PARTIAL: True},
        next_token=next_token,
        overwrite=True,
    ) as partial:
        for site, error in writer.codec_error.items():
            partial.record_codec_error(site, error)
        partial.append(first)
        for sequence in made:
            partial.append(sequence)
        partial.commit()
        return partial.sequences, partial.rows


def keep_partial(
    writer: StoreWriter,
    out: str,
    unfinished: Iterable[SequenceRows],
    announce: Callable[[str], None],
    **about: Any,
) -> None:
    """`write_partial` beside the store `out`, and say so. A failure is said too: the error that stopped the run counts.

    about: what `write_partial` takes
    """
    name = partial_name(out)
    try:
        sequences, rows = write_partial(writer, name, unfinished, **about)
    except Exception as error:
        announce(f"{name}: what is unfinished could not be kept: {first_line(error)}")
    else:
        kept = f"{sequences:,} unfinished sequences with {rows:,} rows are kept in {name}"
        announce(kept if sequences else "no unfinished sequence has rows to keep")
