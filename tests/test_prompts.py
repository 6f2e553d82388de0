"""Prompt files: every format, every fault with its place."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import byte_tokenizer

from nla_engine.errors import PromptError
from nla_engine.prompts import read_prompts

TOKENIZER = byte_tokenizer()


def texts(path: Path, **kwargs: object) -> list[str]:
    found = read_prompts(path, TOKENIZER, **kwargs)  # type: ignore[arg-type]
    return [TOKENIZER.decode(prompt.token_ids) for prompt in found.prompts]


def test_jsonl_keeps_records_and_renders_chat(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    records = [
        {"prompt": "37 × 46 = ?", "a": 37, "nested": {"x": [1, None, "ü"]}},
        {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}], "id": "k"},
    ]
    path.write_text(
        "\n".join(json.dumps(r, ensure_ascii=False) for r in records) + "\r\n\n", encoding="utf-8"
    )
    found = read_prompts(path, TOKENIZER)
    assert [json.loads(prompt.source) for prompt in found.prompts] == records
    assert texts(path) == [
        "<|im_start|>user\n37 × 46 = ?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n",
    ]


def test_raw_takes_the_text_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("one\n\n  two \n㈎\n", encoding="utf-8")
    assert texts(path, chat=False) == ["one", "  two ", "㈎"]
    assert read_prompts(path, byte_tokenizer(chat=False)).prompts[0].token_ids == tuple(
        TOKENIZER.encode("one")
    )


def test_bos_is_given_once_in_both_ways(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", start)]
    )
    path = tmp_path / "p.txt"
    path.write_text("a")
    for chat in (True, False):
        ids = read_prompts(path, tokenizer, chat=chat).prompts[0].token_ids
        assert ids[0] == start and ids[1] != start


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("a" if name == "p.txt" else '{"prompt": "a"}', encoding="utf-8-sig")
    assert [json.loads(p.source) for p in read_prompts(path, TOKENIZER, chat=False).prompts] == [
        {"prompt": "a"}
    ]


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"prompt": ["a", "b"], "n": [1, None]}), path)
    found = read_prompts(path, TOKENIZER, chat=False)
    assert [json.loads(prompt.source) for prompt in found.prompts] == [
        {"prompt": "a", "n": 1},
        {"prompt": "b"},
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', "line 2: not JSON"),
        ("p.jsonl", '{"prompt": "a"}\n\n[1]\n', "line 3: not an object"),
        ("p.jsonl", '{"text": "a"}', 'line 1: no field "prompt" or "messages"'),
        ("p.jsonl", '{"prompt": 3}', 'line 1: "prompt" is not a text'),
        ("p.jsonl", '{"messages": "hi"}', 'line 1: "messages" is not a list'),
        ("p.jsonl", '{"messages": []}', 'line 1: "messages" is not a list'),
        ("p.jsonl", '{"prompt": "' + "a" * 99 + '"}', r"line 1: the prompt has \d+ tokens, the limit is 60"),
        ("p.jsonl", '{"prompt": "a", "x": NaN}', "line 1: the record cannot be kept as JSON"),
        ("p.jsonl", r'{"prompt": "cut \ud83d"}', "line 1: the text holds half of a surrogate pair"),
        ("p.jsonl", "", "no usable prompt"),
        ("p.txt", "\n \n", "no usable prompt"),
        ("p.txt", b"\xff\xfe", "cannot be read as UTF-8"),
        ("p.parquet", b"PAR1 no", "cannot be read as Parquet"),
    ],
)
def test_faults_name_their_place(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(PromptError, match=message) as error:
        read_prompts(path, TOKENIZER, max_tokens=60)
    assert str(path) in str(error.value)


def test_missing_file_and_missing_template(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="no such file"):
        read_prompts(tmp_path / "none.jsonl", TOKENIZER)
    (tmp_path / "p.txt").write_text("a")
    with pytest.raises(PromptError, match="no chat template"):
        read_prompts(tmp_path / "p.txt", byte_tokenizer(chat=False), chat=True)
    (tmp_path / "p.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}')
    with pytest.raises(PromptError, match="needs a chat template"):
        read_prompts(tmp_path / "p.jsonl", TOKENIZER, chat=False)


def test_bad_records_can_be_skipped_and_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\nnonsense\n{"x": 1}\n{"prompt": "b"}\n')
    found = read_prompts(path, TOKENIZER, skip_bad=True)
    assert len(found) == 2 and [message.split(": ")[0][-6:] for message in found.skipped] == [
        "line 2",
        "line 3",
    ]
    path.write_text("nonsense\n")
    with pytest.raises(PromptError, match=r"no usable prompt in it \(1 skipped\)"):
        read_prompts(path, TOKENIZER, skip_bad=True)


def test_common_prefix(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("abcX\nabc\nabcde\n")
    found = read_prompts(path, TOKENIZER, chat=False)
    assert found.common_prefix() == 2  # the last token of the shortest is its own
    path.write_text("abc\n")
    assert read_prompts(path, TOKENIZER, chat=False).common_prefix() == 0
