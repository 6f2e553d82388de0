"""A file of texts for rows of a store: Parquet or JSON lines from any source, or the table of an earlier run.

Of any file the fields `row` and `text` are read, and `layer` if there is one; of the table of a run `row`, `sample`,
`explanation`, `status` and `n_tokens`, since all others are computed again. Further fields go into the result as they
are. The whole file is held in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nla_engine.errors import PromptError, ReadError, RequestError, first_line, is_failure
from nla_engine.models.prompt_files import read_records
from nla_engine.roundtrip.prefixes import COLUMNS, with_prefixes
from nla_engine.roundtrip.results import METADATA_KEY, SCHEMA, further_scores
from nla_engine.roundtrip.texts import GIVEN, Vectors, without_direction
from nla_engine.roundtrip.verbalize import Explanation
from nla_engine.sites import Site
from nla_engine.store import CaptureStore

SUFFIXES = (".parquet", ".jsonl")
#: Bytes of a file that are hashed at once.
_BLOCK = 1 << 20


class TextFile:
    """The texts of a file, by sequence and position of their rows: a `Texts`.

    selected: int64 [R], the rows that have a text, in that order; metadata: of the run whose table it is, or None
    more: the schema of the further fields; layer: whose vectors the texts are about, if the file says it
    """

    unit = "texts"

    def __init__(
        self, path: Path, table: pa.Table, metadata: dict[str, Any] | None, layer: Site | None = None
    ) -> None:
        """table: row, sample, explanation, status, n_tokens, and further fields; those of a row together, by sample."""
        self.path, self._table, self.metadata, self.layer = path, table, metadata, layer
        row = table["row"].to_numpy()
        first = np.flatnonzero(np.diff(row, prepend=-1))
        self.selected, self._start = row[first], np.append(first, len(table))
        self.more = pa.schema([field for field in table.schema if field.name not in SCHEMA.names])

    @classmethod
    def read(cls, path: Path, store: CaptureStore, prefixes: bool = False) -> TextFile:
        """RequestError says what is wrong with the file, and where; also if it names rows that the store lacks.

        prefixes: each text after each of its sentences
        """
        table, places = _load(path)
        metadata = _metadata_of(path, table, store)
        text = "explanation" if metadata is not None else "text"
        missing = [name for name in ("row", text) if name not in table.column_names]
        if missing:
            had = ", ".join(table.column_names[:12]) or "none"
            raise RequestError(f"{path}: has no field {' and '.join(missing)}, its fields are {had}: rename")
        if not len(table):
            raise RequestError(f"{path}: holds no texts: there is nothing to score")
        rows = _rows(path, table["row"], places, store)
        texts = _texts(path, table[text], text, places)
        own = {"row", "text"} if metadata is None else {*SCHEMA.names, *further_scores(metadata)}
        layer = _layer(path, table, places) if metadata is None else Site.parse(metadata["layer"])
        further = [name for name in table.column_names if name not in own]
        names = [*SCHEMA.names, *(field.name for field in COLUMNS if prefixes)]
        if clash := [name for name in further if name in names]:
            raise RequestError(
                f"{path}: the result has a field {', '.join(clash)} of its own: rename it in the file"
            )
        columns: dict[str, Any] = {"row": pa.array(rows), "explanation": texts}
        columns |= _from_run(path, table, rows) if metadata is not None else _from_anywhere(rows)
        columns |= {name: table[name] for name in further}
        made = pa.table(columns)
        sequence, position = (store.column(name)[rows] for name in ("sequence", "position"))
        order = np.lexsort((made["sample"].to_numpy(), position, sequence))
        if not np.array_equal(order, np.arange(len(order))):
            made = made.take(pa.array(order))
        _check_writable(path, made.select(further).schema)
        if prefixes:
            made = with_prefixes(made)
        return cls(path, made, metadata, layer)

    def only(self, rows: np.ndarray) -> TextFile:
        """The texts of these rows alone, int64 [n]; each of them has one."""
        kept = np.isin(self._table["row"].to_numpy(), rows)
        return TextFile(self.path, self._table.filter(pa.array(kept)), self.metadata, self.layer)

    def all(self) -> list[str]:
        """Every text, in order."""
        return list(self._table["explanation"].to_pylist())

    def text(self, place: int) -> str:
        """One text, by its place."""
        return str(self._table["explanation"][place].as_py())

    def tokens(self, place: int) -> int | None:
        """The tokens of one text, by its place; None if that is not known."""
        return cast(int | None, self._table["n_tokens"][place].as_py())

    def row_of(self, text: int) -> int:
        """The row of a text, by the text's place."""
        return int(self._table["row"][text].as_py())

    def written_by(self) -> dict[str, Any]:
        """For the metadata of the result: the AV that wrote the texts, and its run; nothing if that is not known."""
        made = self.metadata or {}
        run = made.get("run", {})
        explained = made.get("explained") or (
            {**run, "started": made.get("started")} if "max_new_tokens" in run else None
        )
        if explained is None:
            return {}
        stated = {name: value for name, value in made.items() if name.startswith("av_")}
        named = ("av", "av_revision", "injection", "injection_scale", "norm_match")
        return {name: made.get(name) for name in named} | {**stated, "explained": explained}

    def fingerprint(self) -> str:
        """Of the file's bytes."""
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
        return digest.hexdigest()[:16]

    def of_rows(
        self, reader: Vectors, rows: np.ndarray, first: int
    ) -> Generator[list[Explanation], None, None]:
        """See `Texts`."""
        for place, status in enumerate(without_direction(reader.norm_at(rows)), first):
            start, stop = (int(n) for n in self._start[place : place + 2])
            part = self._table.slice(start, stop - start)
            texts, statuses = (part[name].to_pylist() for name in ("explanation", "status"))
            yield [
                Explanation(start + i, text, status or own, 0)
                for i, (text, own) in enumerate(zip(texts, statuses, strict=True))
            ]

    def columns(self, texts: list[Explanation]) -> dict[str, Any]:
        """See `Texts`; the further fields too."""
        part = self._table.slice(texts[0].id, len(texts))
        names = ("sample", "explanation", "n_tokens", *self.more.names)
        return {name: part[name] for name in names} | {"status": [e.status for e in texts]}

    def up_to_row(self, rows: int) -> int:
        """See `Texts`."""
        return int(self._start[rows])

    def rows_of(self, texts: int) -> int:
        """See `Texts`."""
        return int(np.searchsorted(self._start, texts, side="right")) - 1

    def each(self, rows: int) -> str:
        """See `Texts`."""
        count = self.up_to_row(rows)
        return f"{count:,} text{'' if count == 1 else 's'}"


def _load(path: Path) -> tuple[pa.Table, Sequence[str] | None]:
    """The file as a table, and the place of each record; None if that is its number."""
    if path.suffix.lower() not in SUFFIXES:
        raise RequestError(f"{path}: texts are read from {' and '.join(SUFFIXES)} alone: convert it")
    if not path.is_file():
        raise RequestError(
            f"{path}: {'is a directory' if path.is_dir() else 'no such file'}: give a file of texts"
        )
    if path.suffix.lower() == ".jsonl":
        return _load_json(path)
    try:
        table = pq.read_table(path, partitioning=None)
    except (OSError, ValueError, pa.ArrowException) as error:
        if is_failure(error):
            raise ReadError(f"{path}: reading failed ({first_line(error)})") from error
        raise RequestError(
            f"{path}: cannot be read as Parquet ({first_line(error)}): make it again"
        ) from error
    names = table.column_names
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise RequestError(f"{path}: has two fields {twice[0]}: rename one")
    return table, None


def _load_json(path: Path) -> tuple[pa.Table, Sequence[str]]:
    places: list[str] = []
    records: list[dict[str, Any]] = []
    for place, record in read_records(path):
        if isinstance(record, PromptError):
            raise RequestError(f"{path}, {place}: {record}")
        if not isinstance(record, dict):
            raise RequestError(f"{path}, {place}: is not an object: write one per line, with row and text")
        for name in ("row", "text"):
            if name not in record:
                raise RequestError(f"{path}, {place}: has no field {name}")
        if type(record["row"]) is not int:
            raise RequestError(f"{path}, {place}: row is {_short(record['row'])}: it must be an integer")
        if not isinstance(record["text"], str):
            raise RequestError(f"{path}, {place}: text is {_short(record['text'])}: it must be a string")
        places.append(place)
        records.append(record)
    columns = {}
    for name in dict.fromkeys(name for record in records for name in record):
        values: list[Any] = [record.get(name) for record in records]
        if _half_pair(name):
            raise RequestError(
                f"{path}: the field {name!a} holds half of a surrogate pair, which is no character"
            )
        if name == "row":  # no store has rows beyond int64
            columns[name] = pa.array(
                [min(max(value, -1 << 63), (1 << 63) - 1) for value in values], pa.int64()
            )
            continue
        try:
            columns[name] = pa.array(values, pa.string() if name == "text" else None)
        except UnicodeEncodeError:
            bad = next(place for place, value in zip(places, values, strict=True) if _half_pair(value))
            raise RequestError(
                f"{path}, {bad}: {name} holds half of a surrogate pair, which is no character"
            ) from None
        except (ValueError, TypeError, OverflowError, pa.ArrowException) as error:
            raise RequestError(
                f"{path}: field {name} has values of several types ({first_line(error)}): use one"
            ) from error
    return pa.table(columns) if columns else pa.table({"row": [], "text": []}), places


def _half_pair(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _metadata_of(path: Path, table: pa.Table, store: CaptureStore) -> dict[str, Any] | None:
    """The metadata of the run that made the table; None if it is not one of ours. Checked against the store."""
    try:
        metadata = json.loads((table.schema.metadata or {}).get(METADATA_KEY, b"{}"))
        made_of = metadata.get("options", {}).get("store")
    except (ValueError, AttributeError) as error:
        raise RequestError(
            f"{path}: its metadata {METADATA_KEY.decode()} cannot be read: make it again"
        ) from error
    if made_of is None:
        return None
    if "oracle" in metadata:
        raise RequestError(
            f"{path}: is the table of ask, whose answers to questions are no explanations: to score them all the same, "
            "write row and text into a file of their own"
        )
    if made_of != store.attributes["store_id"]:
        raise RequestError(
            f"{path}: explains another store than {store.path} (store {made_of}, not {store.attributes['store_id']}): "
            "give the two of one run"
        )
    of_run = (
        "explanation" in table.column_names and "layer" in metadata and isinstance(metadata.get("run"), dict)
    )
    return dict(metadata) if of_run else None


def _place(places: Sequence[str] | None, index: int) -> str:
    return places[index] if places is not None else f"record {index + 1}"


def _rows(
    path: Path, column: pa.ChunkedArray, places: Sequence[str] | None, store: CaptureStore
) -> np.ndarray:
    """int64 [n]: the rows, all of them in the store."""
    if not pa.types.is_integer(column.type):
        raise RequestError(f"{path}: row is of type {column.type}: it must be an integer")
    if column.null_count:
        place = _place(places, int(pc.index(column.is_null(), True).as_py()))
        raise RequestError(f"{path}, {place}: row is null: it must be an integer")
    values = column.to_numpy()
    wrong = np.flatnonzero((values < 0) | (values >= store.rows))
    if len(wrong):
        row, place = values[wrong[0]], _place(places, int(wrong[0]))
        more = f" ({len(wrong):,} such)" if len(wrong) > 1 else ""
        raise RequestError(
            f"{path}, {place}: row {row} is not in {store.path}, which has rows 0 to {store.rows - 1}{more}"
        )
    return values.astype(np.int64)


def _layer(path: Path, table: pa.Table, places: Sequence[str] | None) -> Site | None:
    """What a column `layer` says; None without one."""
    if "layer" not in table.column_names:
        return None
    column = table["layer"]
    if not pa.types.is_integer(column.type):
        raise RequestError(f"{path}: layer is of type {column.type}: it must be an integer")
    if column.null_count:
        place = _place(places, int(pc.index(column.is_null(), True).as_py()))
        raise RequestError(f"{path}, {place}: layer is null: it must be an integer")
    layers = np.unique(column.to_numpy()).tolist()
    if len(layers) > 1:
        raise RequestError(
            f"{path}: its texts are about layers {', '.join(map(str, layers[:12]))}, and a run scores those of one: "
            "split the file"
        )
    return Site(layers[0]) if layers else None


def _texts(path: Path, column: pa.ChunkedArray, name: str, places: Sequence[str] | None) -> pa.Array:
    """The texts as one array of strings."""
    held = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (pa.types.is_string(held) or pa.types.is_large_string(held) or pa.types.is_string_view(held)):
        raise RequestError(f"{path}: {name} is of type {column.type}: it must be a string")
    texts = column.to_pylist()
    if None in texts:
        raise RequestError(
            f"{path}, {_place(places, texts.index(None))}: {name} is null: it must be a string"
        )
    return pa.array(texts, pa.string())


def _from_anywhere(rows: np.ndarray) -> dict[str, Any]:
    """Samples numbered in the order of the file; no AV that is known."""
    order = np.argsort(rows, kind="stable")
    _, first, count = np.unique(rows[order], return_index=True, return_counts=True)
    sample = np.empty(len(rows), np.int32)
    sample[order] = np.arange(len(rows)) - np.repeat(first, count)
    size = len(rows)
    return {
        "sample": pa.array(sample),
        "status": pa.array([GIVEN] * size),
        "n_tokens": pa.nulls(size, pa.int32()),
    }


def _from_run(path: Path, table: pa.Table, rows: np.ndarray) -> dict[str, Any]:
    """The columns of an earlier run that say how a text was written."""
    out = {}
    for name in ("sample", "status", "n_tokens"):
        if name not in table.column_names:
            raise RequestError(f"{path}: is the table of a run, but has no column {name}: make it again")
        try:
            out[name] = table[name].cast(SCHEMA.field(name).type)
        except pa.ArrowException as error:
            raise RequestError(
                f"{path}: column {name} is of type {table[name].type}: make it again"
            ) from error
        if name != "n_tokens" and out[name].null_count:
            raise RequestError(f"{path}: column {name} has nulls: make it again")
    pairs = np.stack([rows, out["sample"].to_numpy()], 1)
    same, count = np.unique(pairs, axis=0, return_counts=True)
    if (count > 1).any():
        row, sample = same[count.argmax()]
        raise RequestError(f"{path}: holds sample {sample} of row {row} twice: drop one of the two")
    return out


def _check_writable(path: Path, further: pa.Schema) -> None:
    """RequestError for a field whose type Parquet cannot hold: found now, not after the work."""
    for field in further:
        try:
            pq.write_table(pa.schema([field]).empty_table(), pa.BufferOutputStream())
        except (pa.ArrowException, ValueError, TypeError) as error:
            raise RequestError(
                f"{path}: field {field.name} cannot be written as Parquet ({first_line(error)}): drop it"
            ) from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
