"""Every bad file of texts, and every AR that does not fit, is one line and exit code 2; nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import LAYER, call, check_refused, contents, json_lines, score, written
from store_samples import random_store
from tiny import D, save_ar

from nla_engine.roundtrip.results import METADATA_KEY, read_metadata


def parquet(path: Path, metadata: dict[str, Any] | None = None, **columns: Any) -> Path:
    table = pa.table(columns)
    if metadata is not None:
        table = table.replace_schema_metadata({METADATA_KEY: json.dumps(metadata).encode()})
    pq.write_table(table, path)
    return path


def of_run(root: Path, path: Path, **changes: Any) -> Path:
    """The result of `root`, changed. changes: columns to replace, None to drop; `metadata`: entries to replace."""
    table = pq.read_table(root / "explained.parquet")
    metadata = read_metadata(root / "explained.parquet") | changes.pop("metadata", {})
    columns = {name: table[name] for name in table.column_names} | changes
    return parquet(path, metadata, **{name: column for name, column in columns.items() if column is not None})


def other_store(directory: Path) -> Path:
    return random_store(directory / "o.zarr", np.ones((30, D), np.float32), LAYER)


GOOD = [{"row": 0, "text": "a"}, {"row": 1, "text": "b"}]
FAULTS: dict[str, tuple[Callable[[Path, Path], dict[str, object]], str]] = {
    "a row that the store lacks": (
        lambda r, t: {"texts": json_lines(t / "t.jsonl", [*GOOD, {"row": 20, "text": "c"}])},
        r"t.jsonl, line 3: row 20 is not in .*run.zarr, which has rows 0 to 19$",
    ),
    "rows below 0": (
        lambda r, t: {"texts": parquet(t / "t.parquet", row=[0, -1, -2], text=["a", "b", "c"])},
        r"t.parquet, record 2: row -1 is not in .*run.zarr, which has rows 0 to 19 \(2 such\)$",
    ),
    "a row beyond int64": (
        lambda r, t: {"texts": json_lines(t / "t.jsonl", [{"row": 1 << 70, "text": "c"}])},
        "line 1: row .* is not in",
    ),
    "two layers": (
        lambda r, t: {"texts": json_lines(t / "t.jsonl", [g | {"layer": i} for i, g in enumerate(GOOD)])},
        "t.jsonl: its texts are about layers 0, 1, and a run scores those of one: split the file",
    ),
    "a layer that is a text": (
        lambda r, t: {"texts": json_lines(t / "t.jsonl", [g | {"layer": "2"} for g in GOOD])},
        "t.jsonl: layer is of type string: it must be an integer",
    ),
    "a record without the layer": (
        lambda r, t: {"texts": json_lines(t / "t.jsonl", [GOOD[0] | {"layer": LAYER}, GOOD[1]])},
        "t.jsonl, line 2: layer is null: it must be an integer",
    ),
    "a layer of a file that is not the AR's": (
        lambda r, t: {"texts": json_lines(t / "t.jsonl", [g | {"layer": 1} for g in GOOD])},
        "t.jsonl: explains layer 1, --ar .*ar gives layer 2: give an AR of that layer",
    ),
    "a --layer that is not that of the texts": (
        lambda r, t: {"layer": LAYER, "texts": json_lines(t / "t.jsonl", [g | {"layer": 1} for g in GOOD])},
        "--layer 2: the texts of .*t.jsonl are about layer 1: leave --layer out",
    ),
    "a --layer that is not that of a run": (
        lambda r, t: {"layer": 1, "texts": r / "explained.parquet"},
        "--layer 1: the texts of .*explained.parquet are about layer 2: leave --layer out",
    ),
    "a row that is a float": (
        lambda r, t: {"texts": json_lines(t / "t.jsonl", [*GOOD, {"row": 2.0, "text": "c"}])},
        "t.jsonl, line 3: row is 2.0: it must be an integer",
    ),
    "a row that is true": (
        lambda r, t: {"texts": json_lines(t / "t.jsonl", [{"row": True, "text": "c"}])},
        "line 1: row is True: it must be an integer",
    ),
    "rows that are text": (
        lambda r, t: {"texts": json_lines(t / "t.jsonl", [{"row": "1", "text": "c"}])},
        "line 1: row is '1': it must be an integer",
    ),
    "rows that are floats": (
        lambda r, t: {"texts": parquet(t / "t.parquet", row=[0.0], text=["a"])},
        "t.parquet: row is of type double: it must be an integer",
    ),
    "rows that are null": (
        lambda r, t: {"texts": parquet(t / "t.parquet", row=pa.array([0, None]), text=["a", "b"])},
        "t.parquet, record 2: row is null",
    ),
    "no row": (
        lambda r, t: {"texts": json_lines(t / "t.jsonl", [{"text": "a"}])},
        "line 1: has no field row",
    ),
    "no text": (
        lambda r, t: {"texts": json_lines(t / "t.jsonl", [*GOOD, {"row": 2, "texts": "a"}])},
        "line 3: has no field text",
    ),
    "no row in Parquet": (
        lambda r, t: {"texts": parquet(t / "t.parquet", rows=[0], words=["a"])},
        "t.parquet: has no field row and text, its fields are rows, words",
    ),
    "a text that is a number": (
        lambda r, t: {"texts": json_lines(t / "t.jsonl", [{"row": 2, "text": 7}])},
        "line 1: text is 7: it must be a string",
    ),
    "a text that is null": (
        lambda r, t: {"texts": json_lines(t / "t.jsonl", [{"row": 2, "text": None}])},
        "line 1: text is None: it must be a string",
    ),
    "texts that are numbers": (
        lambda r, t: {"texts": parquet(t / "t.parquet", row=[0], text=[1])},
        "t.parquet: text is of type int64: it must be a string",
    ),
    "a text that is null in Parquet": (
        lambda r, t: {"texts": parquet(t / "t.parquet", row=[0, 1], text=pa.array(["a", None]))},
        "t.parquet, record 2: text is null: it must be a string",
    ),
    "half a character": (
        lambda r, t: {"texts": written(t / "t.jsonl", '{"row": 0, "text": "\\ud83d"}\n')},
        "line 1: text holds half of a surrogate pair",
    ),
    "half a character elsewhere": (
        lambda r, t: {"texts": written(t / "t.jsonl", '{"row": 0, "text": "", "x": {"y": "\\ud83d"}}\n')},
        "line 1: x holds half of a surrogate pair",
    ),
    "half a character in a name": (
        lambda r, t: {"texts": written(t / "t.jsonl", '{"row": 0, "text": "", "\\ud83d": 1}\n')},
        "t.jsonl: the field .* holds half of a surrogate pair",
    ),
    "no records": (lambda r, t: {"texts": written(t / "t.jsonl", "\n \n")}, "t.jsonl: holds no texts"),
    "no bytes": (lambda r, t: {"texts": written(t / "t.jsonl", "")}, "t.jsonl: holds no texts"),
    "no bytes of Parquet": (
        lambda r, t: {"texts": written(t / "t.parquet", "")},
        "t.parquet: cannot be read as Parquet",
    ),
    "no rows of Parquet": (
        lambda r, t: {
            "texts": parquet(t / "t.parquet", row=pa.array([], pa.int64()), text=pa.array([], pa.string()))
        },
        "t.parquet: holds no texts",
    ),
    "not JSON": (lambda r, t: {"texts": written(t / "t.jsonl", "{]\n")}, "t.jsonl, line 1: not JSON"),
    "not an object": (lambda r, t: {"texts": written(t / "t.jsonl", "[1]\n")}, "line 1: is not an object"),
    "not UTF-8": (
        lambda r, t: {"texts": written(t / "t.jsonl", b"\xff\n")},
        "line 1: cannot be read as UTF-8",
    ),
    "not Parquet": (
        lambda r, t: {"texts": written(t / "t.parquet", "no")},
        "t.parquet: cannot be read as Parquet",
    ),
    "pickled": (
        lambda r, t: {"texts": written(t / "t.pt", b"\x80\x04.")},
        "t.pt: texts are read from .parquet and .jsonl alone: convert it",
    ),
    "an unknown suffix": (
        lambda r, t: {"texts": written(t / "t.csv", "row,text\n0,a\n")},
        "t.csv: texts are read",
    ),
    "a directory": (lambda r, t: {"texts": made_directory(t / "t.parquet")}, "t.parquet: is a directory"),
    "no such file": (lambda r, t: {"texts": t / "none.jsonl"}, "none.jsonl: no such file"),
    "on an object store": (lambda r, t: {"texts": "s3://bucket/t.parquet"}, "has to be on a local disk"),
    "a field of several types": (
        lambda r, t: {"texts": json_lines(t / "t.jsonl", [GOOD[0] | {"x": 1}, GOOD[1] | {"x": "1"}])},
        "t.jsonl: field x has values of several types",
    ),
    "a field that Parquet cannot hold": (
        lambda r, t: {"texts": json_lines(t / "t.jsonl", [GOOD[0] | {"x": {}}])},
        "t.jsonl: field x cannot be written as Parquet",
    ),
    "a field of the result": (
        lambda r, t: {"texts": json_lines(t / "t.jsonl", [GOOD[0] | {"cos": 1.0, "token": "x"}])},
        "t.jsonl: the result has a field cos, token of its own: rename it in the file",
    ),
    "a field twice": (
        lambda r, t: {"texts": twice(t / "t.parquet")},
        "t.parquet: (has two fields x: rename one|cannot be read)",
    ),
    "the table of another store": (
        lambda r, t: {"texts": r / "explained.parquet", "store": other_store(t)},
        "explained.parquet: explains another store than .*o.zarr .*give the two of one run",
    ),
    "texts of another store": (
        lambda r, t: {"texts": parquet(t / "t.parquet", {"options": {"store": "abc"}}, row=[0], text=["a"])},
        r"t.parquet: explains another store than .*run.zarr \(store abc, not ",
    ),
    "metadata that is broken": (
        lambda r, t: {"texts": parquet(t / "t.parquet", [1], row=[0], text=["a"])},  # type: ignore[arg-type]
        "t.parquet: its metadata nla_engine cannot be read",
    ),
    "the table of another layer": (
        lambda r, t: {"texts": of_run(r, t / "t.parquet", metadata={"layer": 1})},
        "t.parquet: explains layer 1, --ar .*ar gives layer 2: give an AR of that layer",
    ),
    "a table without samples": (
        lambda r, t: {"texts": of_run(r, t / "t.parquet", sample=None)},
        "t.parquet: is the table of a run, but has no column sample",
    ),
    "a sample twice": (
        lambda r, t: {"texts": of_run(r, t / "t.parquet", row=pa.array([0] * 20))},
        "t.parquet: holds sample 0 of row 0 twice",
    ),
    "an AR of another layer": (
        lambda r, t: {"ar": save_ar(t / "ar1", 1)},
        "run.zarr holds layer 2, the AR was made for layer 1: capture that one",
    ),
    "another layer": (
        lambda r, t: {"layer": 1},
        "--layer 1: this AR was made for layer 2; leave --layer out",
    ),
    "an AR of another width": (
        lambda r, t: {"store": random_store(t / "n.zarr", np.ones((9, 32), np.float32), LAYER)},
        "ar is made for vectors of width 64, .*n.zarr holds 32: give the AR of the captured model",
    ),
    "an AV": (lambda r, t: {"ar": r / "av"}, "av: is an AV checkpoint"),
    "a result that exists": (lambda r, t: {"out": r / "explained.parquet"}, "exists; pass --resume"),
    "onto the texts": (
        lambda r, t: {"texts": r / "explained.parquet", "out": r / "explained.parquet", "overwrite": True},
        "explained.parquet: is the file of the texts: choose another name",
    ),
    "over a round trip": (
        lambda r, t: {"out": r / "explained.parquet", "resume": True},
        "explained.parquet: was made with other options .*texts was not given",
    ),
    "into the store": (lambda r, t: {"out": r / "run.zarr" / "x.parquet"}, "lies inside the store"),
    "variance": (lambda r, t: {"variance": 0}, "--variance is 0.0: it must be above 0"),
    "without texts": (lambda r, t: {"texts": None}, "Missing option '--texts'"),
    "without an AR": (lambda r, t: {"ar": None}, "Missing option '--ar'"),
    "with an AV": (lambda r, t: {"av": r / "av"}, "No such option: --av"),
}


def made_directory(path: Path) -> Path:
    path.mkdir()
    return path


def twice(path: Path) -> Path:
    pq.write_table(pa.Table.from_arrays([pa.array([0])] * 3, names=["row", "x", "x"]), path)
    return path


@pytest.mark.parametrize("fault", FAULTS)
def test_the_command_refuses(fault: str, root: Path, tmp_path: Path) -> None:
    before = contents(root)
    changes, message = FAULTS[fault]
    texts = json_lines(tmp_path / "good.jsonl", GOOD)
    given = {"out": tmp_path / "x.parquet", "texts": texts, **changes(root, tmp_path)}
    check_refused(call(*score(root, **given)), message)
    assert not list(tmp_path.glob("x.parquet*")) and contents(root) == before
