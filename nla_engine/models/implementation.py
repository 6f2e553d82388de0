"""Which of transformers' implementations of attention a model uses."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel


def is_pluggable(model: Any) -> bool:
    """Whether a model, or one that it wraps, calls whichever attention it is told to. Others compute it themselves."""
    return any(
        type(each)._can_set_attn_implementation()
        for each in model.modules()
        if isinstance(each, PreTrainedModel)
    )


def attend_by(model: Any, name: str) -> None:
    """Let the modules of a model attend by this implementation; "eager" is the one that the others are judged by.

    Models that are not pluggable read the name all the same, to make their masks. Of these Falcon adds its ALiBi twice
    where it is eager, in the mask and in the scores, so there "eager" is "sdpa".
    """
    if is_pluggable(model):
        model.set_attn_implementation(name)
        return
    config = model.config
    if name == "eager" and config.model_type == "falcon" and config.alibi:
        name = "sdpa"
    config._attn_implementation = name
