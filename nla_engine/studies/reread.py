"""Reads explanations again with the AR: of each row its own, ranked among rows of its place, and another problem's."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from nla_engine.provenance import describe_run
from nla_engine.roundtrip import score
from nla_engine.roundtrip.chosen import CONTROL_ROWS
from nla_engine.roundtrip.reconstruct import Reconstructor
from nla_engine.roundtrip.results import ResultTable, batches, nullable
from nla_engine.roundtrip.score import Controls
from nla_engine.store import CaptureStore
from nla_engine.store.views.draw import draw_rows

CHUNK = 512
SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64()),
        pa.field("place", pa.string()),
        pa.field("variant", pa.string()),
        pa.field("partner", pa.int64()),
        pa.field("text", pa.string()),
        pa.field("cos", pa.float64()),
        pa.field("mse_nrm", pa.float64()),
        pa.field("fve_nrm", pa.float64()),
        pa.field("rank_in_place", pa.int32()),
    ]
)
#: Statuses of explanations that have a text.
WITH_TEXT = ("ok", "unclosed", "untagged")
#: Variants: the row's own explanation; another problem's.
WHOLE, ANOTHER = "whole", "another"


@dataclass(frozen=True)
class Explained:
    """A row of interest with its explanation. cluster: problems of one cluster are drawn together (see `intervals`)."""

    row: int
    sequence: int
    place: str
    cluster: str
    text: str


@dataclass(frozen=True)
class Reading:
    """One text to read again, and the row whose vector it is compared with.

    variant: WHOLE, or ANOTHER for the text of the row `partner`
    """

    row: int
    place: str
    variant: str
    text: str
    partner: int | None = None


def explained_rows(
    table: Path, place_of: Mapping[int, str], cluster_of: Mapping[int, str]
) -> list[Explained]:
    """The rows of interest that have a text. place_of: by row, rows of interest only; cluster_of: by sequence."""
    out = []
    names = ["row", "sequence", "explanation", "status"]
    for part in batches(table, names):
        for row, sequence, text, status in zip(*(part[name] for name in names), strict=True):
            if row in place_of and status in WITH_TEXT:
                cluster = cluster_of[int(sequence)]
                out.append(Explained(int(row), int(sequence), place_of[int(row)], cluster, str(text)))
    return out


def choose_partners(explained: Sequence[Explained], seed: int) -> dict[int, Explained]:
    """For each row, one of the same place and another cluster: the next one in a seeded order."""
    out: dict[int, Explained] = {}
    for place in sorted({entry.place for entry in explained}):
        group = [entry for entry in explained if entry.place == place]
        order = np.random.default_rng(seed).permutation(len(group))
        ring = [group[index] for index in order]
        for index, entry in enumerate(ring):
            others = (ring[(index + step) % len(ring)] for step in range(1, len(ring)))
            if partner := next((other for other in others if other.cluster != entry.cluster), None):
                out[entry.row] = partner
    return out


def plan(explained: Sequence[Explained], seed: int) -> list[Reading]:
    """Every text to read, in the order of the rows."""
    partners = choose_partners(explained, seed)
    out: list[Reading] = []
    for entry in explained:
        out.append(Reading(entry.row, entry.place, WHOLE, entry.text))
        if partner := partners.get(entry.row):
            out.append(Reading(entry.row, entry.place, ANOTHER, partner.text, partner.row))
    return out


def run_reread(
    store: CaptureStore,
    layer: int,
    readings: Sequence[Reading],
    reconstructor: Reconstructor,
    out: Path,
    *,
    variance: float,
    seed: int,
    resume: bool,
    overwrite: bool,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Read every text with the AR and score it against its row's vector, into the Parquet file `out`. Resumable.

    variance: Var of fve_nrm. rank_in_place of a whole text: `Controls.rank` among at most CONTROL_ROWS rows of the same
    place; the metadata gives the number of distinct vectors.
    """
    digest = hashlib.sha256()
    for reading in readings:
        digest.update(repr((reading.row, reading.variant, reading.text)).encode())
    with ResultTable.open(
        out,
        options={
            "store": store.attributes["store_id"],
            "readings": digest.hexdigest()[:16],
            "ar": reconstructor.fingerprint(),
            "variance": variance,
            "seed": seed,
        },
        resume=resume,
        overwrite=overwrite,
        schema=SCHEMA,
    ) as table:
        if not table.finished:
            _read_rest(table, store, layer, readings, reconstructor, variance, seed, progress)


def _read_rest(
    table: ResultTable,
    store: CaptureStore,
    layer: int,
    readings: Sequence[Reading],
    reconstructor: Reconstructor,
    variance: float,
    seed: int,
    progress: Callable[[int, int], None],
) -> None:
    """Read the texts that the table does not hold yet, and finish it."""
    vectors, device = store.layer(layer), reconstructor.lm.device
    sequence, position = store.column("sequence"), store.column("position")
    controls: dict[str, Controls] = {}
    for place in {reading.place for reading in readings}:
        found = np.unique([reading.row for reading in readings if reading.place == place])
        rows = draw_rows(store.in_order(found), CONTROL_ROWS, seed)
        controls[place] = Controls.of(sequence[rows], position[rows], vectors.torch(rows, device), seed)
    with closing(reconstructor):
        for chunk in _chunks(readings[table.done :]):
            rows = np.array([reading.row for reading in chunk])
            r = reconstructor.reconstruct([reading.text for reading in chunk])
            v = vectors.torch(rows, device)
            table.append(_columns(chunk, score.cosine(v, r), _ranks(chunk, v, r, controls)))
            progress(table.done, len(readings))
    distinct = {place: len(group.distinct) for place, group in controls.items()}
    metadata = {**describe_run(), "layer": layer, "variance": variance, "control_vectors": distinct}
    table.finish(
        metadata, lambda part: {"fve_nrm": nullable(score.fve_nrm(part["mse_nrm"].to_numpy(), variance))}
    )


def _chunks(readings: Sequence[Reading]) -> Iterator[list[Reading]]:
    remaining = iter(readings)
    while chunk := list(islice(remaining, CHUNK)):
        yield chunk


def _ranks(
    chunk: list[Reading], v: torch.Tensor, r: torch.Tensor, controls: dict[str, Controls]
) -> np.ndarray:
    """float64 [n]: ranks of the whole texts among the rows of their place; NaN elsewhere."""
    out = np.full(len(chunk), np.nan)
    for place, group in controls.items():
        mine = np.array([reading.place == place and reading.variant == WHOLE for reading in chunk])
        if mine.any():
            out[mine] = group.rank(v[mine], r[mine])
    return out


def _columns(chunk: list[Reading], cos: np.ndarray, rank: np.ndarray) -> dict[str, Any]:
    named = ("row", "place", "variant", "partner", "text")
    return {
        **{name: [getattr(reading, name) for reading in chunk] for name in named},
        "cos": nullable(cos),
        "mse_nrm": nullable(score.mse_nrm(cos)),
        "rank_in_place": nullable(rank, int),
    }
