"""What --prompts names: several files, directories, standard input, formats that are said."""

from __future__ import annotations

import gzip
import io
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import call, capture, check_refused, shell, written
from tiny import byte_tokenizer

from nla_engine.config import CaptureOptions
from nla_engine.config.capture import PROMPT_FORMATS
from nla_engine.errors import PromptError
from nla_engine.models.prompt_files import FORMS
from nla_engine.models.prompt_sources import PromptSources
from nla_engine.models.prompts import read_prompts
from nla_engine.store import CaptureStore


def records(*paths: Path, form: str | None = None) -> list[Any]:
    return [record for _, record in PromptSources.find(paths, form).records()]


def piped(monkeypatch: pytest.MonkeyPatch, data: str | bytes) -> None:
    raw = io.BytesIO(data if isinstance(data, bytes) else data.encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(raw))


def test_the_formats_of_the_option_are_those_that_can_be_read() -> None:
    assert tuple(FORMS) == PROMPT_FORMATS


def test_several_files_one_after_the_other(tmp_path: Path) -> None:
    first = written(tmp_path / "b.csv", "prompt,topic\none,tides\ntwo,moon\n")
    second = written(tmp_path / "a.txt", "three\n")
    found = list(PromptSources.find([first, second]).records())
    assert found == [
        (f"{first}, line 2", {"prompt": "one", "topic": "tides"}),
        (f"{first}, line 3", {"prompt": "two", "topic": "moon"}),
        (f"{second}, line 1", {"prompt": "three"}),
    ]


def test_a_directory_in_the_order_of_its_paths(tmp_path: Path) -> None:
    """Below it too; what is no prompt file is told, and what is hidden is passed over."""
    (tmp_path / "d" / "in" / ".cache").mkdir(parents=True)
    written(tmp_path / "d" / "z.jsonl", '{"prompt": "z"}\n')
    written(tmp_path / "d" / "in" / "p.tsv", "prompt\tn\np\t1\n")
    written(tmp_path / "d" / "a.txt.gz", gzip.compress(b"a\n"))
    pq.write_table(pa.table({"prompt": ["q"]}), tmp_path / "d" / "in" / "q.parquet")
    written(tmp_path / "d" / "README.md", "no prompt")
    written(tmp_path / "d" / ".hidden.txt", "no prompt")
    written(tmp_path / "d" / "in" / ".cache" / "x.txt", "no prompt")
    sources = PromptSources.find([tmp_path / "d"])
    assert [record["prompt"] for _, record in sources.records()] == ["a", "p", "q", "z"]
    told = f"{tmp_path / 'd'}: 1 files there are no prompt files and are not read: README.md"
    assert sources.notes == (told,)
    assert told in read_prompts(tmp_path / "d", byte_tokenizer(chat=False)).messages()
    with pytest.raises(PromptError, match="holds no prompt file"):
        PromptSources.find([written_directory(tmp_path / "e")])


def written_directory(path: Path) -> Path:
    path.mkdir()
    written(path / "notes.md", "x")
    return path


def test_whole_files(tmp_path: Path) -> None:
    """Line ends and blank lines stay; every file counts, whatever its suffix."""
    (tmp_path / "d").mkdir()
    texts = {"a.md": "one\n\ntwo\n", "b.txt": "\ufeffthree\r\n"}
    for name, text in texts.items():
        (tmp_path / "d" / name).write_bytes(text.encode())
    assert records(tmp_path / "d", form="whole") == [
        {"prompt": "one\n\ntwo\n", "file": str(tmp_path / "d" / "a.md")},
        {"prompt": "three\r\n", "file": str(tmp_path / "d" / "b.txt")},
    ]


def test_a_format_that_is_said_comes_before_the_suffix(tmp_path: Path) -> None:
    path = written(tmp_path / "p.dat", "prompt,n\na,1\n")
    assert records(path, form="csv") == [{"prompt": "a", "n": "1"}]
    with pytest.raises(PromptError, match="prompts are read from"):
        records(path)


@pytest.mark.parametrize("pack", [lambda data: data, gzip.compress])
@pytest.mark.parametrize(
    ("form", "data"),
    [
        (None, b'\n{"prompt": "a"}\n{"prompt": "b"}\n'),
        ("csv", b"prompt\na\nb\n"),
        ("tsv", b"prompt\tn\na\t1\nb\t2\n"),
        ("txt", b"a\nb\n"),
    ],
)
def test_standard_input(monkeypatch, form: str | None, data: bytes, pack: Any) -> None:
    piped(monkeypatch, pack(data))
    sources = PromptSources.find([Path("-")], form)
    for _ in range(2):  # the loaded model may have other limits: then they are read again
        assert [record["prompt"] for _, record in sources.records()] == ["a", "b"]


def test_parquet_through_a_pipe(monkeypatch) -> None:
    made = io.BytesIO()
    pq.write_table(pa.table({"prompt": ["a"], "n": [3]}), made)
    piped(monkeypatch, made.getvalue())
    assert records(Path("-"), form="parquet") == [{"prompt": "a", "n": 3}]


def test_a_table_on_standard_input_is_never_taken_for_prompts(monkeypatch) -> None:
    piped(monkeypatch, "prompt,topic\nWhat is 3?,numbers\n")
    with pytest.raises(PromptError, match="does not begin with a JSON object: say with --prompt-format"):
        PromptSources.find([Path("-")])
    with pytest.raises(PromptError, match="can be read once"):
        PromptSources.find([Path("-"), Path("-")])


def test_from_the_command_line(root: Path, tmp_path: Path) -> None:
    """Two files and a pipe in one run: every record is in the store, in order; the fault of a pipe has its line."""
    table = written(tmp_path / "p.csv", "prompt,topic\none,tides\n")
    lines = written(tmp_path / "q.jsonl", '{"prompt": "two", "topic": "moon"}\n')
    command = capture(root, tmp_path / "x.zarr", prompts=table)
    ran = shell(*command, "--prompts", lines, "--prompts", "-", input='{"prompt": "three"}\n')
    assert ran.code == 0, ran.err
    store = CaptureStore.open(tmp_path / "x.zarr")
    assert [json.loads(sequence.record)["prompt"] for sequence in store.iter_sequences()] == [
        "one",
        "two",
        "three",
    ]
    assert store.provenance["options"]["prompts"] == f"{table}, {lines}, -"
    bad = shell(*capture(root, tmp_path / "y.zarr", prompts="-"), input='{"prompt": "a"}\n{"n": 1}\n')
    check_refused(bad, 'standard input, line 2: no field "prompt" or "messages"')
    assert not (tmp_path / "y.zarr").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prompts": "some-lab/questions"},
            "some-lab/questions: no such file. .*hf download some-lab/questions --repo-type dataset",
        ),
        (
            {"prompts": "hf://datasets/some-lab/questions"},
            "hf://datasets/some-lab/questions: this has to be on a local disk",
        ),
        ({"prompt_format": "xml"}, "--prompt-format is 'xml': it must be one of"),
    ],
)
def test_what_cannot_be_read_is_refused(changes: dict, message: str, root: Path, tmp_path: Path) -> None:
    check_refused(call(*capture(root, tmp_path / "x.zarr", **changes)), message)
    assert not (tmp_path / "x.zarr").exists()


def test_a_single_path_is_a_list_of_one(tmp_path: Path) -> None:
    options = CaptureOptions(model="m", prompts=tmp_path / "p.jsonl", layer=(1,), out="o")  # type: ignore[arg-type]
    assert options.prompts == (tmp_path / "p.jsonl",) and options.to_dict()["prompts"] == str(
        tmp_path / "p.jsonl"
    )
