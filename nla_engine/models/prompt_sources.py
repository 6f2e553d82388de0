"""What --prompts names -> the files to read, in order: files, directories, standard input."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nla_engine.errors import EngineError, PromptError
from nla_engine.models.prompt_files import Placed, PromptFile, form_of, read_records

#: Stands for standard input.
STDIN = Path("-")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
#: Most names in a note.
_LISTED = 3


@dataclass(frozen=True)
class PromptSources:
    """The files of a run. name: of all together, for errors; notes: what was left out of directories."""

    name: str
    files: tuple[PromptFile, ...]
    notes: tuple[str, ...] = ()

    @classmethod
    def find(cls, given: Sequence[Path], form: str | None = None) -> PromptSources:
        """form: of every file, a key of FORMS; None: as its suffix says, JSON lines on standard input.

        Directories are searched for files, below them too, in the order of their paths. Standard input is read here.
        PromptError for what is not there, holds no prompt file, or is of no known form.
        """
        if list(given).count(STDIN) > 1:
            raise PromptError("--prompts -: standard input can be read once: leave one out")
        files: list[PromptFile] = []
        notes: list[str] = []
        for path in given:
            if path == STDIN:
                files.append(_piped(form))
            elif path.is_dir():
                found, left = _inside(path, form)
                files += found
                if left:
                    names = ", ".join(left[:_LISTED]) + (", ..." if len(left) > _LISTED else "")
                    notes.append(
                        f"{path}: {len(left)} files there are no prompt files and are not read: {names}"
                    )
            elif not path.exists() and _HUB_ID.fullmatch(str(path)) and form_of(path) is None:
                raise PromptError(
                    f"{path}: no such file. A data set of the Hub has to be fetched first: hf download {path} "
                    "--repo-type dataset --local-dir DIR, then --prompts DIR"
                )
            else:
                files.append(PromptFile.at(path, form))
        return cls(", ".join(map(str, given)), tuple(files), tuple(notes))

    def records(self) -> Iterator[Placed]:
        """Every record of every file, its place with the name of the file. Raises what `read_records` raises."""
        for file in self.files:
            for place, record in read_records(file):
                yield f"{file.name}, {place}", record


def _inside(directory: Path, form: str | None) -> tuple[list[PromptFile], list[str]]:
    """The prompt files below a directory, and the names of its other files. What begins with a dot is passed over."""
    found, left = [], []
    try:
        paths = sorted(path for path in directory.rglob("*") if path.is_file())
    except OSError as error:
        raise EngineError(f"{directory}: reading failed ({error.strerror})") from error
    for path in paths:
        inner = path.relative_to(directory)
        if any(part.startswith(".") for part in inner.parts):
            continue
        if form is None and form_of(path) is None:
            left.append(inner.as_posix())
        else:
            found.append(PromptFile.at(path, form))
    if not found:
        raise PromptError(
            f"{directory}: holds no prompt file (.jsonl, .parquet, .csv, .tsv, .txt): give another directory, or say "
            "with --prompt-format what its files are"
        )
    return found, left


def _piped(form: str | None) -> PromptFile:
    """Standard input, read to its end."""
    if sys.stdin is None or sys.stdin.isatty():
        raise PromptError("--prompts -: nothing is piped into standard input")
    try:
        data = sys.stdin.buffer.read()
    except OSError as error:
        raise EngineError(f"standard input: reading failed ({os.strerror(error.errno or 0)})") from error
    file = PromptFile("standard input", form or "jsonl", data)
    first = next(read_records(file), None) if form is None else None
    if first is not None and not isinstance(first[1], dict):
        raise PromptError(
            "standard input: does not begin with a JSON object: say with --prompt-format what it is, such as csv"
        )
    return file
