"""What an option is: a dataclass field with its help, its check, and what the command line needs. Knows no stage."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from nla_engine.errors import RequestError

#: Every block of the model, whatever their number.
ALL = "all"
#: As many as there can be.
MAX = "max"
#: No model has as many blocks: a longer range is a slip.
MOST_BLOCKS = 10_000


@dataclass(frozen=True)
class Must:
    """What the value of an option must be: the test, and the words of the error."""

    holds: Callable[[Any], bool]
    be: str


AT_LEAST_0 = Must(lambda value: value >= 0, "0 or more")
AT_LEAST_1 = Must(lambda value: value >= 1, "1 or more")
AT_LEAST_2 = Must(lambda value: value >= 2, "2 or more")
UNICODE = Must(lambda value: _is_unicode(value), "text in UTF-8")


def one_of(names: tuple[str, ...], words: str | None = None) -> Must:
    """The value is one of these names. words: how the error lists them."""
    return Must(lambda value: value in names, words or f"one of {', '.join(names)}")


def option(
    help: str,
    default: Any = ...,
    *,
    must: Must | None = None,
    excludes: str | None = None,
    argument: bool = False,
    flags: str | None = None,
    typed: Any = None,
    parse: Callable[[str, Any], Any] | None = None,
) -> Any:
    """A dataclass field with all that its check and the command line need.

    must: checked on construction; None passes where None is the default
    excludes: another option that cannot be given with this one
    argument: it is an argument on the command line, not an option
    flags: its names on the command line, if not `--` followed by the field's name
    typed: its type on the command line, if that is not the field's type
    parse: turns the field's name and the value from the command line into the field's value
    """
    metadata = {
        "help": help,
        "must": must,
        "excludes": excludes,
        "argument": argument,
        "flags": flags,
        "typed": typed,
        "parse": parse,
    }
    return field(metadata=metadata) if default is ... else field(default=default, metadata=metadata)


def flag(name: str) -> str:
    """A field's name on the command line."""
    return "--" + name.replace("_", "-")


def check_local(*paths: Path) -> None:
    """RequestError if one of them is a URL. Path drops one of its slashes, so it would name a directory `s3:`."""
    for path in paths:
        if re.match(r"[a-z0-9]+:/", str(path)):
            url = str(path).replace(":/", "://", 1)
            raise RequestError(f"{url}: this has to be on a local disk, not on an object store")


def check_ending(path: Path, what: str, *endings: str) -> None:
    """RequestError unless the name ends in one of `endings` (".parquet"): other programs choose a reader by it."""
    if not path.name.lower().endswith(endings):
        ending = f"ends in {path.suffix}" if path.suffix else "has no ending"
        raise RequestError(f"{path}: {ending}, and {what}: give a name that ends in {' or '.join(endings)}")


def block_numbers(name: str, given: Any) -> tuple[int, ...] | str:
    """Numbers and ranges, such as "5-20", ascending, each once; ALL if that is among them.

    given: a number, a text in which commas join several, or any number of either
    """
    entries = given if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    words = [word.strip() for entry in entries for word in str(entry).split(",")]
    numbers: set[int] = set()
    for word in words or [""]:
        if word == ALL:
            continue
        fault = f"{flag(name)} is {','.join(words)!r}: "
        if not (found := re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", word)):
            raise RequestError(
                fault + "it must be block numbers from 0 on, ranges such as 5-20, or all, joined by commas"
            )
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first:
            raise RequestError(fault + f"{word} ends before it begins")
        if last - first >= MOST_BLOCKS:
            raise RequestError(fault + f"no model has as many blocks as {word}")
        numbers.update(range(first, last + 1))
    return ALL if ALL in words else tuple(sorted(numbers))


def whole_number_or_max(name: str, given: Any) -> int | str:
    """MAX, or a number from 0 on. given: a number, a text, or a list of one of these"""
    word = ",".join(map(str, given)) if isinstance(given, list) else str(given)
    if word != MAX and not re.fullmatch("[0-9]{1,18}", word):
        raise RequestError(f"{flag(name)} is {word or 'empty'}: it must be 0 or more, or {MAX}")
    return word if word == MAX else int(word)


def regular_expression(pattern: str) -> re.Pattern[str]:
    """The pattern compiled. ValueError, with the reason, if it is no regular expression of Python's."""
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(str(error)) from None


def check_pattern(name: str, pattern: str | None) -> None:
    """RequestError if it is empty or no regular expression."""
    try:
        reason = "" if pattern is None or regular_expression(pattern).pattern else ": this is empty"
    except ValueError as error:
        reason = f": {error}"
    if reason:
        raise RequestError(f"{flag(name)} is {pattern!r}: it must be a regular expression{reason}")


def paths(name: str, given: list[str]) -> tuple[Path, ...]:
    """Paths, given one by one."""
    return tuple(map(Path, given))


def texts(name: str, given: list[str]) -> tuple[str, ...]:
    """Texts, given one by one."""
    return tuple(given)


def named_values(name: str, given: list[str] | None) -> tuple[tuple[str, str], ...]:
    """NAME=VALUE, given one by one."""
    values: dict[str, str] = {}
    for words in given or ():
        key, equals, text = words.partition("=")
        if not (equals and key.isidentifier()):
            raise RequestError(f"{flag(name)} is {words!r}: it must be NAME=VALUE")
        if key in values:
            raise RequestError(f"{flag(name)} gives {key} twice: leave one out")
        values[key] = text
    return tuple(values.items())


def json_values(name: str, given: list[str] | None) -> dict[str, Any] | None:
    """NAME=VALUE, given one by one: the values as JSON where they parse, else as text. None if none was given."""
    values: dict[str, Any] = {}
    for key, text in named_values(name, given):
        try:
            values[key] = json.loads(text, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            values[key] = text
        if not _is_unicode(json.dumps(values[key], ensure_ascii=False)):
            raise RequestError(f"{flag(name)} {key} is no text in UTF-8")
    return values or None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


@dataclass(frozen=True)
class Options:
    """Base: runs the checks in the metadata of the fields, and gives a JSON-able form.

    A path may be given as text, and text as a path.
    """

    def __post_init__(self) -> None:
        for about in fields(self):
            name, value, must = about.name, getattr(self, about.name), about.metadata["must"]
            if about.type == "Path" and isinstance(value, str):
                object.__setattr__(self, name, Path(value))
            if isinstance(value, Path) and str(about.type).startswith("str"):
                object.__setattr__(self, name, str(value))
            if must and not (value is None and about.default is None) and not must.holds(value):
                given = ",".join(map(str, value)) if isinstance(value, tuple) else repr(value)
                raise RequestError(f"{flag(name)} is {given}: it must be {must.be}")
            other = about.metadata["excludes"]
            if other and value and getattr(self, other):
                raise RequestError(f"{flag(name)} and {flag(other)} exclude each other")

    def to_dict(self) -> dict[str, Any]:
        return {k: _plain(v) for k, v in asdict(self).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
