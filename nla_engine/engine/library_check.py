"""Checks, before anything is captured, that transformers' generation with its caches, in a batch, has the states of its
own forward over each sequence alone.

A cache that a model fills or reads wrongly shows here, and so does a model whose sequences see each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nla_engine.engine.expected import sample_ids
from nla_engine.engine.library import Library
from nla_engine.engine.library_generator import LibraryGenerator
from nla_engine.engine.request import Request
from nla_engine.engine.stopping import StopAutomaton
from nla_engine.engine.tap import NoTap
from nla_engine.errors import EngineError, UnsupportedModel, first_line
from nla_engine.models.alone import TIMES_NOISE, read_alone
from nla_engine.models.load import LanguageModel
from nla_engine.models.places import find_places
from nla_engine.sites import Site

#: Prompt sizes of the sample's lanes, and tokens that each generates.
PROMPTS, NEW = (5, 8, 8, 11), 3
#: Relative L2 error that is allowed for the median token of a lane's prompt, or of its reply, beside its noise.
FLOOR = {torch.float32: 1e-3, torch.bfloat16: 0.08, torch.float16: 0.01}


def check_library(lm: LanguageModel) -> str:
    """The implementation of attention for a Library of `lm`: transformers' fastest one that is right.

    UnsupportedModel if none is. No Runner and no other Library may be open.
    """
    fastest = ["sdpa"] if getattr(lm.model, "_supports_sdpa", False) else []
    fault: EngineError | None = None
    for implementation in (*fastest, "eager"):
        try:
            _check(lm, implementation)
            return implementation
        except UnsupportedModel as error:
            fault = error
    assert fault is not None
    raise fault


@torch.inference_mode()
def _check(lm: LanguageModel, implementation: str) -> None:
    new = NEW if lm.head is not None else 0
    room = min(max(PROMPTS) + new + 1, lm.max_length)
    ids = sample_ids(lm)[:, : room - new]
    requests = [
        Request(lane, tuple(ids[lane, : min(size, ids.shape[1])].tolist()), new)
        for lane, size in enumerate(PROMPTS)
    ]
    tap = _Seen(lm.name, range(len(lm.blocks)))
    with Library(lm, slots=len(PROMPTS), length=room, tap=tap) as library:
        library.attend(implementation)
        stop = StopAutomaton([b""] * lm.vocab_size, ()) if new else None
        generator = LibraryGenerator(library, max_new_tokens=new, stop=stop, read_last=True)
        replies = {each.request.id: each.generated.tolist() for each in generator.run(requests)}
    places = find_places(lm, tap.layers)
    for lane, request in enumerate(requests):
        sequence = torch.tensor([[*request.token_ids, *replies[lane]]], device=lm.device)
        try:
            own, moved = (read_alone(lm, places, sequence, seed)[0] for seed in (0, 1))
        except RuntimeError as error:
            raise UnsupportedModel(
                f"{lm.name}: {type(lm.model).__name__} does not run over one sequence ({first_line(error)}): this "
                "architecture is not supported"
            ) from error
        for site in tap.layers:
            rows = tap.rows(site.layer, lane, sequence.shape[1])
            apart, noise = _apart(rows, own[site][0]), _apart(moved[site][0], own[site][0])
            limit = FLOOR[lm.dtype] + TIMES_NOISE * noise
            size = len(request.token_ids)
            for part, where in ((slice(size), "in a prompt"), (slice(size, None), "in a reply")):
                share = float((apart / limit)[part].nanmedian()) if len(apart[part]) else 0.0
                if not share <= 1.0:
                    raise UnsupportedModel(
                        f"{lm.name}: block {site.layer} of {type(lm.model).__name__} differs {where} from its own "
                        f"forward over the sequence alone, by {float(apart[part].nanmedian()):.2g}: this architecture "
                        "is not supported"
                    )


def _apart(rows: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Relative L2 differences of rows [n, d], float [n]; NaN where transformers' own row is not finite."""
    apart = (rows.double() - own.double()).norm(dim=-1) / own.double().norm(dim=-1).clamp(min=1e-30)
    return torch.where(own.isfinite().all(-1), apart.nan_to_num(1e9), torch.nan)


class _Seen(NoTap):
    """A tap that keeps every row it sees, as it is."""

    reads_prompts = True

    def __init__(self, name: str, layers: Sequence[int]) -> None:
        """name: of the model, for errors"""
        self._name, self.layers = name, tuple(map(Site, layers))
        self._kept: dict[tuple[int, int, int], torch.Tensor] = {}

    def rows(self, layer: int, slot: int, size: int) -> torch.Tensor:
        """[size, d]. EngineError if one was never seen."""
        try:
            return torch.stack([self._kept[layer, slot, position] for position in range(size)])
        except KeyError as error:
            raise EngineError(f"a row of block {layer} was never seen") from error

    def __call__(self, layer: Site, hidden: torch.Tensor, slot: torch.Tensor, position: torch.Tensor) -> None:
        """Keep these rows."""
        for row, at, place in zip(hidden.clone(), slot.tolist(), position.tolist(), strict=True):
            if at == len(PROMPTS):  # the spare slot
                continue
            if (layer.layer, at, place) in self._kept:
                raise UnsupportedModel(
                    f"{self._name}: block {layer} gives two outputs for one token, so which is its row is ambiguous: "
                    "this architecture is not supported"
                )
            self._kept[layer.layer, at, place] = row
