"""Prompt templates of sidecars, filled as `str.format` fills them: `{name}` is a hole, `{{` and `}}` are braces.

Only plain names are holes: `{a.b}`, `{a[0]}`, `{a!r}` and `{a:3}` are refused, since a sidecar is not to be trusted.
"""

from __future__ import annotations

from collections.abc import Mapping
from string import Formatter


def split_template(
    template: str, hole: str, values: Mapping[str, str], literal: str | None = None
) -> tuple[str, str]:
    """The text before and behind `hole`, the other holes filled with `values`.

    literal: a text that stands for the hole where the template does not name it
    Raises ValueError: a hole that is not named once, one that has no value, braces that do not close.
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
    if len(parts) == 1 and literal and parts[0].count(literal) == 1:
        parts = parts[0].split(literal)
    if len(parts) != 2:
        raise ValueError(f"must hold {{{hole}}} once, it holds it {len(parts) - 1} times")
    return parts[0], parts[1]
