"""Sites: the places of a model where a row can be captured, named as TransformerLens names its hooks."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral

from nla_engine.errors import RequestError

RESID_POST, RESID_MID, ATTN_OUT, MLP_OUT, EMBEDDINGS = (
    "resid_post",
    "resid_mid",
    "attn_out",
    "mlp_out",
    "embeddings",
)
#: What a site of each part holds.
PARTS = {
    RESID_POST: "the residual stream after decoder block K (both residual adds done, before any final norm)",
    RESID_MID: "the residual stream between the attention and the MLP of block K, after the first residual add",
    ATTN_OUT: "what the attention of block K adds to the residual stream (after a norm or dropout of its output)",
    MLP_OUT: "what the MLP or the experts of block K add to the residual stream (after a norm or dropout of it)",
    EMBEDDINGS: "the input of block 0: token embeddings, scaled, normed and with positions added as the model does",
}
_TEXT = re.compile(rf"([0-9]{{1,9}})(?:_({RESID_MID}|{ATTN_OUT}|{MLP_OUT}))?")


@dataclass(frozen=True, eq=False)
class Site:
    """A part of block `layer`. A layer's number alone means the block's output, so Site(20) == 20, also as a key.

    Its text is its key in a store: "20", "20_attn_out", "embeddings". Sites are ordered as a pass computes them.
    """

    layer: int
    part: str = RESID_POST

    @classmethod
    def at(cls, layer: int | Site, part: str = RESID_POST) -> Site:
        """A site of these; one that is given is itself. Embeddings belong to no layer: theirs counts as 0."""
        if isinstance(layer, Site):
            return layer
        return cls(0 if part == EMBEDDINGS else int(layer), part)

    @classmethod
    def parse(cls, text: str | int) -> Site:
        """What `str` gives. ValueError for any other text."""
        if text == EMBEDDINGS:
            return cls(0, EMBEDDINGS)
        if isinstance(text, bool) or not (found := _TEXT.fullmatch(str(text))):
            raise ValueError(f"{text!r} is no layer and no site of one")
        return cls(int(found[1]), found[2] or RESID_POST)

    def __str__(self) -> str:
        if self.part == EMBEDDINGS:
            return EMBEDDINGS
        return str(self.layer) if self.part == RESID_POST else f"{self.layer}_{self.part}"

    @property
    def key(self) -> int | str:
        """Its text, or the layer's number for a block's output: how JSON lists it."""
        return self.layer if self.part == RESID_POST else str(self)

    @property
    def label(self) -> str:
        """For people: "layer 20", "layer 20 attn_out", "embeddings"."""
        if self.part == EMBEDDINGS:
            return EMBEDDINGS
        return f"layer {self.layer}" + ("" if self.part == RESID_POST else f" {self.part}")

    def _place(self) -> tuple[int, int]:
        return self.layer, (EMBEDDINGS, ATTN_OUT, RESID_MID, MLP_OUT, RESID_POST).index(self.part)

    def __lt__(self, other: Site) -> bool:
        return self._place() < other._place()

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Site):
            return self._place() == other._place()
        return isinstance(other, Integral) and self.part == RESID_POST and self.layer == other

    def __hash__(self) -> int:
        return hash(self.layer if self.part == RESID_POST else (self.layer, self.part))


def crossed(layers: Iterable[int], parts: Iterable[str]) -> tuple[Site, ...]:
    """Every part of every layer, in order; the embeddings once."""
    chosen = tuple(parts)
    return tuple(sorted({Site.at(layer, part) for layer in layers for part in chosen}))


def listed(sites: Iterable[Site]) -> str:
    """For people: "layer 3", "layers 3, 5", "layers 3, 5; layer 3 attn_out; embeddings"."""
    sites = list(sites)
    outputs = [str(site) for site in sites if site.part == RESID_POST]
    head = [("layer " if len(outputs) == 1 else "layers ") + ", ".join(outputs)] if outputs else []
    return "; ".join([*head, *(site.label for site in sites if site.part != RESID_POST)])


def part_names(name: str, given: object) -> tuple[str, ...]:
    """Names of parts, joined by commas or one by one, in the order of `PARTS`, each once. RequestError for others."""
    entries = given if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    words = [word.strip() for entry in entries for word in str(entry).split(",")]
    if not words or not set(words) <= PARTS.keys():
        raise RequestError(
            f"--{name} is {','.join(words)!r}: it must be of {', '.join(PARTS)}, joined by commas"
        )
    return tuple(part for part in PARTS if part in words)
