"""How vectors enter a model, and where in its prompt. `engine.injection` carries it out.

replace         embedding(token) becomes v                    after the embedding module has run
replace@L       h becomes v                                   h: the output of block L at that token
add@L           h becomes h + v
norm match      in all of these, v is ||h|| * v / ||v||       Karvonen et al. 2025 (Activation Oracles), eq. 1
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from nla_engine.pair_fields import INJECTION


@dataclass(frozen=True)
class Injection:
    """How vectors enter.

    block: at the output of this block; None: at the embeddings
    adds: added to what is there, instead of replacing it
    scale: L2 norm that every vector is scaled to; None: vectors enter as they are
    norm_match: every vector gets the norm of what is there; scale is None
    """

    block: int | None = None
    adds: bool = False
    scale: float | None = None
    norm_match: bool = False

    @classmethod
    def named(cls, name: str, scale: float | None = None, norm_match: bool = False) -> Injection:
        """From `replace`, `replace@L` or `add@L`. ValueError for another name."""
        if not INJECTION.fullmatch(name):
            raise ValueError(f"{name!r} is none of replace, replace@L, add@L")
        word, at, block = name.partition("@")
        return cls(int(block) if at else None, word == "add", None if norm_match else scale, norm_match)

    def to_dict(self) -> dict[str, Any]:
        """For the metadata of results."""
        return {"injection": self.name, "injection_scale": self.scale, "norm_match": self.norm_match}

    @property
    def name(self) -> str:
        """As `named` reads it."""
        word = "add" if self.adds else "replace"
        return word if self.block is None else f"{word}@{self.block}"


def norm_named(scale: str, d_model: int) -> float | None:
    """The norm that a scale stands for, None for as vectors are. scale: as `pair_fields.is_scale` allows it."""
    if scale in ("raw", "none"):
        return None
    return math.sqrt(d_model) if scale == "sqrt_d_model" else float(scale)


@dataclass(frozen=True)
class Prompt:
    """token_ids: a prompt; places: indices of the tokens at which vectors enter, ascending, at least one."""

    token_ids: tuple[int, ...]
    places: tuple[int, ...]

    @property
    def shared(self) -> tuple[int, ...]:
        """The tokens before the first vector."""
        return self.token_ids[: self.places[0]]
