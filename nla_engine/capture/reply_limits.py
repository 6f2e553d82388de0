"""What ends the sequences of a capture: how many tokens each may generate, and the texts after which it ends."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nla_engine.config import CaptureOptions
from nla_engine.engine.rotation import rotation_limit
from nla_engine.engine.stopping import StopAutomaton
from nla_engine.errors import RequestError
from nla_engine.models.load import LanguageModel
from nla_engine.options import MAX


def context_size(lm: LanguageModel) -> int:
    """Most tokens of a sequence that may grow to the context's end. RequestError if the model states none."""
    if not lm.states_length:
        raise RequestError(
            f"--max-new-tokens is {MAX}: {lm.name} does not state how many positions it has: give a number"
        )
    return min(lm.max_length, rotation_limit(lm) - 1)


def longest_prompt(options: CaptureOptions, lm: LanguageModel) -> int:
    """Most tokens of a prompt, so that what is asked for can be generated: at least one token, if that is MAX."""
    if isinstance(options.max_new_tokens, str):
        return context_size(lm) - 1
    return lm.max_length - options.max_new_tokens


def reply_limits(options: CaptureOptions, lm: LanguageModel, sizes: np.ndarray) -> np.ndarray:
    """int64 [n]: most new tokens of prompts with these sizes, int64 [n]."""
    if isinstance(options.max_new_tokens, str):
        return context_size(lm) - sizes
    return np.full(len(sizes), options.max_new_tokens, np.int64)


def stop_of(
    options: CaptureOptions, vocabulary: Sequence[bytes], eos_ids: tuple[int, ...]
) -> StopAutomaton | None:
    """What ends a reply, by its tokens; None if nothing is generated. RequestError for texts that are too long."""
    if not options.max_new_tokens:
        return None
    try:
        return StopAutomaton(vocabulary, eos_ids, [text.encode() for text in options.stop])
    except ValueError as error:
        raise RequestError(f"--stop: {error}: give shorter ones") from error
