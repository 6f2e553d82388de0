"""Prompt files -> records, one at a time, each with its place in the file.

JSON lines, tables (CSV, TSV, Parquet), texts by line and whole, plain or gzipped. What a record must hold is not
checked here.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import IO, Any

from nla_engine.errors import EngineError, PromptError, first_line

#: Fields with structure: in a table's text column they are JSON.
STRUCTURED = ("messages", "tools", "chat_template_kwargs")
#: Most levels of nested objects and lists: every reader of a store must be able to parse the record.
DEEPEST = 100
#: Rows of a Parquet file read at once, and the most characters in a CSV cell.
_PARQUET_ROWS, _LARGEST_CELL = 1024, 1 << 30
_GZIP = b"\x1f\x8b"

#: A record's place, and the record or the PromptError that reading it gave.
Placed = tuple[str, Any]


@dataclass(frozen=True)
class PromptFile:
    """One file to read. name: for errors, and in the record of a whole text; form: a key of FORMS.

    content: where it is, or what it holds
    """

    name: str
    form: str
    content: Path | bytes

    @classmethod
    def at(cls, path: Path, form: str | None = None) -> PromptFile:
        """form: None for the one that the suffix names. PromptError if there is no such file, or no such form."""
        if not path.is_file():
            if path.is_dir():
                raise PromptError(f"{path}: a directory: give a file")
            suffix = "" if form or form_of(path) else ": give .jsonl, .parquet, .csv, .tsv or .txt"
            raise PromptError(f"{path}: no such file{suffix or ': check the name'}")
        if (form := form or form_of(path)) is None:
            raise PromptError(
                f"{path}: prompts are read from .jsonl, .ndjson, .json (one object per line), .csv, .tsv and .txt "
                "(one prompt per line), each also as .gz, and from .parquet: rename or convert it"
            )
        return cls(str(path), form, path)


def form_of(path: Path) -> str | None:
    """What the suffix of a file says it is, a key of FORMS; None if it says nothing that can be read."""
    name = path.name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    return None if suffix == ".parquet" and name.endswith(".gz") else _SUFFIXES.get(suffix)


def read_records(given: Path | PromptFile) -> Iterator[Placed]:
    """Every record of a file: a dict of JSON values, any other JSON value, or the PromptError that reading it gave.

    Raises PromptError for a file that is missing, of another kind, or unreadable as a whole, and EngineError when the
    disk fails.
    """
    file = PromptFile.at(given) if isinstance(given, Path) else given
    try:
        yield from FORMS[file.form](file)
    except UnicodeDecodeError as error:
        raise PromptError(f"{file.name}: cannot be read as UTF-8 ({error}): convert it") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise PromptError(f"{file.name}: is a damaged gzip file ({error}): make it again") from error
    except PermissionError as error:
        raise PromptError(f"{file.name}: cannot be read ({error.strerror})") from error
    except OSError as error:
        raise EngineError(f"{file.name}: reading failed ({first_line(error)})") from error


def record_source(record: Any) -> bytes:
    """A record as strict UTF-8 JSON, every digit kept. PromptError names the field that JSON cannot hold."""
    try:
        text = json.dumps(record, ensure_ascii=False, allow_nan=False)
        source = text.encode()
    except (ValueError, TypeError, RecursionError, OverflowError) as error:
        raise PromptError(
            f"the record cannot be kept as JSON: {_fault(record) or first_line(error)}"
        ) from error
    if text.count("{") + text.count("[") > DEEPEST and (fault := _fault(record)):
        raise PromptError(f"the record cannot be kept as JSON: {fault}")
    return source


@contextmanager
def _opened(file: PromptFile) -> Iterator[IO[bytes]]:
    """Its bytes, unpacked: of a file by its name, of what came through a pipe by the first bytes."""
    at = file.content
    packed = at.startswith(_GZIP) if isinstance(at, bytes) else at.name.lower().endswith(".gz")
    plain: IO[bytes] = BytesIO(at) if isinstance(at, bytes) else at.open("rb")
    with plain, gzip.open(plain, "rb") if packed else plain as opened:
        yield opened  # type: ignore[misc]


def _lines(file: PromptFile) -> Iterator[tuple[str, str | PromptError]]:
    """The lines that are not blank, without line endings or a byte order mark."""
    with _opened(file) as opened:
        for number, raw in enumerate(opened, 1):
            place = f"line {number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                yield place, PromptError(f"cannot be read as UTF-8 ({error}): convert the file")
                continue
            line = line.removesuffix("\n").removesuffix("\r")
            if line.strip():
                yield place, line


def _text(file: PromptFile) -> Iterator[Placed]:
    for place, line in _lines(file):
        yield place, line if isinstance(line, PromptError) else {"prompt": line}


def _whole(file: PromptFile) -> Iterator[Placed]:
    """The file as one text, and its name."""
    with _opened(file) as opened:
        yield "its text", {"prompt": opened.read().decode("utf-8-sig"), "file": file.name}


def _json_lines(file: PromptFile) -> Iterator[Placed]:
    for place, line in _lines(file):
        yield place, line if isinstance(line, PromptError) else _parse(line)


def _parse(text: str) -> Any:
    """The JSON value of a text, or the PromptError of what is wrong with it."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        return PromptError(f"not JSON, one object per line ({error.msg} at column {error.colno})")
    except RecursionError:
        return PromptError(f"objects and lists are nested more than {DEEPEST} deep: flatten them")
    except ValueError:  # an integer that Python does not convert
        return json.loads(text, parse_int=_integer)


class _TooLong:
    """Stands in a record for an integer of so many digits that Python does not convert it."""

    def __init__(self, digits: int) -> None:
        self.digits = digits


def _integer(digits: str) -> int | _TooLong:
    try:
        return int(digits)
    except ValueError:
        return _TooLong(len(digits.removeprefix("-")))


def _csv(file: PromptFile) -> Iterator[Placed]:
    yield from _separated(file, ",")


def _tsv(file: PromptFile) -> Iterator[Placed]:
    yield from _separated(file, "\t")


def _separated(file: PromptFile, separator: str) -> Iterator[Placed]:
    """Rows of a table with a heading. Cells are text; an empty cell is a missing field."""
    before = csv.field_size_limit(_LARGEST_CELL)
    try:
        with _opened(file) as opened, TextIOWrapper(opened, encoding="utf-8-sig", newline="") as text:
            rows = csv.reader(text, delimiter=separator, strict=True)
            heading = next(rows, [])
            if len(set(heading)) < len(heading):
                twice = next(name for name in heading if heading.count(name) > 1)
                raise PromptError(f"{file.name}: two columns are called {twice!r}: rename one")
            end = rows.line_num
            for row in rows:
                place, end = f"line {end + 1}", rows.line_num
                if not row:
                    continue
                if len(row) != len(heading):
                    message = f"has {len(row)} cells, the heading {len(heading)}: quote cells with separators"
                    yield place, PromptError(message)
                else:
                    yield place, _structured({k: v for k, v in zip(heading, row, strict=True) if v})
    except csv.Error as error:
        raise PromptError(
            f"{file.name}, line {rows.line_num}: not a table ({error}): mend its quotes"
        ) from error
    finally:
        csv.field_size_limit(before)


def _parquet(file: PromptFile) -> Iterator[Placed]:
    """Rows of a Parquet file. Null is a missing field, in structs as well. Dates and times become ISO 8601."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(BytesIO(at) if isinstance(at := file.content, bytes) else at) as table:
            for batch in table.iter_batches(_PARQUET_ROWS):
                for record in batch.to_pylist():
                    number += 1
                    yield f"row {number}", _structured(_plain(record))
    except (OSError, ValueError, OverflowError, pa.ArrowException) as error:
        if getattr(error, "errno", None):
            raise  # the disk failed, not the file's format
        message = f"{file.name}: cannot be read as Parquet (after row {number}: {first_line(error)})"
        raise PromptError(message) from error


def _structured(record: dict[str, Any]) -> dict[str, Any] | PromptError:
    """A row of a table, with the text of STRUCTURED fields parsed as JSON."""
    for name in STRUCTURED:
        if isinstance(text := record.get(name), str):
            value = _parse(text)
            if isinstance(value, PromptError):
                return PromptError(f'"{name}" is not JSON: {value}')
            record[name] = value
    return record


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.isoformat() if hasattr(value, "isoformat") else value


def _fault(value: Any, field: str = "", depth: int = 0) -> str | None:
    """The first thing in a record that JSON cannot hold: its field, what it is, what to do."""
    name = f"field {field!r}"
    if isinstance(value, dict | list | tuple):
        if depth == DEEPEST:
            return f"field {field[:40] + '...'!r} is nested more than {DEEPEST} deep: flatten it"
        items = (
            [(f"{field}.{key}" if field else str(key), key, item) for key, item in value.items()]
            if isinstance(value, dict)
            else [(f"{field}[{i}]", None, item) for i, item in enumerate(value)]
        )
        found = (_half_pair(key, place) or _fault(item, place, depth + 1) for place, key, item in items)
        return next((fault for fault in found if fault), None)
    if isinstance(value, _TooLong):
        return f"{name} is an integer of {value.digits:,} digits: write it as text"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{name} is {value}: leave it out, or write null"
    if isinstance(value, bytes):
        return f"{name} is bytes: write it as text"
    if isinstance(value, Decimal):
        return f"{name} is a decimal number: write it as text, or as a float"
    if isinstance(value, str):
        return _half_pair(value, field)
    if value is None or isinstance(value, bool | int | float):
        return None
    return f"{name} is of type {type(value).__name__}: write it as text or as a number"


def _half_pair(text: Any, field: str) -> str | None:
    try:
        str(text).encode()
    except UnicodeEncodeError:
        return f"field {field!a} holds half of a surrogate pair, which is no character"
    return None


#: What a file can be, and the reader of its records.
FORMS: dict[str, Callable[[PromptFile], Iterator[Placed]]] = {
    "jsonl": _json_lines,
    "csv": _csv,
    "tsv": _tsv,
    "txt": _text,
    "parquet": _parquet,
    "whole": _whole,
}
_SUFFIXES = {f".{form}": form for form in FORMS if form != "whole"} | dict.fromkeys(
    (".ndjson", ".json"), "jsonl"
)
