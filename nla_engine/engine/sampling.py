"""How tokens are to be chosen; `nla_engine.ops.choose` chooses them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy. No other transformation of the model's logits is ever applied."""

    temperature: float = 0.0
    seed: int = 0
