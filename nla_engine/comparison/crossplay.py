"""Cross-play: the texts of several AVs through several ARs of that width, and the comparison of the whole grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nla_engine.comparison.compared import Compared, compute, to_dict
from nla_engine.comparison.files import write_comparison
from nla_engine.comparison.matching import match
from nla_engine.config import CrossplayOptions, ScoreOptions
from nla_engine.errors import RequestError
from nla_engine.progress import Announce, Heard, Progress
from nla_engine.referee.evidence import Evidence
from nla_engine.report.models import short_name
from nla_engine.roundtrip.results import check_table
from nla_engine.roundtrip.run import run_score
from nla_engine.store.directory import check_directory
from nla_engine.store.shards import make_directory, writing
from nla_engine.studies.tables import show

#: In the directory of a grid: that of the comparison.
COMPARISON = "comparison"


@dataclass(frozen=True)
class Crossplay:
    """texts, readers: the names down and across; compared: every cell, row by row."""

    texts: Sequence[str]
    readers: Sequence[str]
    compared: Compared

    def to_dict(self) -> dict[str, Any]:
        return {"texts": list(self.texts), "readers": list(self.readers), **to_dict(self.compared)}


def run_crossplay(
    options: CrossplayOptions, *, announce: Announce = lambda text: None, progress: Heard = Progress()
) -> Crossplay:
    """Score every text with every AR, and compare. Tables of cells that are there already are kept with `resume`.

    Raises the errors of `nla_engine.errors`.
    """
    texts, readers = _names([path.stem for path in options.texts]), _names([_reader(ar) for ar in options.ar])
    if len(texts) * len(readers) < 2:
        raise RequestError("crossplay takes several --texts, several --ar, or both: score reads one with one")
    out = options.out
    check_directory(out)
    cells = {(t, r): out / f"{t:02d}-{r:02d}.parquet" for t in range(len(texts)) for r in range(len(readers))}
    for path in options.texts:
        if not path.is_file():
            raise RequestError(f"{path}: no such file: give the table of explain, roundtrip or score")
    for cell in cells.values():
        check_table(cell, resume=options.resume, overwrite=options.overwrite)
    with writing(out):
        make_directory(out)
    for (t, r), cell in sorted(cells.items(), key=lambda item: item[0][::-1]):
        announce(f"texts {texts[t]}, read by {readers[r]}")
        run_score(
            _score(options, options.texts[t], options.ar[r], cell), announce=announce, progress=progress
        )
    sides = [Evidence.read([cell], f"{texts[t]} by {readers[r]}") for (t, r), cell in cells.items()]
    compared = compute(sides, match(sides), options.seed)
    write_comparison(compared, out / COMPARISON, None, options.page_rows, options.store)
    return Crossplay(texts, readers, compared)


def grid(found: Crossplay) -> list[list[str]]:
    """FVE of every cell as text, under a line of headings; cos where FVE cannot be compared."""
    line = found.compared.line("fve") or found.compared.line("cos")
    values = ["–"] * len(found.compared.sides) if line is None else [show(value) for value in line.values]
    across = len(found.readers)
    return [
        ["", *found.readers],
        *([name, *values[at * across : (at + 1) * across]] for at, name in enumerate(found.texts)),
    ]


def _score(options: CrossplayOptions, texts: Path, ar: str, out: Path) -> ScoreOptions:
    same = (
        "store",
        "seed",
        "variance",
        "precision",
        "dtype",
        "device",
        "kernels",
        "resume",
        "overwrite",
        "trust_remote_code",
    )
    return ScoreOptions(ar=ar, texts=texts, out=out, **{name: getattr(options, name) for name in same})


def _reader(ar: str) -> str:
    """A short name: of a local directory its last part."""
    return Path(ar).name if Path(ar).exists() else short_name(ar)


def _names(names: Sequence[str]) -> list[str]:
    return [name if names.count(name) == 1 else f"{name} ({place})" for place, name in enumerate(names, 1)]
