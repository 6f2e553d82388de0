"""Values that a program gives -> the options of a stage. Paths, devices and types are strings, a layer is a number."""

from __future__ import annotations

import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from nla_engine.errors import RequestError
from nla_engine.options import Options

#: How much of a name must agree with another, 0 to 1, for that one to be meant.
_LIKE = 0.6
O = TypeVar("O", bound=Options)


def options_from(kind: type[O], given: Mapping[str, Any], *, what: str, known: Collection[str] = ()) -> O:
    """Options of a class from values by name. what: the call, for errors; known: names that a user may give (all).

    Raises RequestError for an unknown name, a value of another type, and what the options themselves refuse.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    values = {}
    for name, value in given.items():
        if name not in fields:
            near = _nearest(name, known or fields)
            mend = f"did you mean {near}?" if near else f"it has {', '.join(sorted(known or fields))}"
            raise RequestError(f"{name} is no option of {what}: {mend}")
        values[name] = _value(fields[name], hints[name], value)
    return kind(**values)


def _value(field: dataclasses.Field[Any], hint: Any, value: Any) -> Any:
    """A value in the type of its field."""
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    kinds = typing.get_args(hint) if union else (hint,)
    bare = [typing.get_origin(kind) or kind for kind in kinds]
    if value is None and type(None) in bare:
        return None
    if dict in bare and isinstance(value, Mapping):
        return dict(value)
    if parse := field.metadata["parse"]:
        return parse(field.name, _words(value))
    if bool in bare and isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, bool | np.bool_):
        raise _unfit(field.name, value, bare)
    if int in bare and isinstance(value, Integral):
        return int(value)
    if float in bare and isinstance(value, Real):
        return float(value)
    if str in bare and isinstance(value, torch.device | torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, str | os.PathLike):
        for text in (str, Path):
            if text in bare:
                return text(os.fspath(value))
    raise _unfit(field.name, value, bare)


def _nearest(name: str, known: Iterable[str]) -> str | None:
    """The name that is most like it, also with its words in another order. None if none is like it."""

    def sorted_words(text: str) -> str:
        return "_".join(sorted(text.split("_")))

    def likeness(other: str) -> float:
        return max(
            difflib.SequenceMatcher(None, *pair).ratio()
            for pair in ((name, other), (sorted_words(name), sorted_words(other)))
        )

    near = max(known, key=likeness, default=None)
    return near if near is not None and likeness(near) >= _LIKE else None


def _words(value: Any) -> list[str]:
    """What the command line would be given for a value."""
    if isinstance(value, Mapping):
        return [f"{name}={each}" for name, each in value.items()]
    if isinstance(value, str | os.PathLike) or not isinstance(value, Iterable):
        value = [value]
    return [os.fspath(each) if isinstance(each, os.PathLike) else str(each) for each in value]


_NAMES = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    dict: "names with values",
}


def _unfit(name: str, value: Any, kinds: Iterable[Any]) -> RequestError:
    words = " or ".join(_NAMES[kind] for kind in kinds if kind in _NAMES)
    return RequestError(f"{name} is {value!r}: it must be {words}")
