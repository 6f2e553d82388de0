"""Which models the engine refuses by what they are, before anything of them is taken over.

What a model does when it runs is `selfcheck`'s matter.
"""

from __future__ import annotations

from nla_engine.engine.families import can_fuse
from nla_engine.engine.own_attention import knows_attention
from nla_engine.engine.rotation import check_rotation
from nla_engine.engine.states import kept_shape
from nla_engine.errors import EngineError, RequestError, UnsupportedModel
from nla_engine.models.decoder import values
from nla_engine.models.implementation import is_pluggable
from nla_engine.models.load import LanguageModel
from nla_engine.ops.fp8 import check_fp8


def check_supported(lm: LanguageModel, length: int, precision: str) -> None:
    """Refuse a model that has no room for sequences of `length` tokens, that this precision is not for, or whose
    architecture the engine cannot run. Raises EngineError, RequestError or UnsupportedModel."""
    if precision == "fp8":
        _check_fp8(lm)
    if length > lm.max_length:
        raise EngineError(
            f"{lm.name}: sequences of {length} tokens are longer than its {lm.max_length} positions"
        )
    check_rotation(lm, length)
    _check_shape(lm)


def _check_fp8(lm: LanguageModel) -> None:
    if not all(map(can_fuse, lm.blocks)):
        raise EngineError(
            f"{lm.name}: fp8 needs fused blocks, and this architecture has none: use --precision full"
        )
    check_fp8(lm.device)
    if lm.ranks is not None:
        raise RequestError("--precision fp8 is not offered with --tensor-parallel: leave one of the two out")


def _check_shape(lm: LanguageModel) -> None:
    """UnsupportedModel unless every block attends, with as many query heads as the others, through an attention of
    ours."""
    why, by_block = None, bool(getattr(lm.config, "is_heterogeneous", False))
    mixes = any(kept_shape(block) is not None for block in lm.blocks)  # then others attend through ours
    pluggable = is_pluggable(lm.model) or knows_attention(lm.blocks)
    if not mixes and not pluggable:
        why = "has no pluggable attention"
    for key in ("num_attention_heads", "num_key_value_heads", "head_dim"):
        found = values(lm.config, key)
        if key == "num_attention_heads" and not all(found):
            why = why or "has no num_attention_heads in its configuration"
        if not all(isinstance(each, int | None) for each in found):
            why = why or f"has a {key} that is no number"
        if len(found) > 1 and (key == "num_attention_heads" or not by_block):
            why = why or f"has blocks that differ in {key}"
    if why is not None:
        raise UnsupportedModel(
            f"{lm.name}: {type(lm.model).__name__} {why}: this architecture is not supported"
        )
