"""Prompt records -> the text that the model reads: through its chat template, or as written.

Decides what a template is given: messages, tools, variables, whether to open a reply, and the time.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from unittest import mock

from nla_engine.errors import EngineError, PromptError, first_line

#: Roles of the model's own messages.
ASSISTANT = ("assistant", "model")
#: Fields for the chat template; raw text does not use them.
TEMPLATE_FIELDS = ("tools", "chat_template_kwargs")
_PROBE = ("qzfirstq", "qzsecondq")


@dataclass(frozen=True)
class Rendered:
    """The text that the model reads; notes: what to tell the user, worded to follow "12 prompts"."""

    text: str
    notes: tuple[str, ...] = ()


class RawText:
    """Records read as written: their "prompt" or "text"."""

    def render(self, record: dict[str, Any]) -> Rendered:
        """The text of a record. Raises PromptError."""
        if "messages" in record:
            raise PromptError('"messages" needs a chat template: use --chat with a chat model')
        text = _text(record, ("prompt", "text"), '"prompt" or "text"')
        unused = [name for name in TEMPLATE_FIELDS if record.get(name)]
        return Rendered(text, tuple(f'have "{name}", which is not used for raw text' for name in unused))


class ChatText:
    """Records as a tokenizer's chat template renders them: "messages", or "prompt" as a user's message.

    replies: whether a reply is to be generated. If so, a conversation that ends with the assistant's words is
    continued; else it is read as it stands.
    """

    def __init__(self, tokenizer: Any, *, replies: bool) -> None:
        self._tokenizer, self._replies = tokenizer, replies
        self._reads: dict[str, tuple[bool, bool]] = {}
        own = inspect.signature(tokenizer.apply_chat_template).parameters
        self._reserved = {"messages", *own} - {"documents", "kwargs"}

    def render(self, record: dict[str, Any]) -> Rendered:
        """The text of a record. Raises PromptError."""
        if "messages" in record and "prompt" in record:
            raise PromptError('has "prompt" and "messages": leave one out')
        if "messages" not in record and "prompt" not in record and "text" in record:
            raise PromptError('"text" is read as it is: use --raw or --corpus, or call the field "prompt"')
        if "messages" in record:
            messages = _checked_messages(record["messages"])
        else:
            messages = [{"role": "user", "content": _text(record, ("prompt",), '"prompt" or "messages"')}]
        given = self._given(record)
        notes = self._unread(given)
        messages = [self._readable(message) for message in messages]
        last = messages[-1]
        if last["role"] not in ASSISTANT:
            return Rendered(self._apply(messages, add_generation_prompt=True, **given), notes)
        if not self._replies:
            notes += ("end with the assistant's words: they are read as they stand",)
            return Rendered(self._apply(messages, add_generation_prompt=False, **given), notes)
        ending = _ending(last)
        if not ending:
            raise PromptError(
                "the last message is the assistant's and has no text to go on with: leave it out"
            )
        text = self._apply(messages, continue_final_message=True, **given)
        if not text.rstrip().endswith(ending):
            raise PromptError(
                "the chat template changes the assistant's last words, so they cannot be continued: let the "
                "conversation end with the user"
            )
        return Rendered(text, (*notes, "end with the assistant's words: they are continued"))

    def _given(self, record: dict[str, Any]) -> dict[str, Any]:
        """What the template is given besides the messages."""
        tools, variables = record.get("tools"), record.get("chat_template_kwargs")
        given: dict[str, Any] = {}
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

    def _unread(self, given: dict[str, Any]) -> tuple[str, ...]:
        """A note for each value that the template is given and does not read."""
        template = self._template(given.get("tools")) if given else ""
        unread = [name for name in given if not re.search(rf"\b{re.escape(name)}\b", template)]
        places = [name if name == "tools" else f"chat_template_kwargs.{name}" for name in unread]
        return tuple(f'have "{place}", which the chat template does not read' for place in places)

    def _template(self, tools: Any) -> str:
        try:
            return str(self._tokenizer.get_chat_template(tools=tools))
        except ValueError as error:
            raise PromptError(f"the chat template cannot be chosen ({first_line(error)})") from error

    def _readable(self, message: dict[str, Any]) -> dict[str, Any]:
        """The message, with its content as the template reads it for this role: a text or a list of parts."""
        if "content" not in message:
            return message
        role, content = message["role"], message["content"]
        if role not in self._reads:
            self._reads[role] = self._probe(role)
        text, parts = self._reads[role]
        if isinstance(content, list) and not parts:
            content = "".join(part["text"] for part in content)
        elif isinstance(content, str) and parts and not text:
            content = [{"type": "text", "text": content}]
        return {**message, "content": content}

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
                messages = [probe, user] if role in ("system", "developer") else [user, probe]
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


def _text(record: dict[str, Any], names: tuple[str, ...], wanted: str) -> str:
    """The first of these fields that the record has. PromptError unless it is a text that is not empty."""
    for name in names:
        if name in record:
            if not isinstance(record[name], str):
                raise PromptError(f'"{name}" is not a text')
            if not record[name]:
                raise PromptError("the prompt is empty")
            return str(record[name])
    raise PromptError(f"no field {wanted}")


def _checked_messages(messages: Any) -> list[dict[str, Any]]:
    """Messages with a role and text; without content only where a tool is called. Raises PromptError."""
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise PromptError('"messages" is not a list of {"role", "content"} objects')
    checked = []
    for number, message in enumerate(messages):
        place = f"messages[{number}]"
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
    """The text that a message ends with, stripped of white space, which templates may trim."""
    content = message.get("content", "")
    text = content if isinstance(content, str) else content[-1]["text"] if content else ""
    return str(text).strip()
