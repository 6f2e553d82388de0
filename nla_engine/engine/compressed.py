"""Which blocks keep compressed keys (multi-head latent attention), and what they keep of a token: one row for all
heads, which is a latent and a part that is rotated. The latent is the value too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from nla_engine.models.load import LanguageModel


@dataclass(frozen=True)
class LatentFamily:
    """A class of attention. interleaved: whether the pairs of channels that it rotates are neighbours; None: its
    configuration says so (`rope_interleave`)."""

    interleaved: bool | None = None


#: By class name of the attention.
FAMILIES = {
    "DeepseekV2Attention": LatentFamily(interleaved=True),
    "MiniCPM3Attention": LatentFamily(interleaved=False),
    **dict.fromkeys(
        ("DeepseekV3Attention", "Glm4MoeLiteAttention", "YoutuAttention", "AXK1Attention"), LatentFamily()
    ),
}
_QUERIES = ({"q_proj"}, {"q_a_proj", "q_a_layernorm", "q_b_proj"})
_OTHERS = {"kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"}


@dataclass(frozen=True)
class LatentShape:
    """Channels of the latent, and of the part of a key that is rotated."""

    latent: int
    rotated: int

    @property
    def row(self) -> int:
        """Channels that are kept of a token."""
        return self.latent + self.rotated


def latent_module(block: Any) -> Any:
    """The attention of a block that compresses its keys; None if the block has none that is known."""
    module: Any = getattr(block, "self_attn", None)
    if type(module).__name__ not in FAMILIES:
        return None
    parts = {name for name, _ in [*module.named_children(), *module.named_parameters(recurse=False)]}
    expand = module.kv_b_proj
    known = parts - _OTHERS in _QUERIES and type(expand) is nn.Linear and expand.bias is None
    return module if known and module.is_causal else None


def latent_shape(lm: LanguageModel) -> LatentShape | None:
    """What every block of a model keeps of a token; None unless all of them compress their keys, alike."""
    modules = [latent_module(block) for block in lm.blocks]
    if not modules or None in modules:
        return None
    found = {LatentShape(int(each.kv_lora_rank), int(each.qk_rope_head_dim)) for each in modules}
    return found.pop() if len(found) == 1 else None
