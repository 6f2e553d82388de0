"""Whether the texts of a file can be read by an AR: its layer, and their lengths."""

from __future__ import annotations

from nla_engine.errors import RequestError
from nla_engine.roundtrip.reconstruct import Reconstructor
from nla_engine.roundtrip.text_file import TextFile
from nla_engine.sites import Site

#: Tokens of a prompt that are no part of its text, at most.
_SPECIAL_TOKENS = 16


def check_layer(texts: TextFile, layer: Site, ar: str) -> None:
    """RequestError for texts of another site than the one that the AR gives. ar: its name."""
    if texts.layer not in (None, layer):
        assert texts.layer is not None
        mend = "an AR of that layer" if texts.layer.layer != layer.layer else f"--site {texts.layer.part}"
        raise RequestError(
            f"{texts.path}: explains layer {texts.layer}, --ar {ar} gives layer {layer}: give {mend}"
        )


def check_lengths(texts: TextFile, reconstructor: Reconstructor) -> None:
    """RequestError for a text that is longer than the AR can read."""
    limit = reconstructor.lm.max_length
    # A token has at least one byte, so that most texts need not be encoded for this.
    around = len("".join(reconstructor.sidecar.template).encode()) + _SPECIAL_TOKENS
    places = [place for place, text in enumerate(texts.all()) if len(text.encode()) + around > limit]
    for place in places:
        (size,) = reconstructor.prompt_sizes([texts.text(place)])
        if size > limit:
            raise RequestError(
                f"{texts.path}: row {texts.row_of(place)}: text and prompt are {size:,} tokens, the AR reads at most "
                f"{limit:,}: shorten the text"
            )
