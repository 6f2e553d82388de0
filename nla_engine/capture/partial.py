"""What a stopped run leaves unfinished, if it is asked for: a store of its own, beside that of the run.

The run's own store never has such sequences, so that a resumed run generates them again, each number once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nla_engine.capture.appender import sequence_rows
from nla_engine.engine.request import Completion
from nla_engine.models.prompt_set import Prompt
from nla_engine.shard import name_beside
from nla_engine.store import StoreWriter

#: Part of its name, and key of what `--resume` compares, so that no run takes such a store for its own.
PARTIAL = "partial"


def partial_name(out: str) -> str:
    """run.partial.zarr for run.zarr. RequestError for a whole bucket, which has nothing beside it."""
    return name_beside(out, PARTIAL, "--keep-partial")


def write_partial(
    writer: StoreWriter,
    name: str,
    unfinished: Iterable[Completion],
    prompts: Sequence[Prompt],
    *,
    vocabulary: Sequence[bytes],
    provenance: Mapping[str, Any],
    options: Mapping[str, Any],
    next_token: int | None,
) -> tuple[int, int]:
    """Write the unfinished sequences that have rows to a store of this name, in place of one that an earlier run left.
    Returns how many these are, and their rows: with none nothing is written. Raises StoreError or WriteError.

    writer: of the run's store; prompts: by request id; the others: as `StoreWriter.create` takes them
    """
    made = (
        sequence_rows(prompts[each.request.id], each, writer.sink_norm)
        for each in unfinished
        if len(each.positions)
    )
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
