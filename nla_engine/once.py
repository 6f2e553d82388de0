"""Commands that refuse an option given twice, unless it takes several values: no value is lost without a word.

In a list of commands each is described by the whole first sentence of its help.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup


class _Once:
    """Before the values are read: the options are counted as the parser found them."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        if args and not ctx.resilient_parsing:
            _, _, found = self.make_parser(ctx).parse_args(args=list(args))  # type: ignore[attr-defined]
            for option, times in Counter(found).items():
                if times > 1 and _takes_one(option):
                    names = "/".join([*option.opts, *option.secondary_opts])
                    ctx.fail(f"{names} is given {times} times, and takes one value: leave one out")
        return super().parse_args(ctx, args)  # type: ignore[misc]


def _takes_one(option: Any) -> bool:
    """Whether a second value would replace the first. A plain flag says the same twice."""
    if option.param_type_name != "option" or option.multiple:
        return False
    return not option.is_flag or bool(option.secondary_opts)


class OnceCommand(_Once, TyperCommand):
    """A command whose options are given once."""


class OnceGroup(_Once, TyperGroup):
    """A group of commands whose own options are given once."""


class Application(typer.Typer):
    """An application, or a group of its commands: each of them is a OnceCommand, and has a name."""

    def __init__(self, **how: Any) -> None:
        super().__init__(cls=OnceGroup, **how)

    def command(self, name: str | None = None, **how: Any) -> Callable[[Any], Any]:
        """As of `typer.Typer`."""

        def register(function: Any) -> Any:
            sentence = re.split(r"(?<=[.?])\s", function.__doc__ or "", maxsplit=1)[0]
            about = {"cls": OnceCommand, "short_help": sentence, **how}
            return super(Application, self).command(name or function.__name__, **about)(function)

        return register
