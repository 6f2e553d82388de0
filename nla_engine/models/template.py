"""Prompt templates of sidecars, filled as `str.format` fills them: `{name}` is a hole, `{{` and `}}` are braces.

Only plain names are holes: `{a.b}`, `{a[0]}`, `{a!r}` and `{a:3}` are refused, since a sidecar is not to be trusted.
"""

from __future__ import annotations

from collections.abc import Mapping
from string import Formatter


def split_template(
    template: str, hole: str, values: Mapping[str, str], literal: str | None = None, times: int | None = 1
) -> tuple[str, ...]:
    """The texts before, between and behind `hole`, the other holes filled with `values`.

    literal: a text that stands for the hole where the template does not name it
    times: how often the hole must stand there; None: any number
    Raises ValueError: a hole that is not named so often, one that has no value, braces that do not close.
    """
    parts = [""]
    try:
        pieces = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"has braces that do not close ({error}): {{{{ and }}}} stand for braces") from None
    for text, name, form, conversion in pieces:
        parts[-1] += text
        if name is None:
            continue
        if form or conversion or not name.isidentifier():
            raise ValueError(f"has a hole {{{name}}} that is more than a name")
        if name == hole:
            parts.append("")
        elif name in values:
            parts[-1] += values[name]
        else:
            mend = "--layer" if name == "layer" else f"--template-value {name}=VALUE"
            raise ValueError(f"has a hole {{{name}}} without a value: pass {mend}")
    if len(parts) == 1 and literal and parts[0].count(literal) == (times or 1):
        parts = parts[0].split(literal)
    held = len(parts) - 1
    if times is not None and held != times:
        wanted = "once" if times == 1 else f"{times} times, once for each of --slots"
        several = times == 1 and held > 1 and hole == "injection_char"
        mend = ": pass --slots with the vectors that enter there" if several else ""
        raise ValueError(f"must hold {{{hole}}} {wanted}, it holds it {held} times{mend}")
    return tuple(parts)
