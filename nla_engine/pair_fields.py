"""Fields of commands that run an AV, an AR or an oracle: which, how vectors enter and leave it, what it is told.

As in `fields`, each is written once, as a function that makes it.
"""

from __future__ import annotations

import math
import re
from typing import Any

from nla_engine.options import UNICODE, Must, json_values, named_values, option

#: Ways for a vector to enter a model, as `models.injection` describes them, with the number of a block.
INJECTION = re.compile(r"replace|(replace|add)@[0-9]{1,4}")
#: Layers and positions, relative to the row that is explained, of the vectors that enter one prompt.
SLOTS = re.compile(r"L[0-9]{1,4}@(0|-[0-9]{1,6})(,L[0-9]{1,4}@(0|-[0-9]{1,6}))*")
#: Injection scales in words: raw and none leave a vector as it is, sqrt_d_model is the square root of the width.
SCALES = ("raw", "none", "sqrt_d_model")
#: In a prompt of the user's: stands for a vector, or for all vectors of a prompt if it stands there once.
INJECT = "<INJECT>"
#: In a prompt of the user's: stands for the question.
QUESTION = "<QUESTION>"


def av() -> Any:
    """The verbalizer."""
    return option("Verbalizer (AV): a local directory or a Hub id (owner/name, or owner/name/folder).")


def ar() -> Any:
    """The reconstructor."""
    return option("Reconstructor (AR): a local directory or a Hub id.")


def injection(
    help: str = "How vectors enter the AV, in place of what its sidecar says: replace (the marker's embedding), "
    "replace@L or add@L (at the output of block L).",
) -> Any:
    """How vectors enter a model."""
    return option(
        help,
        None,
        must=Must(
            lambda name: bool(INJECTION.fullmatch(name)),
            "replace, replace@L or add@L, L the number of a block",
        ),
    )


def injection_scale(
    help: str = "Norm of the injected vectors, in place of the sidecar's: a number, raw (as they are) or sqrt_d_model.",
) -> Any:
    """The norm of injected vectors."""
    return option(
        help,
        None,
        must=Must(is_scale, f"a positive number or one of {', '.join(SCALES)}"),
    )


def norm_match() -> Any:
    """Whether vectors get the norm of what they meet."""
    return option(
        "With --injection: give each vector the norm of what it is added to or replaces, instead of a fixed one.",
        False,
        excludes="injection_scale",
    )


def slots() -> Any:
    """The vectors that enter one prompt of an AV."""
    return option(
        "For an AV that reads several vectors at once: which vector enters at each marker of its prompt, such as "
        "L23@0,L24@0,L25@0 (three layers of the explained token) or "
        "L24@-2,L24@-1,L24@0 (three tokens up to it).",
        None,
        must=Must(lambda value: SLOTS.fullmatch(value) is not None, "a list such as L23@0,L24@-1"),
    )


def vector_map(model: str, place: str) -> Any:
    """A learned map at one side of a model."""
    return option(
        f"Learned map that vectors go through {place} the {model}, as safetensors (weight, bias). "
        f"[default: {model.lower()}_map.safetensors beside its weights, if there is one]",
        None,
    )


def whitening() -> Any:
    """The whitening that a pair was trained on."""
    return option(
        "Whitening that the models were trained on, as safetensors (mean, matrix). "
        "[default: whitening.safetensors beside the weights, if the sidecar says norm: whitened_zca]",
        None,
    )


def prompt(whose: str) -> Any:
    """The user's own prompt."""
    return option(
        f"Message to {whose}, in place of its own prompt, with <INJECT> where the vector enters.",
        None,
        must=UNICODE,
    )


def system() -> Any:
    """The system message beside it."""
    return option("System message before that prompt.", None, must=UNICODE)


def template_option() -> Any:
    """Variables of the chat template."""
    return option(
        "Variable of the chat template, as enable_thinking=false. Repeat for several.",
        None,
        typed=list[str] | None,
        parse=json_values,
    )


def template_value() -> Any:
    """Values of a template's further holes."""
    return option(
        "Value of a further hole in a sidecar's template, as depth_pct=57. Repeat for several.",
        (),
        typed=list[str],
        parse=named_values,
    )


def prefill() -> Any:
    """The beginning of the text."""
    return option("Begin the model's reply, and so the text, with this.", "", must=UNICODE)


def is_scale(value: str) -> bool:
    """Whether a text is an injection scale: a positive number, or a word of SCALES."""
    try:
        return value in SCALES or 0 < float(value) < math.inf
    except ValueError:
        return False
