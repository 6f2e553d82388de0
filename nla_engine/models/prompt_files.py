"""Prompt files -> records, one at a time, each with its place in the file.

JSON lines, tables (CSV, TSV, Parquet) and plain text, plain or gzipped. What a record must hold is not checked here.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any

from nla_engine.errors import EngineError, PromptError, first_line

#: Fields with structure: in a table's text column they are JSON.
STRUCTURED = ("messages", "tools", "chat_template_kwargs")
#: Most levels of nested objects and lists: every reader of a store must be able to parse the record.
DEEPEST = 100
#: Rows of a Parquet file read at once, and the most characters in a CSV cell.
_PARQUET_ROWS, _LARGEST_CELL = 1024, 1 << 30

#: A record's place, and the record or the PromptError that reading it gave.
Placed = tuple[str, Any]


def read_records(path: Path) -> Iterator[Placed]:
    """Every record of a file: a dict of JSON values, any other JSON value, or the PromptError that reading it gave.

    Raises PromptError for a file that is missing, of another kind, or unreadable as a whole, and EngineError when the
    disk fails.
    """
    if not path.is_file():
        what = "a directory" if path.is_dir() else "no such file"
        raise PromptError(f"{path}: {what}: give .jsonl, .parquet, .csv, .tsv or .txt")
    name = path.name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    read = _READERS.get(suffix)
    if read is None or (read is _parquet and name.endswith(".gz")):
        raise PromptError(
            f"{path}: prompts are read from .jsonl, .ndjson, .json (one object per line), .csv, .tsv and .txt "
            "(one prompt per line), each also as .gz, and from .parquet: rename or convert it"
        )
    try:
        yield from read(path)
    except UnicodeDecodeError as error:
        raise PromptError(f"{path}: cannot be read as UTF-8 ({error}): convert it") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise PromptError(f"{path}: is a damaged gzip file ({error}): make it again") from error
    except PermissionError as error:
        raise PromptError(f"{path}: cannot be read ({error.strerror})") from error
    except OSError as error:
        raise EngineError(f"{path}: reading failed ({first_line(error)})") from error


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
def _opened(path: Path) -> Iterator[IO[bytes]]:
    with gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb") as file:
        yield file  # type: ignore[misc]


def _lines(path: Path) -> Iterator[tuple[str, str | PromptError]]:
    """The lines that are not blank, without line endings or a byte order mark."""
    with _opened(path) as file:
        for number, raw in enumerate(file, 1):
            place = f"line {number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                yield place, PromptError(f"cannot be read as UTF-8 ({error}): convert the file")
                continue
            line = line.removesuffix("\n").removesuffix("\r")
            if line.strip():
                yield place, line


def _text(path: Path) -> Iterator[Placed]:
    for place, line in _lines(path):
        yield place, line if isinstance(line, PromptError) else {"prompt": line}


def _json_lines(path: Path) -> Iterator[Placed]:
    for place, line in _lines(path):
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


def _csv(path: Path) -> Iterator[Placed]:
    yield from _separated(path, ",")


def _tsv(path: Path) -> Iterator[Placed]:
    yield from _separated(path, "\t")


def _separated(path: Path, separator: str) -> Iterator[Placed]:
    """Rows of a table with a heading. Cells are text; an empty cell is a missing field."""
    before = csv.field_size_limit(_LARGEST_CELL)
    try:
        with _opened(path) as file, TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
            rows = csv.reader(text, delimiter=separator, strict=True)
            heading = next(rows, [])
            if len(set(heading)) < len(heading):
                twice = next(name for name in heading if heading.count(name) > 1)
                raise PromptError(f"{path}: two columns are called {twice!r}: rename one")
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
        raise PromptError(f"{path}, line {rows.line_num}: not a table ({error}): mend its quotes") from error
    finally:
        csv.field_size_limit(before)


def _parquet(path: Path) -> Iterator[Placed]:
    """Rows of a Parquet file. Null is a missing field, in structs as well. Dates and times become ISO 8601."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_PARQUET_ROWS):
                for record in batch.to_pylist():
                    number += 1
                    yield f"row {number}", _structured(_plain(record))
    except (OSError, ValueError, OverflowError, pa.ArrowException) as error:
        if getattr(error, "errno", None):
            raise  # the disk failed, not the file's format
        message = f"{path}: cannot be read as Parquet (after row {number}: {first_line(error)})"
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


_READERS: dict[str, Callable[[Path], Iterator[Placed]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_lines,
    ".csv": _csv,
    ".tsv": _tsv,
    ".txt": _text,
    ".parquet": _parquet,
}
