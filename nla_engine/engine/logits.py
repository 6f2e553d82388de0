"""Check, before a model generates, that the engine's logits equal those of transformers' whole model."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch

from nla_engine.errors import UnsupportedModel, first_line
from nla_engine.models.load import LanguageModel
from nla_engine.models.logits import GivenStates

#: Largest relative L2 difference: both ways run the same code on the same states.
_LIMIT = 1e-3
#: Number of hidden states that are tried.
_STATES = 8


@torch.inference_mode()
def check_logits(lm: LanguageModel) -> None:
    """UnsupportedModel unless `lm.logits` equal those of the whole model in transformers, given the same states.

    The decoder itself does not run, so a Runner may be open. Needs a head.
    """
    drawn = torch.randn(_STATES, lm.d_model, generator=torch.Generator().manual_seed(0))
    hidden = drawn.to(lm.device, lm.dtype)
    refusal = f"{lm.name}: {type(lm.model).__name__} cannot generate here: "
    try:
        own, expected = lm.logits(hidden), _whole(lm, hidden)
    except Exception as error:  # the code of any architecture
        raise UnsupportedModel(
            f"{refusal}its logits depend on more than its decoder's last hidden states ({first_line(error)})"
        ) from error
    if own.shape != expected.shape or own.shape[1] > lm.vocab_size:
        raise UnsupportedModel(
            f"{refusal}it gives {own.shape[1]} logits per state (transformers {expected.shape[1]}), and has "
            f"{lm.vocab_size} embeddings"
        )
    difference = float((own.double() - expected.double()).norm() / expected.double().norm())
    if not difference <= _LIMIT:
        raise UnsupportedModel(
            f"{refusal}its logits differ from transformers' own by {difference:.2g} (limit {_LIMIT:.2g})"
        )


def _whole(lm: LanguageModel, hidden: torch.Tensor) -> torch.Tensor:
    """Logits [n, columns] of transformers' own model, whose decoder is replaced by one that returns `hidden` [n, d]."""

    def answer(*_: Any, **__: Any) -> GivenStates:
        return GivenStates(hidden[None])

    ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
    with mock.patch.object(lm.decoder, "forward", answer):
        logits: torch.Tensor = lm.model(input_ids=ids, use_cache=False, return_dict=True).logits
    return logits[0]
