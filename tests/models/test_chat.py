"""What a chat template is given: content in parts, tools, variables, the assistant's last words, the time."""

from __future__ import annotations

import inspect
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from tiny import CHATML, DATED, PRINTS, byte_tokenizer, write_records

from nla_engine.errors import EngineError, PromptError
from nla_engine.models.prompt_set import PromptSet
from nla_engine.models.prompts import read_prompts

USER = {"role": "user", "content": "U"}
#: Texts and lists of parts, as templates of multimodal models have them.
BOTH = (
    "{% for m in messages %}{{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] | trim }};{% endif %}{% endfor %}"
    "{% endif %}{{ '\n' }}{% endfor %}"
)
PARTS_ONLY = (
    "{% for m in messages %}{{ m['role'] }}: {% for part in m['content'] %}{% if part['type'] == 'text' %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{{ '\n' }}{% endfor %}"
)
#: Shows the answer alone, as templates of reasoning models do.
WITHOUT_THOUGHT = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'].split('</think>')[-1] | trim }}<|im_end|>\n"
    "{% endfor %}"
)


def read(directory: Path, template: str, *records: Any, **how: Any) -> tuple[list[str], PromptSet]:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    found = read_prompts(write_records(directory, list(records)), tokenizer, **how)
    return [tokenizer.decode(prompt.token_ids) for prompt in found], found


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (PRINTS, "user: What is 3?\n"),
        (PRINTS.replace("m['content']", "m['content'] | tojson"), 'user: "What is 3?"\n'),
        (BOTH, "user: What;is 3?;\n"),
        (PARTS_ONLY, "user: What is 3?\n"),
    ],
)
def test_parts_of_text_reach_the_template_as_it_reads_them(
    tmp_path: Path, template: str, expected: str
) -> None:
    [text], _ = read(tmp_path, template, {"messages": [{"role": "user", "content": parts("What ", "is 3?")}]})
    assert text == expected


def test_a_text_reaches_a_template_that_reads_parts_alone(tmp_path: Path) -> None:
    assert read(tmp_path, PARTS_ONLY, {"prompt": "What is 3?"})[0] == ["user: What is 3?\n"]


def test_each_role_is_asked_for_itself(tmp_path: Path) -> None:
    """This template loops over the user's parts and prints what the system says."""
    template = (
        "{% for m in messages %}{{ m['role'] }}: {% if m['role'] == 'user' and m['content'] is not string %}"
        "{{ m['content'][0]['text'] }}+{{ m['content'][1]['text'] }}{% else %}{{ m['content'] }}{% endif %}"
        "{{ '\n' }}{% endfor %}"
    )
    messages = [{"role": role, "content": parts("a", "b")} for role in ("system", "user", "tool")]
    assert read(tmp_path, template, {"messages": messages})[0] == ["system: ab\nuser: a+b\ntool: ab\n"]


CONTENT_FAULTS = [
    ([{"role": "user", "content": None}], r'messages\[0\] has no "content"'),
    ([USER, {"role": "assistant"}, USER], r'messages\[1\] has no "content"'),
    ([{"content": "no role"}], r'messages\[0\] has no "role"'),
    ([{"role": None, "content": "x"}], r'messages\[0\] has no "role"'),
    ([{"role": "user", "content": 3}], r"messages\[0\].content is neither a text nor a list"),
    ([{"role": "user", "content": {"a": 1}}], r"messages\[0\].content is neither"),
    (
        [{"role": "user", "content": [{"type": "image", "url": "x"}]}],
        r"messages\[0\].content\[0\] is of type 'image'",
    ),
    ([{"role": "user", "content": ["x"]}], r"messages\[0\].content\[0\] is not a part"),
    ([{"role": "user", "content": [{"type": "text"}]}], r'messages\[0\].content\[0\] has no "text"'),
    (
        [{"role": "user", "content": [{"type": "text", "text": None}]}],
        r'messages\[0\].content\[0\] has no "text"',
    ),
    ("hi", '"messages" is not a list'),
    ([], '"messages" is not a list'),
    ([[USER]], '"messages" is not a list'),
]


@pytest.mark.parametrize(("messages", "message"), CONTENT_FAULTS)
def test_what_is_no_text_is_refused_with_its_place(tmp_path: Path, messages: Any, message: str) -> None:
    records = ({"messages": [USER]}, {"messages": messages}, {"messages": [USER]})
    with pytest.raises(PromptError, match=rf"p.jsonl, line 2: {message}") as error:
        read(tmp_path, PRINTS, *records)
    assert "\n" not in str(error.value)
    assert len(read(tmp_path, PRINTS, *records, skip_bad=True)[0]) == 2


def test_a_call_of_a_tool_needs_no_content(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}"
        "{% for call in m['tool_calls'] %}[{{ call['function']['name'] }}]{% endfor %}{{ '\n' }}{% endfor %}"
    )
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    messages = [USER, call, {"role": "tool", "content": "12"}]
    assert read(tmp_path, template, {"messages": messages})[0] == ["user: U\nassistant: [f]\ntool: 12\n"]


TAKES = (
    "{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}"
    + PRINTS
    + "{% if documents %}{{ documents[0]['text'] }}"
    "{% endif %}{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
)


def test_tools_and_variables_of_a_record_reach_the_template(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    variables = {"enable_thinking": False, "documents": [{"title": "t", "text": "D"}]}
    record = {"messages": [USER], "tools": tools, "chat_template_kwargs": variables}
    texts, found = read(tmp_path, TAKES, record, {"prompt": "U", "tools": tools}, {"prompt": "U"})
    head = 'TOOLS [{"type": "function", "function": {"name": "f"}}]\n'
    assert texts == [f"{head}user: U\nD<think></think>", f"{head}user: U\n", "user: U\n"]
    assert found.notes == [] and json.loads(found[0].source) == record


def test_what_the_template_does_not_read_is_told(tmp_path: Path) -> None:
    record = {"prompt": "U", "tools": [{}], "chat_template_kwargs": {"enable_thinking": False}}
    texts, found = read(tmp_path, PRINTS, record, record, {"prompt": "V"})
    assert texts == ["user: U\n", "user: U\n", "user: V\n"]
    assert found.notes == [
        '2 of 3 prompts have "tools", which the chat template does not read',
        '2 of 3 prompts have "chat_template_kwargs.enable_thinking", which the chat template does not read',
    ]
    _, found = read(tmp_path, PRINTS, record, chat=False)
    assert len(found.notes) == 2 and "which is not used for raw text" in found.notes[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tools": "f"}, '"tools" is not a list of objects'),
        ({"tools": ["f"]}, '"tools" is not a list of objects'),
        ({"chat_template_kwargs": [1]}, '"chat_template_kwargs" is not an object'),
        ({"chat_template_kwargs": {"add_generation_prompt": False}}, 'must not hold "add_generation_prompt"'),
        ({"chat_template_kwargs": {"chat_template": "x"}}, 'must not hold "chat_template"'),
        ({"chat_template_kwargs": {"messages": []}}, 'must not hold "messages"'),
        ({"chat_template_kwargs": {"tools": []}}, 'must not hold "tools"'),
    ],
)
def test_arguments_of_the_wrong_kind_are_refused(tmp_path: Path, fields: Any, message: str) -> None:
    with pytest.raises(PromptError, match=f"line 1: .*{message}"):
        read(tmp_path, TAKES, {"prompt": "U", **fields})


def test_a_conversation_that_has_ended_is_read_as_it_stands(tmp_path: Path) -> None:
    record = {"messages": [USER, {"role": "assistant", "content": "It is 12."}]}
    texts, found = read(tmp_path, CHATML, record, {"messages": [USER]}, replies=False)
    assert texts == [
        "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nIt is 12.<|im_end|>\n",
        "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n",
    ]
    assert found.notes == ["1 of 2 prompts end with the assistant's words: they are read as they stand"]


@pytest.mark.parametrize("content", ["It is 1", parts("It ", "is 1"), "It is ", "\n It is 1"])
def test_the_assistants_last_words_are_continued(tmp_path: Path, content: Any) -> None:
    texts, found = read(tmp_path, CHATML, {"messages": [USER, {"role": "assistant", "content": content}]})
    said = content if isinstance(content, str) else "It is 1"
    assert texts == [f"<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n{said}"]
    assert found.notes == ["1 of 1 prompts end with the assistant's words: they are continued"]


@pytest.mark.parametrize(
    ("template", "last", "message"),
    [
        (CHATML, {"content": ""}, "has no text to go on with"),
        (CHATML, {"content": " \n"}, "has no text to go on with"),
        (CHATML, {"tool_calls": [{"function": {"name": "f"}}]}, "has no text to go on with"),
        (WITHOUT_THOUGHT, {"content": "<think>so</think>It is"}, "the chat template refuses it"),
        (
            CHATML.replace("m['content']", "m['content'] | replace('is', 'IS')"),
            {"content": "It is"},
            "refuses it",
        ),
        (
            # the same words stand at the start, where transformers' own check finds them
            "so {% for m in messages %}{{ m['content'] | replace('so', 'thus') }}{% endfor %}",
            {"content": "so"},
            "the chat template changes the assistant's last words",
        ),
    ],
)
def test_last_words_that_cannot_be_continued_are_refused(
    tmp_path: Path, template: str, last: dict[str, Any], message: str
) -> None:
    with pytest.raises(PromptError, match=message) as error:
        read(tmp_path, template, {"messages": [USER, {"role": "assistant", **last}]})
    assert "\n" not in str(error.value)


def test_a_template_that_strips_thought_continues_what_it_shows(tmp_path: Path) -> None:
    texts, _ = read(
        tmp_path, WITHOUT_THOUGHT, {"messages": [USER, {"role": "assistant", "content": " It is "}]}
    )
    assert texts == ["user: U<|im_end|>\nassistant: It is"]


def test_text_is_not_put_into_a_template_unasked(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match='line 1: "text" is read as it is: use --raw or --corpus'):
        read(tmp_path, CHATML, {"text": "U"})
    assert read(tmp_path, CHATML, {"text": "U"}, chat=False)[0] == ["U"]
    assert read(tmp_path, PRINTS, {"prompt": "U", "text": "a field of the user's"})[0] == ["user: U\n"]


@pytest.mark.parametrize(
    ("record", "chat", "message"),
    [
        ({"question": "a"}, None, 'no field "prompt" or "messages"'),
        ({"question": "a"}, False, 'no field "prompt" or "text"'),
        ({"prompt": 3}, None, '"prompt" is not a text'),
        ({"prompt": ""}, None, "the prompt is empty"),
        ({"prompt": "", "text": "a"}, False, "the prompt is empty"),
        ({"prompt": "a", "messages": [USER]}, None, 'has "prompt" and "messages"'),
        ({"messages": [USER]}, False, '"messages" needs a chat template'),
    ],
)
def test_records_without_a_prompt(tmp_path: Path, record: Any, chat: bool | None, message: str) -> None:
    with pytest.raises(PromptError, match=f"line 1: {message}"):
        read(tmp_path, CHATML, record, chat=chat)


def test_the_time_of_a_template_can_be_given(tmp_path: Path) -> None:
    then = datetime(2031, 2, 3, 4, 5, 6)
    texts, found = read(tmp_path, DATED, {"prompt": "U"}, {"prompt": "V"}, clock=then)
    assert texts == [f"Today: 03 Feb 2031 04:05:06\nuser: {name}\n" for name in "UV"]
    assert found.clock == then
    before = datetime.now().replace(microsecond=0)
    texts, found = read(tmp_path, DATED, {"prompt": "U"})
    assert found.clock is not None and before <= found.clock <= datetime.now()
    assert texts == [f"Today: {found.clock:%d %b %Y %H:%M:%S}\nuser: U\n"]


def test_a_template_that_asks_for_no_time_has_no_clock(tmp_path: Path) -> None:
    assert read(tmp_path, PRINTS, {"prompt": "U"}, clock=datetime(2031, 2, 3))[1].clock is None


def test_a_clock_that_cannot_be_set_is_told(tmp_path: Path, monkeypatch) -> None:
    """As a later transformers might have it: the template's clock reads the time elsewhere."""
    from transformers.utils import chat_template_utils

    make = inspect.unwrap(chat_template_utils._compile_jinja_template)  # what is kept must stay as it is

    def own_clock(template: str) -> Any:
        compiled = make(template)
        compiled.environment.globals["strftime_now"] = lambda form: datetime(1999, 1, 1).strftime(form)
        return compiled

    monkeypatch.setattr(chat_template_utils, "_compile_jinja_template", own_clock)
    with pytest.raises(EngineError, match="cannot be set"):
        read(tmp_path, DATED + " ", {"prompt": "U"}, clock=datetime(2031, 2, 3))
