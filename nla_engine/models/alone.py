"""What transformers computes for one sequence by itself, without a cache: the truth that stored rows are judged by.

The order of sums changes every later rounding, and on some tokens a model is chaotic in any arithmetic. So a sequence
can be read once more with other roundings: how far that moves a row is its noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from nla_engine.models.implementation import attend_by
from nla_engine.models.load import LanguageModel
from nla_engine.models.places import Place
from nla_engine.sites import Site

#: A row may err by this multiple of its noise, on top of what is allowed of every row.
TIMES_NOISE = 4.0


@torch.inference_mode()
def read_alone(
    lm: LanguageModel, places: Mapping[Site, Place], ids: torch.Tensor, seed: int = 0
) -> tuple[dict[Site, torch.Tensor], torch.Tensor]:
    """The states [1, T, d] at every place, and the decoder's own, for ids int64 [1, T]. No Runner may be open.

    seed: if not 0, embeddings change by about half a unit in the last place
    Attention is transformers' eager one, which the model has afterwards.
    """
    attend_by(lm.model, "eager")
    states: dict[Site, torch.Tensor] = {}

    def moved(_module: object, _inputs: object, embedded: torch.Tensor) -> torch.Tensor:
        random = torch.Generator(embedded.device).manual_seed(seed)
        drawn = torch.randn(embedded.shape, generator=random, device=embedded.device)
        return (embedded.float() * (1 + torch.finfo(embedded.dtype).eps / 2 * drawn)).to(embedded.dtype)

    def keep(site: Site) -> Callable[[torch.Tensor], None]:
        return lambda hidden: states.update({site: hidden.clone()})  # some blocks change what they read

    hooks = [place.watch(keep(site)) for site, place in places.items()]
    if seed:
        hooks.append(lm.embedding.register_forward_hook(moved))
    try:
        final: torch.Tensor = lm.decoder(input_ids=ids, **lm.uncached).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    return states, final
