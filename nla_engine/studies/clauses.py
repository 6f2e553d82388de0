"""Which clause of an explanation carries the vector: FVE lost without it. Reads what `reread` wrote."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from nla_engine.referee.intervals import Bootstrap, Estimate
from nla_engine.studies.findings import ALL

#: The table by clause number leaves out numbers of clauses that a smaller share of explanations has.
RAREST = 0.05


@dataclass(frozen=True)
class Clause:
    """One clause at one place. whole: FVE of the untouched explanations. removed, swapped: FVE lost when the clause is
    left out, or taken from another problem's explanation. alone: FVE of the clause on its own. about: what most of them
    are about."""

    place: str
    clause: str
    about: str
    rows: int
    whole: Estimate
    removed: Estimate
    swapped: Estimate
    alone: Estimate


def clause_losses(
    reread: Path,
    cluster_of: Mapping[int, str],
    places: Iterable[str],
    kind_of: Callable[[str], str],
    bootstrap: Bootstrap,
) -> tuple[list[Clause], list[Clause]]:
    """(by the clause's number in its explanation, by what it is about), each for all places together and one by one.

    cluster_of: by row. places: all possible ones, in reading order. kind_of: what a clause is about.
    """
    table = pq.read_table(reread).to_pylist()
    whole = {entry["row"]: entry["fve_nrm"] for entry in table if entry["variant"] == "whole"}
    changed = [{**entry, "kind": kind_of(entry["clause"])} for entry in table if entry["unit"] is not None]
    sizes = Counter((entry["row"], entry["units"]) for entry in changed)
    share = Counter(units for _, units in sizes)
    usual = {units for units, count in share.items() if count >= RAREST * len(sizes)}
    by_number = [entry for entry in changed if entry["units"] in usual]
    there = [ALL, *(place for place in places if any(entry["place"] == place for entry in changed))]

    def table_of(entries: Sequence[dict[str, Any]], label: Callable[[dict[str, Any]], str]) -> list[Clause]:
        out = []
        for place in there:
            groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
            for entry in entries:
                if place in (ALL, entry["place"]):
                    groups[label(entry)].append(entry)
            out += [
                _clause(place, name, group, whole, cluster_of, bootstrap)
                for name, group in sorted(groups.items())
            ]
        return out

    return (
        table_of(by_number, lambda entry: f"{entry['unit'] + 1} of {entry['units']}"),
        table_of(changed, lambda entry: entry["kind"]),
    )


def _clause(
    place: str,
    name: str,
    entries: list[dict[str, Any]],
    whole: dict[int, float | None],
    cluster_of: Mapping[int, str],
    bootstrap: Bootstrap,
) -> Clause:
    def mean(variant: str, value: Callable[[dict[str, Any]], float | None]) -> Estimate:
        chosen = [entry for entry in entries if entry["variant"] == variant]
        values = [value(entry) for entry in chosen]
        return bootstrap.mean(
            np.array([np.nan if v is None else v for v in values], np.float64),
            np.array([cluster_of[entry["row"]] for entry in chosen]),
        )

    def lost(entry: dict[str, Any]) -> float | None:
        before, now = whole.get(entry["row"]), entry["fve_nrm"]
        return None if before is None or now is None else before - now

    return Clause(
        place,
        name,
        Counter(entry["kind"] for entry in entries).most_common(1)[0][0],
        len({entry["row"] for entry in entries}),
        mean("removed", lambda entry: whole.get(entry["row"])),
        mean("removed", lost),
        mean("swapped", lost),
        mean("alone", lambda entry: entry["fve_nrm"]),
    )
