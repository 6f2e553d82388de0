"""What commands say, in the words of a Python call: `--max-new-tokens` is `max_new_tokens` there."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager

from nla_engine import config
from nla_engine.errors import NLAError
from nla_engine.options import Options

_OPTIONS = {
    field.name: field.default
    for kind in vars(config).values()
    if isinstance(kind, type) and issubclass(kind, Options)
    for field in dataclasses.fields(kind)
}
#: A command, which stays as it is; or an option: with a word before it that asks for a value, and a number behind it.
_OPTION = re.compile(
    r"nla-engine [a-z][^:;()]*"
    r"|(?P<asks>\b(?:give|pass|with|without|set|lower|raise|or) (?:an? )?)?"
    r"(?<![\w-])--(?P<name>[a-z]+(?:-[a-z]+)*)(?P<number> [0-9.]*[0-9]\b)?"
)


def in_python(text: str) -> str:
    """The same text with the names of arguments in place of those of options."""
    return _OPTION.sub(_argument, text)


@contextmanager
def python_words() -> Iterator[None]:
    """Errors that are raised inside speak of arguments. Also a decorator of a function."""
    try:
        yield
    except NLAError as error:
        error.args = tuple(in_python(each) if isinstance(each, str) else each for each in error.args)
        raise


def _argument(found: re.Match[str]) -> str:
    name, asks, number = (found["name"] or "").replace("-", "_"), found["asks"] or "", found["number"]
    if name not in _OPTIONS:
        return found[0]
    if isinstance(_OPTIONS[name], bool):
        return f"{asks}{name}=True{number or ''}"
    if number:
        return f"{asks}{name}={number.strip()}"
    return re.sub(r"\ban? $", "", asks) + name + ("=..." if asks and asks != "or " else "")
