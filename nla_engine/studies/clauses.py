"""Which clause of an explanation carries the vector: what is lost without it. Reads the table of `clauses`."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from nla_engine.referee.clauses import CHANGES, CONTROL, WHOLE
from nla_engine.referee.intervals import Bootstrap, Estimate
from nla_engine.studies.findings import ALL, floats

#: The table by clause number leaves out numbers of clauses that a smaller share of explanations has.
RAREST = 0.05
#: What a change costs: columns of the table, and the measure of the untouched text. Without the model no KL_ADDED.
FVE_LOST, KL_ADDED = "fve_lost", "kl_added"
_MEASURE = {FVE_LOST: "fve_nrm", KL_ADDED: "kl"}


@dataclass(frozen=True)
class Cost:
    """Of one change, on the clauses that have it and its control. margin: own minus control, clause by clause."""

    own: Estimate
    control: Estimate
    margin: Estimate


@dataclass(frozen=True)
class Clause:
    """One clause at one place. about: what most of these clauses are about.

    whole: of the untouched explanations, by column (FVE for FVE_LOST, KL for KL_ADDED)
    costs: by column (FVE_LOST, KL_ADDED) and change (a name of CHANGES)
    """

    place: str
    clause: str
    about: str
    rows: int
    whole: Mapping[str, Estimate]
    costs: Mapping[tuple[str, str], Cost]

    def cost(self, change: str, column: str = FVE_LOST) -> Cost:
        """That of one change."""
        return self.costs[column, change]


def clause_losses(
    table: Path,
    place_of: Mapping[int, str],
    cluster_of: Mapping[int, str],
    places: Iterable[str],
    kind_of: Callable[[str], str],
    bootstrap: Bootstrap,
) -> tuple[list[Clause], list[Clause]]:
    """(by the clause's number in its explanation, by what it is about), each for all places together and one by one.

    place_of, cluster_of: by row. places: all possible ones, in reading order. kind_of: what a clause is about.
    """
    columns = [column for column in _MEASURE if column in pq.read_schema(table).names]
    names = ["row", "variant", "unit", "units", "clause", *columns, *(_MEASURE[column] for column in columns)]
    lines = pq.read_table(table, columns=names).to_pylist()
    whole = {line["row"]: line for line in lines if line["variant"] == WHOLE}
    found: dict[tuple[int, int], dict[Any, Any]] = {}
    for line in lines:
        if line["variant"] == WHOLE:
            continue
        entry = found.setdefault(
            (line["row"], line["unit"]),
            {
                "row": line["row"],
                "place": place_of[line["row"]],
                "number": f"{line['unit'] + 1} of {line['units']}",
                "units": line["units"],
                "kind": kind_of(line["clause"]),
            },
        )
        entry |= {(column, line["variant"]): line[column] for column in columns}
    entries = list(found.values())
    sizes = dict.fromkeys((entry["row"], entry["units"]) for entry in entries)
    share = Counter(units for _, units in sizes)
    usual = {units for units, count in share.items() if count >= RAREST * len(sizes)}
    there = [ALL, *(place for place in places if any(entry["place"] == place for entry in entries))]

    def table_of(chosen: Sequence[dict[Any, Any]], label: str) -> list[Clause]:
        out = []
        for place in there:
            groups: dict[str, list[dict[Any, Any]]] = defaultdict(list)
            for entry in chosen:
                if place in (ALL, entry["place"]):
                    groups[entry[label]].append(entry)
            out += [
                _clause(place, name, group, whole, cluster_of, columns, bootstrap)
                for name, group in sorted(groups.items())
            ]
        return out

    return table_of([entry for entry in entries if entry["units"] in usual], "number"), table_of(
        entries, "kind"
    )


def _clause(
    place: str,
    name: str,
    entries: Sequence[dict[Any, Any]],
    whole: Mapping[int, dict[str, Any]],
    cluster_of: Mapping[int, str],
    columns: Sequence[str],
    bootstrap: Bootstrap,
) -> Clause:
    rows = list(dict.fromkeys(entry["row"] for entry in entries))
    of_rows = np.array([cluster_of[row] for row in rows])
    cluster = np.array([cluster_of[entry["row"]] for entry in entries])

    def cost(column: str, change: str) -> Cost:
        own, control = (
            floats([entry.get((column, variant)) for entry in entries])
            for variant in (change, change + CONTROL)
        )
        both = np.isfinite(own) & np.isfinite(control)
        own, control = np.where(both, own, np.nan), np.where(both, control, np.nan)
        return Cost(
            bootstrap.mean(own, cluster),
            bootstrap.mean(control, cluster),
            bootstrap.margin(own, control, cluster),
        )

    return Clause(
        place,
        name,
        Counter(entry["kind"] for entry in entries).most_common(1)[0][0],
        len(rows),
        {
            column: bootstrap.mean(floats([whole[row][_MEASURE[column]] for row in rows]), of_rows)
            for column in columns
        },
        {(column, change): cost(column, change) for column in columns for change in CHANGES},
    )
