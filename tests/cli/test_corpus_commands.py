"""Options of capture that say what of a corpus is read and stored, and what every chat is given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from commands import call, capture, check_refused, contents, written
from tiny import write_records

from nla_engine.errors import RequestError
from nla_engine.models.documents import WINDOW
from nla_engine.options import json_values
from nla_engine.store import CaptureStore

CORPUS: dict[str, object] = {"corpus": True, "max_new_tokens": None}

FAULTS: dict[str, tuple[Callable[[Path, Path], dict[str, object]], str]] = {
    "no such column": (
        lambda r, t: {"text_column": "body"},
        r'line 1: no field "body" \(--text-column\): the fields are prompt, n',
    ),
    "a length without a corpus": (
        lambda r, t: {"max_tokens": 9},
        "--max-tokens and --long are for documents",
    ),
    "windows without a corpus": (
        lambda r, t: {"long": "windows"},
        "--max-tokens and --long are for documents",
    ),
    "no such way": (
        lambda r, t: CORPUS | {"long": "fold"},
        "--long is 'fold': it must be one of refuse, cut, windows",
    ),
    "no tokens": (lambda r, t: CORPUS | {"max_tokens": 0}, "--max-tokens is 0: it must be 1 or more"),
    "more than the model reads": (
        lambda r, t: CORPUS | {"max_tokens": 513},
        "--max-tokens is 513, and the model reads at most 512",
    ),
    "a document too long": (
        lambda r, t: CORPUS | {"max_tokens": 4},
        "line 1: the prompt has .* the limit is 4",
    ),
    "a field that windows need": (
        lambda r, t: (
            CORPUS
            | {"long": "windows", "prompts": written(t / "p.jsonl", '{"text": "a", "nla_window": 1}\n')}
        ),
        'line 1: has a field "nla_window"',
    ),
    "no rows of a document": (lambda r, t: {"per_document": 0}, "--per-document is 0: it must be 1 or more"),
    "a position below 0": (lambda r, t: {"min_position": -1}, "--min-position is -1: it must be 0 or more"),
    "no row left": (lambda r, t: CORPUS | {"min_position": 500}, "no row would be left of any prompt"),
    "no pattern": (
        lambda r, t: {"tokens": "[0-9"},
        r"--tokens is '\[0-9': it must be a regular expression: unt",
    ),
    "a pattern of no token": (lambda r, t: {"tokens": "xyz"}, "--tokens 'xyz' matches no token of .*base"),
    "no prompt with such a row": (
        lambda r, t: {"tokens": "Q", "positions": "prompt", "raw": True, "skip_first": True},
        "no row would be left of any prompt: change --positions or --tokens or --skip-first",
    ),
    "every none": (lambda r, t: {"every": 0}, "--every is 0: it must be 1 or more"),
    "blocks beyond the last": (lambda r, t: {"layer": "2-9"}, "layer 4 does not exist: .*base has 4 blocks"),
    "blocks backwards": (lambda r, t: {"layer": "3-1"}, "--layer is '3-1': 3-1 ends before it begins"),
    "blocks of another kind": (
        lambda r, t: {"layer": "all,last"},
        "--layer is 'all,last': it must be block numbers from 0 on, ranges such as 5-20, or all",
    ),
    "a system message for raw text": (
        lambda r, t: {"raw": True, "system": "S"},
        "--system, --prefill and --template-option are for a chat template",
    ),
    "a variable for a corpus": (
        lambda r, t: CORPUS | {"template_option": "x=1"},
        "--system, --prefill and --template-option are for a chat template",
    ),
    "a variable without a value": (
        lambda r, t: {"template_option": "thinking"},
        "--template-option is 'thinking': it must be NAME=VALUE",
    ),
    "a variable of the engine's": (
        lambda r, t: {"template_option": "tools=[]"},
        "--template-option must not give tools",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_capture_refuses(fault: str, root: Path, tmp_path: Path) -> None:
    """In one line, and nothing is written."""
    changes, message = FAULTS[fault]
    before = contents(root)
    check_refused(call(*capture(root, **{"out": tmp_path / "x.zarr", **changes(root, tmp_path)})), message)
    assert not (tmp_path / "x.zarr").exists() and contents(root) == before


def test_a_corpus_by_command(root: Path, tmp_path: Path) -> None:
    """Windows of a column, some rows of each document; the page says so, and a resumed run must say the same."""
    prompts = write_records(
        tmp_path, [{"body": "word " * (3 * i + 1), "prompt": "no", "n": i} for i in range(6)]
    )
    choice: dict[str, object] = {
        **CORPUS,
        "prompts": prompts,
        "text_column": "body",
        "max_tokens": 20,
        "long": "windows",
        "per_document": 3,
        "min_position": 2,
        "skip_special": True,
    }
    ran = call(*capture(root, tmp_path / "x.zarr", **choice), "--json")
    assert ran.code == 0, ran.err
    store = CaptureStore.open(tmp_path / "x.zarr")
    assert ran.json["rows"] == store.rows == 6 * 3
    assert "of 6 prompts have more than 20 tokens: they are split into windows" in ran.err
    documents = [sequence.source[WINDOW]["document"] for sequence in store.iter_sequences()]
    assert documents == [i for i in range(6) for _ in range(-(-5 * (3 * i + 1) // 20))]
    assert store.column("position").min() >= 2
    rows = store.where(f"record.{WINDOW}.document == 4 and record.n == 4")
    assert len(rows) == 3
    page = " ".join(call("info", tmp_path / "x.zarr").out.split())
    for shown in ("text_column body", "max_tokens 20", "long windows", "per_document 3", "min_position 2"):
        assert shown in page
    again = call(*capture(root, tmp_path / "x.zarr", **choice, resume=True))
    assert again.code == 0
    for name, other in (("max_tokens", 21), ("per_document", None), ("skip_special", None), ("long", "cut")):
        changed = {**choice, name: other, "resume": True}
        check = call(*capture(root, tmp_path / "x.zarr", **changed))
        assert check.code == 2 and f"{name} was" in check.err, check.err


def test_rows_and_layers_by_command(root: Path, tmp_path: Path) -> None:
    """`info` says which were chosen; the audit holds; a resumed run must choose the same."""
    chosen: dict[str, object] = {
        "layer": "all", "positions": "all", "tokens": "[a-z0-9]", "every": 2, "skip_first": True, "skip_sinks": True
    }  # fmt: skip
    ran = call(*capture(root, tmp_path / "x.zarr", **chosen), "--json")
    assert ran.code == 0, ran.err
    store = CaptureStore.open(tmp_path / "x.zarr")
    assert ran.json["rows"] == store.rows == len(store.where("token matches '[a-z0-9]' and not sink")) > 0
    assert ran.json["layers"] == [0, 1, 2, 3] and (store.column("position") % 2 == 0).all()
    page = " ".join(call("info", tmp_path / "x.zarr").out.split())
    for shown in ("layers 0, 1, 2, 3", "tokens [a-z0-9]", "every 2", "skip_first yes", "skip_sinks yes"):
        assert shown in page, page
    assert "min_position" not in page and "skip_special" not in page
    assert call("verify", tmp_path / "x.zarr", "--model", root / "base", "--device", "cpu").code == 0
    same = chosen | {"layer": "3,0-2", "resume": True}
    assert call(*capture(root, tmp_path / "x.zarr", **same)).code == 0
    for name, other in (("tokens", "[a-z]"), ("every", 3), ("skip_sinks", None), ("layer", "0-2")):
        ran = call(*capture(root, tmp_path / "x.zarr", **same | {name: other}))
        assert ran.code == 2 and f"{name} was" in ran.err, ran.err


def test_what_every_chat_is_given(root: Path, tmp_path: Path) -> None:
    given = ["--system", "Answer in one word.", "--template-option", "mood=[1]", "--template-option", "x=a b"]
    ran = call(*capture(root, tmp_path / "x.zarr"), *given)
    assert ran.code == 0, ran.err
    assert "5 of 5 prompts get --template-option mood, which the chat template does not read" in ran.err
    store = CaptureStore.open(tmp_path / "x.zarr")
    head = "<|im_start|>system\nAnswer in one word.<|im_end|>\n<|im_start|>user\n"
    assert all(sequence.prompt_text().startswith(head) for sequence in store.iter_sequences())
    options = store.provenance["options"]
    assert (options["system"], options["template_option"]) == (
        "Answer in one word.",
        {"mood": [1], "x": "a b"},
    )
    for changed in (given[:2], given[2:], [*given[:-1], "x=b"]):
        ran = call(*capture(root, tmp_path / "x.zarr", resume=True), *changed)
        assert ran.code == 2 and ("system was" in ran.err or "template_option" in ran.err), ran.err
    assert call(*capture(root, tmp_path / "x.zarr", resume=True), *given).code == 0


def test_values_are_json_where_they_parse() -> None:
    given = ["a=false", "b=1e3", 'c={"d": [null]}', "e=", "f=NaN", "g=no=yes", 'h="3"', "i=" + "[" * 100_000]
    values = json_values("template_option", given)
    assert values == {
        "a": False,
        "b": 1000.0,
        "c": {"d": [None]},
        "e": "",
        "f": "NaN",
        "g": "no=yes",
        "h": "3",
        "i": "[" * 100_000,
    }
    assert json_values("template_option", []) is None
    for wrong in (["a"], ["=1"], ["a-b=1"], ["a=1", "a=2"], ['a="\\ud800"'], ["a=\udc80"]):
        with pytest.raises(RequestError, match="--template-option"):
            json_values("template_option", wrong)
