"""Prompt files: every format, every fault with its place and its field."""

from __future__ import annotations

import gzip
import io
import json
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nla_engine.errors import EngineError, PromptError
from nla_engine.models.prompt_files import read_records, record_source


def records(path: Path) -> list[Any]:
    return [record for _, record in read_records(path)]


def written(path: Path, content: str | bytes) -> Path:
    data = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(data) if path.name.lower().endswith(".gz") else data)
    return path


@pytest.mark.parametrize("name", ["p.jsonl", "P.JSONL", "p.ndjson", "p.Json", "p.jsonl.gz", "P.JSONL.GZ"])
def test_json_lines_whatever_the_case_of_the_suffix(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / name, '{"prompt": "What is 3?"}\r\n\n{"prompt": "b", "n": 2}')
    assert list(read_records(path)) == [
        ("line 1", {"prompt": "What is 3?"}),
        ("line 3", {"prompt": "b", "n": 2}),
    ]


@pytest.mark.parametrize("name", ["p.txt", "p.TXT", "p.txt.gz"])
def test_text_is_a_prompt_a_line(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / name, "one\n\n  two \r\n\x0bthree\u2028four\n")
    assert records(path) == [{"prompt": "one"}, {"prompt": "  two "}, {"prompt": "\x0bthree\u2028four"}]


@pytest.mark.parametrize(
    ("name", "separator"), [("p.csv", ","), ("p.CSV", ","), ("p.tsv", "\t"), ("p.csv.gz", ",")]
)
def test_tables_have_a_heading(tmp_path: Path, name: str, separator: str) -> None:
    rows = ["id,prompt,note", '1,"What, is ""3""\ntimes 4?",', "", "2,plain,seen"]
    text = "\r\n".join(row.replace(",", separator) for row in rows) + "\r\n"
    assert list(read_records(written(tmp_path / name, text))) == [
        ("line 2", {"id": "1", "prompt": f'What{separator} is "3"\ntimes 4?'}),
        ("line 5", {"id": "2", "prompt": "plain", "note": "seen"}),
    ]


def test_messages_in_a_cell_are_json(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "U"}]
    cell = json.dumps(messages).replace('"', '""')
    path = written(tmp_path / "p.csv", f'messages\n"{cell}"\n"[1,"\n')
    first, second = records(path)
    assert first == {"messages": messages}
    assert isinstance(second, PromptError) and '"messages" is not JSON' in str(second)
    pq.write_table(pa.table({"messages": [json.dumps(messages)]}), tmp_path / "p.parquet")
    assert records(tmp_path / "p.parquet") == [{"messages": messages}]


def test_rows_of_a_table_that_do_not_fit_the_heading(tmp_path: Path) -> None:
    path = written(tmp_path / "p.csv", "prompt,n\na,1\nb\nc,2,3\nd,4\n")
    found = list(read_records(path))
    assert [place for place, _ in found] == ["line 2", "line 3", "line 4", "line 5"]
    assert "has 1 cells, the heading 2" in str(found[1][1]) and "has 3 cells" in str(found[2][1])
    assert found[3][1] == {"prompt": "d", "n": "4"}


def test_a_cell_may_be_long(tmp_path: Path) -> None:
    assert len(records(written(tmp_path / "p.csv", "prompt\n" + "a" * 200_000))[0]["prompt"]) == 200_000


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "p.PARQUET"
    table = {
        "prompt": ["a", "b"],
        "n": [2**60 + 1, None],
        "day": [date(2026, 1, 2), None],
        "at": [{"time": datetime(2026, 1, 2, 3), "x": None}, {"time": None, "x": 1}],
    }
    pq.write_table(pa.table(table), path)
    assert list(read_records(path)) == [
        (
            "row 1",
            {"prompt": "a", "n": 2**60 + 1, "day": "2026-01-02", "at": {"time": "2026-01-02T03:00:00"}},
        ),
        ("row 2", {"prompt": "b", "at": {"x": 1}}),
    ]


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.csv"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str) -> None:
    text = {"p.txt": "a", "p.jsonl": '{"prompt": "a"}', "p.csv": "prompt\na"}[name]
    assert records(written(tmp_path / name, text.encode("utf-8-sig"))) == [{"prompt": "a"}]


@pytest.mark.parametrize("name", ["p.md", "p", "p.xlsx", "p.jsonl.zst", "p.parquet.gz", "p.gz", ".jsonl"])
def test_other_kinds_of_files_are_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(PromptError, match=r"prompts are read from \.jsonl, .*\.csv, \.tsv and \.txt"):
        records(written(tmp_path / name, "id,prompt\n1,a\n"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl.gz", b"\x1f\x8bnonsense", "is a damaged gzip file"),
        ("p.txt.gz", b"no gzip", "is a damaged gzip file"),
        ("p.parquet", b"PAR1 no", "cannot be read as Parquet"),
        ("p.csv", b"prompt,prompt\n", "two columns are called 'prompt'"),
        ("p.csv", b'prompt\n"a" b\n', r"p\.csv, line 2: not a table"),
        ("p.csv", b'prompt\n"a\n', r"p\.csv, line 2: not a table"),
        ("p.csv", b"prompt\n\xff\n", "cannot be read as UTF-8"),
    ],
)
def test_files_that_cannot_be_read_at_all(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PromptError, match=message) as error:
        records(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_cut_gzip_file(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps({"prompt": list(range(9999))}).encode())[:-20])
    with pytest.raises(PromptError, match="is a damaged gzip file"):
        records(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": oops}', "not JSON, one object per line .* at column 12"),
        (b"[" * 100_000, "nested more than 100 deep"),
        (b'{"prompt": "\xff"}', "cannot be read as UTF-8"),
    ],
)
def test_lines_that_are_no_json_are_faults_of_their_own(tmp_path: Path, line: bytes, message: str) -> None:
    path = written(tmp_path / "p.jsonl", b'{"prompt": "a"}\n' + line + b'\n{"prompt": "b"}\n')
    (_, first), (place, fault), (_, last) = read_records(path)
    assert (first, place, last) == ({"prompt": "a"}, "line 2", {"prompt": "b"})
    with pytest.raises(PromptError, match=message):
        raise fault


def test_what_json_cannot_hold_is_named_by_its_field(tmp_path: Path) -> None:
    digits = "1" + "0" * 4_300
    deep = '{"a": ' * 150 + "1" + "}" * 150
    lines = [
        ('{"x": NaN}', "field 'x' is nan"),
        ('{"x": [1, {"y": -Infinity}]}', r"field 'x\[1\].y' is -inf"),
        ('{"x": 1e400}', "field 'x' is inf"),
        (f'{{"meta": {{"id": -{digits}}}}}', "field 'meta.id' is an integer of 4,301 digits"),
        (f'{{"meta": {deep}}}', r"field 'meta\.a\.a\..*' is nested more than 100 deep"),
        (r'{"x": "cut \ud83d"}', "field 'x' holds half of a surrogate pair"),
        (r'{"cut \ud83d": 1}', r"field 'cut \\ud83d' holds half of a surrogate pair"),
    ]
    path = written(tmp_path / "p.jsonl", "\n".join(line for line, _ in lines))
    for record, (_, message) in zip(records(path), lines, strict=True):
        with pytest.raises(PromptError, match=message) as error:
            record_source(record)
        assert "\n" not in str(error.value) and str(error.value).isprintable()


def test_columns_that_json_cannot_hold_are_named(tmp_path: Path) -> None:
    values = {"price": [Decimal("1.10")], "raw": [b"\x00"]}
    for name, what in (("price", "is a decimal number"), ("raw", "is bytes")):
        pq.write_table(pa.table({"prompt": ["a"], name: values[name]}), tmp_path / "p.parquet")
        with pytest.raises(PromptError, match=f"field '{name}' {what}"):
            record_source(records(tmp_path / "p.parquet")[0])


def test_every_digit_and_every_bracket_in_a_text_is_kept() -> None:
    record = {
        "id": 2**70 + 1,
        "long": 10**4200,
        "x": 0.1,
        "prompt": "[{" * 300,
        "many": [[i] for i in range(300)],
    }
    assert json.loads(record_source(record)) == record


def test_a_disk_that_fails_is_not_the_requests_fault(tmp_path: Path, monkeypatch) -> None:
    path = written(tmp_path / "p.jsonl", '{"prompt": "a"}\n')

    class Broken(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, _: Any) -> int:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "open", lambda *_: io.BufferedReader(Broken()))
    with pytest.raises(EngineError, match="Input/output error") as error:
        records(path)
    assert error.value.exit_code == 1
