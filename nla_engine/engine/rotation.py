"""What a model's rotary embedding lets the engine do: how long sequences may be, and whether a graph can hold it."""

from __future__ import annotations

import sys
from typing import Any

from nla_engine.errors import EngineError
from nla_engine.models.load import LanguageModel

#: Kinds of rotary embeddings whose code in transformers may read positions on the host.
_HOST_ROTATIONS = ("dynamic", "longrope")


def rotates_on_host(lm: LanguageModel) -> bool:
    """Whether a rotation of the model may read positions on the host."""
    return any(rope.get("rope_type") in _HOST_ROTATIONS for rope in _rotations(lm))


def rotation_limit(lm: LanguageModel) -> int:
    """The length from which on the rotations of a sequence would depend on how long the others of a pass are.

    A lane that has ended may stand one position past its last token, so a sequence must end before the limit.
    """
    own: Any = getattr(lm.config, "original_max_position_embeddings", 0)
    ropes = [rope for rope in _rotations(lm) if rope.get("rope_type") == "longrope"]
    return min((rope.get("original_max_position_embeddings", own) for rope in ropes), default=sys.maxsize)


def check_rotation(lm: LanguageModel, length: int) -> None:
    """EngineError if a sequence of this length reaches `rotation_limit`."""
    if length >= (most := rotation_limit(lm)):
        raise EngineError(
            f"{lm.name}: sequences of {length} tokens reach {most}. From there its rotation (longrope) of every "
            "sequence of a batch depends on the longest: use shorter prompts or fewer new tokens"
        )


def _rotations(lm: LanguageModel) -> list[dict[str, Any]]:
    """The parameters of the model's rotary embedding, or of each one if it has several."""
    given: Any = getattr(lm.config, "rope_parameters", None) or {}
    return [given, *(each for each in given.values() if isinstance(each, dict))]
