"""What is known of one pair's explanations: the tables of roundtrip, score, patch, controls and claims, row by row.

Lines of several samples become one value per row, their mean. Which measures there are depends on the tables alone;
nothing is computed again with a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nla_engine.errors import RequestError
from nla_engine.referee.quantities import (
    EXPLAINED,
    Quantity,
    of_claims,
    of_controls,
    of_patched_controls,
    of_patches,
    of_scores,
    of_texts,
)
from nla_engine.roundtrip.results import read_metadata
from nla_engine.sites import Site

PATCH, CONTROLS, PATCHED_CONTROLS, CLAIMS = "patch", "controls", "patch of controls", "claims"
#: What a table is told by: columns that it alone has, by the command that wrote it. The first that fits.
_TOLD_BY = {
    PATCHED_CONTROLS: {"kl", "loss_recovered", "control", "of_row"},
    PATCH: {"kl", "loss_recovered"},
    CONTROLS: {"control", "of_row"},
    CLAIMS: {"side", "kind", "holds"},
    "clauses": {"variant", "unit", "units"},
    "ask": {"question", "answer"},
    "score --prefixes": {"of_text", "whole"},
}
#: The order in which tables count: the first one with a measure, or with the explanations, gives it.
_ORDER = ("", PATCH, CONTROLS, PATCHED_CONTROLS, CLAIMS)
#: Tables that hold no explanations of their own, or nothing that is read here.
_NOT_READ = ("clauses", "ask", "score --prefixes")
_PLACE = ("sequence", "position")
_ROW = (*_PLACE, "token", "next_token", "generated", "norm")


@dataclass(frozen=True)
class Table:
    """One Parquet file. kind: the command that tells it apart, "" for one of roundtrip, explain or score."""

    path: Path
    kind: str
    metadata: dict[str, Any]
    data: pa.Table

    @classmethod
    def read(cls, path: Path) -> Table:
        """RequestError if it is not a table of a run, or of a kind that is not read here."""
        if not path.is_file():
            raise RequestError(
                f"{path}: {'is a directory' if path.exists() else 'no such file'}: give a table"
            )
        metadata = read_metadata(path)
        names = set(pq.read_schema(path).names)
        kind = _kind(names)
        if kind in _NOT_READ:
            raise RequestError(
                f"{path}: is a table of {kind}, which is not read here: give those of roundtrip or score, patch, "
                "controls and claims"
            )
        needed = {*_PLACE, "sample"}
        if kind != CLAIMS:
            needed |= {*_ROW, "explanation", "status", "n_tokens"}
        if missing := sorted(needed - names):
            raise RequestError(f"{path}: has no column {missing[0]}: give a table of roundtrip or score")
        if "store" not in metadata.get("options", {}) or "layer" not in metadata:
            raise RequestError(f"{path}: does not say of which store its rows are: make it again")
        try:
            data = pq.read_table(path, partitioning=None)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise RequestError(f"{path}: is damaged ({error}): make it again") from error
        if not len(data):
            raise RequestError(f"{path}: holds no rows")
        return cls(path, kind, metadata, data)

    def only(self, keep: np.ndarray) -> Table:
        """The lines where bool [lines] `keep` is true."""
        return Table(self.path, self.kind, self.metadata, self.data.filter(pa.array(keep)))

    def column(self, name: str) -> np.ndarray:
        """As float64 with NaN for null; texts as objects, None for null."""
        values = self.data[name]
        if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
            return np.array(values.to_pylist(), object)
        if pa.types.is_integer(values.type) and not values.null_count:
            return np.asarray(values.to_numpy())
        return np.array([np.nan if v is None else v for v in values.to_pylist()], np.float64)

    @property
    def with_controls(self) -> bool:
        """Whether it has lines of other texts than the explanations."""
        return self.kind in (CONTROLS, PATCHED_CONTROLS)

    @property
    def store(self) -> str:
        """The store's id."""
        return str(self.metadata["options"]["store"])

    @property
    def site(self) -> Site:
        """What was read of the store."""
        return Site.parse(self.metadata["layer"])


@dataclass(frozen=True)
class Evidence:
    """The rows of one pair, in the order of (sequence, position), and what was measured of each.

    rows: the columns of _ROW, [R] each; texts: the explanations of each row; metadata: of the first table
    quantities: by the measure's key; given: the metadata of each table, by the command ("scores" for those of texts)
    """

    name: str
    store: str
    site: Site
    metadata: dict[str, Any]
    rows: Mapping[str, np.ndarray]
    texts: Sequence[Sequence[str]]
    quantities: Mapping[str, Quantity]
    given: Mapping[str, dict[str, Any]]
    paths: Sequence[Path] = field(default=())

    @property
    def size(self) -> int:
        return len(self.texts)

    @property
    def patch(self) -> dict[str, Any] | None:
        """The metadata of the table of patch, or of the patched controls."""
        return self.given.get(PATCH) or self.given.get(PATCHED_CONTROLS)

    @property
    def places(self) -> list[tuple[int, int]]:
        """(sequence, position) of each row."""
        return list(zip(self.rows["sequence"].tolist(), self.rows["position"].tolist(), strict=True))

    @classmethod
    def read(cls, paths: Sequence[Path], name: str, sample: int | None = None) -> Evidence:
        """Tables of the same explanations; the first one, or else that of controls, holds them.

        sample: of each row, the one of this number alone
        RequestError if one cannot be read, or if they are of other stores, layers or texts than the first.
        """
        tables = sorted((Table.read(path) for path in paths), key=lambda table: _ORDER.index(table.kind))
        if sample is not None:
            tables = [table.only(table.column("sample") == sample) for table in tables]
        kinds = [table.kind for table in tables]
        if twice := {kind for kind in kinds if kinds.count(kind) > 1}:
            what = min(twice) or "roundtrip or score"
            raise RequestError(f"{name}: two of its tables are of {what}: give one, or compare the two")
        whole = tables[0]
        if whole.kind == CLAIMS:
            raise RequestError(f"{whole.path}: holds no explanations: also give the table that it is about")
        lines = _own(whole)
        places = np.stack([lines.column(each) for each in _PLACE], 1).astype(np.int64)
        _, first, row = np.unique(places, axis=0, return_index=True, return_inverse=True)
        row = row.reshape(-1)
        number = {tuple(place): at for at, place in enumerate(places[first].tolist())}
        size = len(first)
        said = _said(lines)
        quantities: dict[str, Quantity] = {}
        for table in tables:
            _check_belongs(table, whole, said)
            at = [number.get(place, -1) for place in _places(table)]
            of = np.array(at, np.int64)
            known = table.only(of >= 0)
            of = of[of >= 0]
            names = set(known.data.column_names)
            mine = np.ones(len(of), bool)
            if table.with_controls:
                mine = known.column("control") == EXPLAINED
            own, found = known.only(mine), dict[str, Quantity]()
            if table.kind in ("", CONTROLS):
                found |= of_scores(own.column, known.metadata, of[mine], size)
            if table.kind in (PATCH, PATCHED_CONTROLS):
                found |= of_patches(own.column, names, of[mine], size)
            if table.kind == CONTROLS:
                found |= of_controls(known.column, known.metadata, of, size)
            if table.kind == PATCHED_CONTROLS:
                found |= of_patched_controls(known.column, of, size)
            if table.kind == CLAIMS:
                found |= of_claims(known.column, names, of, size)
            quantities = found | quantities
        quantities |= of_texts(lines.column, row, size)
        texts: list[list[str]] = [[] for _ in range(size)]
        for place, text in zip(row.tolist(), lines.column("explanation").tolist(), strict=True):
            texts[place].append(text or "")
        return cls(
            name,
            whole.store,
            whole.site,
            whole.metadata,
            {each: lines.column(each)[first] for each in _ROW},
            texts,
            quantities,
            {table.kind or "scores": table.metadata for table in tables},
            tuple(paths),
        )


def kind_of(path: Path) -> str:
    """The command that wrote a table; "" for roundtrip, explain or score, and for a file that cannot be read."""
    try:
        return _kind(set(pq.read_schema(path).names))
    except (OSError, pa.ArrowException):
        return ""


def _kind(names: set[str]) -> str:
    return next((kind for kind, columns in _TOLD_BY.items() if columns <= names), "")


def samples_of(path: Path) -> list[int]:
    """The numbers of the samples in a table, ascending."""
    return sorted(set(_own(Table.read(path)).column("sample").astype(int).tolist()))


def _own(table: Table) -> Table:
    """The lines of the explanations themselves."""
    return table.only(table.column("control") == EXPLAINED) if table.with_controls else table


def _places(table: Table) -> list[tuple[int, int]]:
    sequence, position = (table.column(name).astype(np.int64).tolist() for name in _PLACE)
    return list(zip(sequence, position, strict=True))


def _said(lines: Table) -> dict[tuple[int, int, int], str]:
    """The text of each (sequence, position, sample)."""
    keys = zip(_places(lines), lines.column("sample").astype(int).tolist(), strict=True)
    return {
        (*place, sample): text
        for (place, sample), text in zip(keys, lines.column("explanation").tolist(), strict=True)
    }


def _check_belongs(table: Table, whole: Table, said: Mapping[tuple[int, int, int], str]) -> None:
    """RequestError unless a table is about the explanations of another."""
    if table.store != whole.store:
        raise RequestError(f"{table.path}: is about another store than {whole.path}: give tables of one run")
    if table.site != whole.site:
        raise RequestError(
            f"{table.path}: is about {table.site.label}, {whole.path} about {whole.site.label}: give tables of one"
        )
    if table is whole or table.kind == CLAIMS:
        return
    for key, text in _said(_own(table)).items():
        if said.get(key, text) != text:
            raise RequestError(
                f"{table.path}: has another text than {whole.path} for sequence {key[0]}, position {key[1]}: give "
                "tables that were made of the same explanations"
            )
