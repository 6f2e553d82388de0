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
    configuration says so (`rope_interleave`). scaled: whether it scales queries and latents (`mla_scale_*_lora`)."""

    interleaved: bool | None = None
    scaled: bool = False


#: By class name of the attention.
FAMILIES = {
    "DeepseekV2Attention": LatentFamily(interleaved=True),
    "MiniCPM3Attention": LatentFamily(interleaved=False),
    "LongcatFlashMLA": LatentFamily(interleaved=True, scaled=True),
    **dict.fromkeys(
        ("DeepseekV3Attention", "Glm4MoeLiteAttention", "YoutuAttention", "AXK1Attention"), LatentFamily()
    ),
}
_QUERIES = ({"q_proj"}, {"q_a_proj", "q_a_layernorm", "q_b_proj"})
_OTHERS = {"kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"}


@dataclass(frozen=True)
class LatentShape:
    """Channels of the latent, and of the part of a key that is rotated. layers: attentions of the model; some have
    several per block."""

    latent: int
    rotated: int
    layers: int

    @property
    def row(self) -> int:
        """Channels that are kept of a token."""
        return self.latent + self.rotated


def _latent_modules(block: Any) -> list[Any]:
    """The attentions of a block that compress their keys; none unless all of its attentions do, and are known."""
    found: Any = getattr(block, "self_attn", None)
    modules = list(found) if isinstance(found, nn.ModuleList) else [found]
    return modules if all(map(_known, modules)) else []


def _known(module: Any) -> bool:
    if type(module).__name__ not in FAMILIES:
        return False
    parts = {name for name, _ in [*module.named_children(), *module.named_parameters(recurse=False)]}
    expand = module.kv_b_proj
    linear = type(expand) is nn.Linear and expand.bias is None
    return bool(parts - _OTHERS in _QUERIES and linear and module.is_causal)


def latent_attentions(lm: LanguageModel) -> list[Any]:
    """All attentions of a model; none unless all of them compress their keys, alike, and are numbered in order."""
    by_block = [_latent_modules(block) for block in lm.blocks]
    modules = [module for modules in by_block for module in modules]
    ordered = [int(module.layer_idx) for module in modules] == list(range(len(modules)))
    alike = len({(module.kv_lora_rank, module.qk_rope_head_dim) for module in modules}) == 1
    return modules if all(by_block) and ordered and alike else []


def latent_shape(lm: LanguageModel) -> LatentShape | None:
    """What every one of them keeps of a token; None if there are none."""
    modules = latent_attentions(lm)
    if not modules:
        return None
    return LatentShape(int(modules[0].kv_lora_rank), int(modules[0].qk_rope_head_dim), len(modules))
