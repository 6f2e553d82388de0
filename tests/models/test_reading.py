"""What holds of every record of a file: the column of the text, the system message, variables of the chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import CHATML, PRINTS, byte_tokenizer, write_records

from nla_engine.errors import PromptError
from nla_engine.models.chat import Reading
from nla_engine.models.prompt_set import PromptSet
from nla_engine.models.prompts import read_prompts

USER = {"role": "user", "content": "U"}
OWN = {"role": "system", "content": "Own."}
THINKS = "{% if enable_thinking is defined %}[{{ enable_thinking | tojson }}]{% endif %}" + PRINTS
WITHOUT_SYSTEM = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}\n{% endfor %}"
REFUSES_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + PRINTS
)


def read(
    path: Path, reading: Reading, template: str | None = PRINTS, **how: Any
) -> tuple[list[str], PromptSet]:
    tokenizer = byte_tokenizer(chat=False)
    tokenizer.chat_template = template
    found = read_prompts(path, tokenizer, reading=reading, **how)
    return [tokenizer.decode(prompt.token_ids) for prompt in found], found


def test_a_named_column_is_the_text(tmp_path: Path) -> None:
    """Whatever else the record holds; it is kept as it is."""
    records = [{"body": "A", "prompt": "no", "text": 3}, {"body": "B", "messages": []}]
    path = write_records(tmp_path, records)
    texts, found = read(path, Reading("body"), chat=False)
    assert texts == ["A", "B"] and [json.loads(prompt.source) for prompt in found] == records
    assert read(path, Reading("body"))[0] == ["user: A\n", "user: B\n"]


def test_a_named_column_may_hold_conversations(tmp_path: Path) -> None:
    path = write_records(tmp_path, [{"talk": [OWN, USER]}, {"talk": "plain"}])
    assert read(path, Reading("talk"))[0] == ["system: Own.\nuser: U\n", "user: plain\n"]
    with pytest.raises(PromptError, match='line 1: "talk" is a list; only a text'):
        read(path, Reading("talk"), chat=False)
    path = write_records(tmp_path, [{"talk": [USER, {"role": "user"}]}])
    with pytest.raises(PromptError, match=r'line 1: talk\[1\] has no "content"'):
        read(path, Reading("talk"))


def test_a_column_of_a_table(tmp_path: Path) -> None:
    pq.write_table(pa.table({"content": ["a", "b"], "id": [1, 2]}), tmp_path / "t.parquet")
    (tmp_path / "t.csv").write_text("content,id\na,1\nb,2\n")
    for name in ("t.parquet", "t.csv"):
        assert read(tmp_path / name, Reading("content"), chat=False)[0] == ["a", "b"]


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("skip_bad", [True, False])
def test_a_column_that_is_not_there_is_refused_by_name(tmp_path: Path, chat: bool, skip_bad: bool) -> None:
    path = write_records(tmp_path, [{"text": "a", "id": 1}, {"prompt": "b", "id": 1}])
    fields = "id, prompt, text" if skip_bad else "text, id"  # those of all records, or of the first
    with pytest.raises(
        PromptError, match=rf'no field "body" \(--text-column\): the fields are {fields}( |$)'
    ):
        read(path, Reading("body"), chat=chat, skip_bad=skip_bad)
    (tmp_path / "p.txt").write_text("a\n")
    with pytest.raises(PromptError, match=r'no field "body" .* the fields are prompt'):
        read(tmp_path / "p.txt", Reading("body"), chat=chat, skip_bad=skip_bad)
    path = write_records(tmp_path, [{"text": "a"}, {"body": "b"}])
    if skip_bad:
        assert len(read(path, Reading("body"), chat=chat, skip_bad=True)[0]) == 1
    path = write_records(tmp_path, [{"body": 3}])
    with pytest.raises(PromptError, match='"body" is not a text' if not skip_bad else "no usable prompt"):
        read(path, Reading("body"), chat=chat, skip_bad=skip_bad)


@pytest.mark.parametrize("template", [PRINTS, CHATML])
@pytest.mark.parametrize("system", ["Be brief.", ""])
def test_a_system_message_for_those_without_one(tmp_path: Path, template: str, system: str) -> None:
    """As transformers renders the same conversations; a record with its own keeps it."""
    conversations = [[USER], [OWN, USER], [{"role": "user", "content": "x"}]]
    records = [{"prompt": "U"}, {"messages": conversations[1]}, {"messages": conversations[2]}]
    texts, found = read(write_records(tmp_path, records), Reading(system=system), template)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    given = {"role": "system", "content": system}
    expected = [
        tokenizer.apply_chat_template(
            conversation if conversation[0] is OWN else [given, *conversation],
            tokenize=False,
            add_generation_prompt=True,
        )
        for conversation in conversations
    ]
    assert texts == expected and [json.loads(prompt.source) for prompt in found] == records
    assert found.notes == [
        "1 of 3 prompts have a system message of their own: they keep it, and do not get that of --system"
    ]


def test_a_template_that_does_not_show_the_system_message(tmp_path: Path) -> None:
    path = write_records(tmp_path, [{"prompt": "a"}, {"prompt": "b"}])
    texts, found = read(path, Reading(system="S"), WITHOUT_SYSTEM)
    assert texts == ["a\n", "b\n"]
    assert found.notes == [
        "2 of 2 prompts get the message of --system, which the chat template does not show"
    ]
    with pytest.raises(PromptError, match="line 1: the chat template refuses it .*System role not supported"):
        read(path, Reading(system="S"), REFUSES_SYSTEM)


def test_variables_of_the_template(tmp_path: Path) -> None:
    records: list[Any] = [{"prompt": "a"}, {"prompt": "b", "chat_template_kwargs": {"enable_thinking": True}}]
    path = write_records(tmp_path, [*records, {"prompt": "c", "chat_template_kwargs": {"mood": "x"}}])
    reading = Reading(variables={"enable_thinking": False, "mood": 1})
    texts, found = read(path, reading, THINKS)
    assert texts == ["[false]user: a\n", "[true]user: b\n", "[false]user: c\n"]
    assert found.notes == [
        "2 of 3 prompts get --template-option mood, which the chat template does not read",
        '1 of 3 prompts have "chat_template_kwargs.mood", which the chat template does not read',
    ]


def test_what_a_template_cannot_be_given(tmp_path: Path) -> None:
    path = write_records(tmp_path, [{"prompt": "a"}])
    for name in ("tools", "messages", "add_generation_prompt", "tokenize"):
        with pytest.raises(PromptError, match=f"--template-option must not give {name}"):
            read(path, Reading(variables={name: 1}))
    for reading in (Reading(system="S"), Reading(variables={"x": 1})):
        with pytest.raises(PromptError, match="need a chat template, and the model's tokenizer has none"):
            read(path, reading, None)
