"""Prompt records -> the text that the model reads: through its chat template, or as written.

Decides what a template is given: messages, tools, variables, whether to open a reply, and the time.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from unittest import mock

from nla_engine.errors import EngineError, PromptError, first_line

#: Roles of the model's own messages.
ASSISTANT = ("assistant", "model")
#: Fields for the chat template; raw text does not use them.
TEMPLATE_FIELDS = ("tools", "chat_template_kwargs", "prefill")
_SYSTEM = ("system", "developer")
_PROBE = ("qzfirstq", "qzsecondq")
#: Most fields of a record that an error lists.
_LISTED = 20


@dataclass(frozen=True)
class Reading:
    """How every record of a file is read, beyond what it says itself.

    column: the field that holds the text; None: the usual ones
    system: the system message of a conversation that has none; variables: of the chat template, unless a record has
    them itself; prefill: the beginning of the reply, likewise
    """

    column: str | None = None
    system: str | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    prefill: str | None = None


@dataclass(frozen=True)
class Rendered:
    """The text that the model reads.

    notes: what to tell the user, worded to follow "12 prompts"; field: the record's field that holds the text alone,
    "" if it stands among others.
    """

    text: str
    notes: tuple[str, ...] = ()
    field: str = ""


class RawText:
    """Records read as written: their "prompt" or "text", or the named column."""

    def __init__(self, column: str | None = None) -> None:
        self._column = column

    def render(self, record: dict[str, Any]) -> Rendered:
        """The text of a record. Raises PromptError."""
        if self._column is not None:
            name = self._column
            if isinstance(named(record, name), list):
                raise PromptError(f'"{name}" is a list; only a text can be read without a chat template')
        elif "messages" in record:
            raise PromptError('"messages" needs a chat template: use --chat with a chat model')
        else:
            name = next((name for name in ("prompt", "text") if name in record), "")
        text = _text(record, (name,) if name else (), '"prompt" or "text"')
        unused = [each for each in TEMPLATE_FIELDS if record.get(each) and each != name]
        notes = tuple(f'have "{each}", which is not used for raw text' for each in unused)
        return Rendered(text, notes, name)


class ChatText:
    """Records as a tokenizer's chat template renders them: "messages", or "prompt" as a user's message.

    replies: whether a reply is to be generated. If so, a conversation that ends with the assistant's words is
    continued; else it is read as it stands. A prefill is always a beginning.
    """

    def __init__(self, tokenizer: Any, *, replies: bool, reading: Reading = Reading()) -> None:
        """PromptError if a variable of `reading` is one that the engine itself gives."""
        self._tokenizer, self._replies, self._reading = tokenizer, replies, reading
        self._reads: dict[str, tuple[bool, bool]] = {}
        own = inspect.signature(tokenizer.apply_chat_template).parameters
        self._reserved = {"messages", "tools", *own} - {"documents", "kwargs"}
        if taken := sorted(self._reserved & reading.variables.keys()):
            raise PromptError(f"--template-option must not give {taken[0]}: leave it out")

    def render(self, record: dict[str, Any]) -> Rendered:
        """The text of a record. Raises PromptError."""
        messages = self._conversation(record)
        given = self._given(record)
        notes = self._unread(given, record)
        if self._reading.system is not None:
            if any(message["role"] in _SYSTEM for message in messages):
                notes += (
                    "have a system message of their own: they keep it, and do not get that of --system",
                )
            else:
                messages.insert(0, {"role": "system", "content": self._reading.system})
                if not any(self._reads_of("system")):
                    notes += ("get the message of --system, which the chat template does not show",)
        prefill, more = self._prefill(record, messages)
        notes += more
        if prefill is not None:
            messages.append({"role": ASSISTANT[0], "content": prefill})
        messages = [self._readable(message) for message in messages]
        last = messages[-1]
        if last["role"] not in ASSISTANT:
            return Rendered(self._apply(messages, add_generation_prompt=True, **given), notes)
        if prefill is None and not self._replies:
            notes += ("end with the assistant's words: they are read as they stand",)
            return Rendered(self._apply(messages, add_generation_prompt=False, **given), notes)
        text, trimmed = self._continued(messages, given)
        if trimmed:
            notes += ("lose the white space at their end, which the chat template trims",)
        if prefill is None:
            notes += ("end with the assistant's words: they are continued",)
        return Rendered(text, notes)

    def _continued(self, messages: list[dict[str, Any]], given: dict[str, Any]) -> tuple[str, bool]:
        """The text up to the end of the last message, and whether white space at that end was lost."""
        ending = _ending(messages[-1])
        if not ending.strip():
            raise PromptError(
                "the last message is the assistant's and has no text to go on with: leave it out"
            )
        text = self._apply(messages, continue_final_message=True, **given)
        if not text.rstrip().endswith(ending.strip()):
            raise PromptError(
                "the chat template changes the assistant's last words, so they cannot be continued: let the "
                "conversation end with the user"
            )
        return text, not text.endswith(ending.lstrip())

    def _prefill(
        self, record: dict[str, Any], messages: list[dict[str, Any]]
    ) -> tuple[str | None, tuple[str, ...]]:
        """The beginning of the reply that the record or --prefill gives, and notes."""
        own = record.get("prefill") if self._reading.column != "prefill" else None
        begun = messages[-1]["role"] in ASSISTANT
        if own is not None:
            if not isinstance(own, str) or not own.strip():
                raise PromptError('"prefill" is not a text that a reply can begin with')
            if begun:
                raise PromptError('has "prefill", and ends with the assistant\'s words: leave one out')
            return own, ('have "prefill": their reply begins with it',)
        if self._reading.prefill is None or not begun:
            return self._reading.prefill, ()
        return None, ("end with the assistant's words: they keep them, and do not get those of --prefill",)

    def _conversation(self, record: dict[str, Any]) -> list[dict[str, Any]]:
        """The messages of a record, without that of --system."""
        if (column := self._reading.column) is not None:
            if isinstance(told := named(record, column), list):
                return _checked_messages(told, column)
            return [{"role": "user", "content": _text(record, (column,), "")}]
        if "messages" in record and "prompt" in record:
            raise PromptError('has "prompt" and "messages": leave one out')
        if "messages" not in record and "prompt" not in record and "text" in record:
            raise PromptError('"text" is read as it is: use --raw or --corpus, or call the field "prompt"')
        if "messages" in record:
            return _checked_messages(record["messages"])
        return [{"role": "user", "content": _text(record, ("prompt",), '"prompt" or "messages"')}]

    def _given(self, record: dict[str, Any]) -> dict[str, Any]:
        """What the template is given besides the messages."""
        tools, variables = record.get("tools"), record.get("chat_template_kwargs")
        given: dict[str, Any] = dict(self._reading.variables)
        if tools is not None:
            if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
                raise PromptError('"tools" is not a list of objects')
            given["tools"] = tools
        if variables is not None:
            if not isinstance(variables, dict):
                raise PromptError('"chat_template_kwargs" is not an object')
            if taken := sorted(self._reserved & variables.keys()):
                raise PromptError(f'"chat_template_kwargs" must not hold "{taken[0]}": leave it out')
            given |= variables
        return given

    def _unread(self, given: dict[str, Any], record: dict[str, Any]) -> tuple[str, ...]:
        """A note for each value that the template is given and does not read."""
        template = self._template(given.get("tools")) if given else ""
        own = record.get("chat_template_kwargs") or {}
        notes = []
        for name in given:
            if re.search(rf"\b{re.escape(name)}\b", template):
                continue
            if name == "tools" or name in own:
                place = name if name == "tools" else f"chat_template_kwargs.{name}"
                notes.append(f'have "{place}", which the chat template does not read')
            else:
                notes.append(f"get --template-option {name}, which the chat template does not read")
        return tuple(notes)

    def _template(self, tools: Any) -> str:
        try:
            return str(self._tokenizer.get_chat_template(tools=tools))
        except ValueError as error:
            raise PromptError(f"the chat template cannot be chosen ({first_line(error)})") from error

    def _readable(self, message: dict[str, Any]) -> dict[str, Any]:
        """The message, with its content as the template reads it for this role: a text or a list of parts."""
        if "content" not in message:
            return message
        content = message["content"]
        text, parts = self._reads_of(message["role"])
        if isinstance(content, list) and not parts:
            content = "".join(part["text"] for part in content)
        elif isinstance(content, str) and parts and not text:
            content = [{"type": "text", "text": content}]
        return {**message, "content": content}

    def _reads_of(self, role: str) -> tuple[bool, bool]:
        """`_probe`, asked once."""
        if role not in self._reads:
            self._reads[role] = self._probe(role)
        return self._reads[role]

    def _probe(self, role: str) -> tuple[bool, bool]:
        """Whether the template renders the content of such a message (if it is a text, if it is a list of parts)."""
        user: dict[str, Any] = {"role": "user", "content": _PROBE[0]}
        lists = [{"type": "text", "text": word} for word in _PROBE]
        shown = []
        for content in ("".join(_PROBE), lists):
            probe: dict[str, Any] = {"role": role, "content": content}
            if role == "user":
                messages = [probe]
            else:
                messages = [probe, user] if role in _SYSTEM else [user, probe]
            try:
                shown.append(self._apply(messages, add_generation_prompt=False))
            except PromptError:
                shown.append("")
        as_text, as_parts = shown
        literal = len(re.findall("['\"]type['\"]", as_parts)) > len(re.findall("['\"]type['\"]", as_text))
        return "".join(_PROBE) in as_text, _PROBE[1] in as_parts and not literal

    def _apply(self, messages: list[dict[str, Any]], **how: Any) -> str:
        # Rendered to text, then encoded without special tokens: the template already has them.
        try:
            text: str = self._tokenizer.apply_chat_template(messages, tokenize=False, **how)
        except Exception as error:  # a template may raise anything
            raise PromptError(f"the chat template refuses it ({first_line(error)})") from error
        return text


def reads_clock(tokenizer: Any) -> bool:
    """Whether one of the tokenizer's chat templates asks for the time."""
    return "strftime_now" in str(tokenizer.chat_template)


@contextmanager
def clock_at(tokenizer: Any, moment: datetime) -> Iterator[None]:
    """While this is open, the tokenizer's chat templates see `moment` (local time, without a zone) as the time.

    EngineError if this version of transformers does not allow that: a prompt that changes by day cannot be resumed.
    """
    from transformers.utils import chat_template_utils

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return moment

    with mock.patch.object(chat_template_utils, "datetime", Clock):
        form = "%Y-%m-%d %H:%M:%S"
        told = tokenizer.apply_chat_template(
            [{"role": "user", "content": ""}],
            chat_template=f"{{{{ strftime_now('{form}') }}}}",
            tokenize=False,
        )
        if told != moment.strftime(form):
            raise EngineError(
                "this version of transformers has a clock for chat templates that cannot be set"
            )
        yield


def lacks(column: str, fields: list[str]) -> str:
    """The error of records that have these fields, and not the one that --text-column names."""
    return f'no field "{column}" (--text-column): the fields are {_listed(fields)}'


def _listed(fields: list[str]) -> str:
    return ", ".join(fields[:_LISTED]) + (", ..." if len(fields) > _LISTED else "") or "none"


def named(record: dict[str, Any], column: str) -> Any:
    """The value of a record's field. PromptError that lists the fields there are if it is not among them."""
    if column not in record:
        raise PromptError(lacks(column, list(record)))
    return record[column]


def _text(record: dict[str, Any], names: tuple[str, ...], wanted: str) -> str:
    """The first of these fields that the record has. PromptError unless it is a text that is not empty."""
    for name in names:
        if name in record:
            if not isinstance(record[name], str):
                raise PromptError(f'"{name}" is not a text')
            if not record[name]:
                raise PromptError("the prompt is empty")
            return str(record[name])
    raise PromptError(
        f"no field {wanted}: the fields are {_listed(list(record))}: name the text's with --text-column"
    )


def _checked_messages(messages: Any, name: str = "messages") -> list[dict[str, Any]]:
    """Messages with a role and text; without content only where a tool is called. Raises PromptError."""
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise PromptError(f'"{name}" is not a list of {{"role", "content"}} objects')
    checked = []
    for number, message in enumerate(messages):
        place = f"{name}[{number}]"
        if not isinstance(message.get("role"), str) or not message["role"]:
            raise PromptError(f'{place} has no "role": say who speaks')
        content = message.get("content")
        if content is None:
            if not message.get("tool_calls"):
                raise PromptError(f'{place} has no "content": write its text, or leave the message out')
            message = {key: value for key, value in message.items() if key != "content"}
        elif isinstance(content, list):
            for index, part in enumerate(content):
                _check_part(part, f"{place}.content[{index}]")
        elif not isinstance(content, str):
            raise PromptError(f"{place}.content is neither a text nor a list of parts: write it as text")
        checked.append(message)
    return checked


def _check_part(part: Any, place: str) -> None:
    if not isinstance(part, dict):
        raise PromptError(f'{place} is not a part like {{"type": "text", "text": "..."}}')
    if part.get("type") != "text":
        raise PromptError(f'{place} is of type {part.get("type")!a}: only "text" can be read')
    if not isinstance(part.get("text"), str):
        raise PromptError(f'{place} has no "text"')


def _ending(message: dict[str, Any]) -> str:
    """The text that a message ends with."""
    content = message.get("content", "")
    text = content if isinstance(content, str) else content[-1]["text"] if content else ""
    return str(text)
