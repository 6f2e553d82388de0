"""From final hidden states to logits, by the model's own code: its head, and what it scales, caps or cuts after it.

transformers' forward of the whole model runs with a decoder that returns its input, so no architecture has to be known
here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def states_at_once(columns: int, room: int) -> int:
    """How many states, at least one, have logits, float32 [n, columns], of at most `room` bytes."""
    return max(room // (4 * columns), 1)


def logit_pieces(states: int, columns: int, room: int) -> Iterator[slice]:
    """Which of so many states to take at a time, in order, for their logits to fit as in `states_at_once`."""
    step = states_at_once(columns, room)
    return (slice(start, min(start + step, states)) for start in range(0, states, step))


class Given(nn.Module):
    """Replaces the decoder, and each module around it: its output is its input."""

    def __init__(self, path: list[str]) -> None:
        """path: names of modules from here to the decoder, which some models call directly."""
        super().__init__()
        if path:
            setattr(self, path[0], Given(path[1:]))

    def forward(self, *_: Any, inputs_embeds: torch.Tensor, **__: Any) -> GivenStates:
        return GivenStates(inputs_embeds)


class GivenStates(dict[str, torch.Tensor]):
    """The output of a decoder as later code reads it: the last hidden state; every other field is None."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__(last_hidden_state=hidden)

    def __getitem__(self, key: Any) -> Any:
        """By name, or by index as in a tuple."""
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]

    def __getattr__(self, name: str) -> torch.Tensor | None:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.get(name)


class LibraryLogits:
    """Final hidden states [n, d] to logits [n, columns] by transformers' own code, in the dtype that it gives."""

    def __init__(self, model: Any, decoder: nn.Module) -> None:
        """Shares the model's weights; the model is not changed."""
        holder, *path = next(name for name, module in model.named_modules() if module is decoder).split(".")
        self._forward = type(model).forward
        self._model = copy.copy(model)
        self._model._modules = {**model._modules, holder: Given(path)}

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """No synchronisation, unless the model's own code has one."""
        logits: torch.Tensor = self._forward(self._model, inputs_embeds=hidden[None], return_dict=True).logits
        return logits[0]
