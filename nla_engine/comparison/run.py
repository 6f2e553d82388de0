"""Compare from its options to its files: sides read, rows matched, measures and differences, and what is written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from nla_engine.comparison.compared import Compared, compute
from nla_engine.comparison.files import check_out, write_comparison
from nla_engine.comparison.matching import match
from nla_engine.config import CompareOptions
from nla_engine.errors import RequestError
from nla_engine.referee.evidence import Evidence, samples_of


def compare(
    *tables: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    by_sample: bool = False,
    across_layers: bool = False,
    seed: int = 0,
    overwrite: bool = False,
) -> Compared:
    """Compare sides over the rows that all have; `out` as for the command. Raises RequestError, WriteError."""
    return run_compare(
        CompareOptions(
            tables=tuple(map(str, tables)),
            out=None if out is None else Path(out),
            by_sample=by_sample,
            across_layers=across_layers,
            seed=seed,
            overwrite=overwrite,
        )
    )


def run_compare(options: CompareOptions) -> Compared:
    """Compare, and write the files if the options name a directory. Raises RequestError, WriteError."""
    if options.out is not None:
        check_out(options.out, options.overwrite)
    sides = read_sides(options.tables, options.by_sample)
    compared = compute(sides, match(sides, options.across_layers), options.seed)
    if options.out is not None:
        write_comparison(compared, options.out, options.title, options.page_rows, options.store)
    return compared


def read_sides(given: Sequence[str], by_sample: bool = False) -> list[Evidence]:
    """Each of them `[NAME=]TABLE[,TABLE...]`; or one, whose samples are the sides. RequestError for a bad one."""
    named = [_named(words) for words in given]
    if by_sample:
        if len(named) > 1:
            raise RequestError("--by-sample takes the tables of one side: join them by commas")
        paths = named[0][1]
        numbers = samples_of(paths[0])
        if len(numbers) < 2:
            raise RequestError(f"{paths[0]}: has one sample per row: there is nothing to compare")
        return [Evidence.read(paths, f"sample {number}", number) for number in numbers]
    if len(named) < 2:
        raise RequestError("compare takes two sides or more; --by-sample compares the samples of one table")
    names = _distinct([name for name, _ in named], [paths for _, paths in named])
    return [Evidence.read(paths, name) for name, (_, paths) in zip(names, named, strict=True)]


def _named(words: str) -> tuple[str | None, list[Path]]:
    """The name, None where none is given, and the paths."""
    name, equals, rest = words.partition("=")
    if not equals or "/" in name or Path(words.split(",")[0]).exists():
        name, rest = "", words
    paths = [Path(path) for path in rest.split(",")]
    if "" in rest.split(",") or (equals and rest != words and not name.strip()):
        raise RequestError(f"{words!r} is no side: give [NAME=]TABLE[,TABLE...]")
    return name.strip() or None, paths


def _distinct(names: Sequence[str | None], paths: Sequence[Sequence[Path]]) -> list[str]:
    """The given names, or the first files' own, with their folders where two are alike. RequestError if given twice."""
    told = [name for name in names if name]
    if twice := next((name for name in told if told.count(name) > 1), None):
        raise RequestError(f"two sides are named {twice}: give each a name of its own")
    out = [name or files[0].stem for name, files in zip(names, paths, strict=True)]
    if len(set(out)) < len(out):
        out = [
            name or f"{files[0].resolve().parent.name}/{files[0].stem}"
            for name, files in zip(names, paths, strict=True)
        ]
    return [name if out.count(name) == 1 else f"{name} ({place})" for place, name in enumerate(out, 1)]
